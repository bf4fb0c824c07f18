"""CLIP's image encoder: its eyes are those of transformers' preprocessing, and it loads from whatever folder CLIP is in."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from clipdit.model import clip as module
from clipdit.model.clip import MEAN, STD, ClipImageEncoder, load_clip, pixels
from clipdit.testing import tiny_checkpoint

VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
VISION |= {"patch_size": 8, "projection_dim": 16}
TEXT = {"hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
TEXT |= {"max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_dim": 16}


@pytest.fixture(scope="module")
def vision():
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()


@pytest.fixture(scope="module")
def saved(vision, whole, tmp_path_factory):
    """A folder of each kind."""
    folder = tmp_path_factory.mktemp("clips")
    whole.save_pretrained(folder / "whole")
    vision.save_pretrained(folder / "vision")
    vision.save_pretrained(folder / "run" / "clip")
    tiny_checkpoint(folder / "checkpoint")
    return folder


@pytest.fixture
def image():
    return torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def smooth(height, width):
    """A photograph-like image without edges, uint8 (H, W, 3)."""
    y, x = np.meshgrid(np.linspace(0, 5, height), np.linspace(0, 7, width), indexing="ij")
    return np.stack((np.sin(x + y), np.cos(x * 0.7 - y), np.sin(y * 1.3)), axis=-1) * 100 + 128


@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 32), (48, 100, 32), (20, 24, 32), (224, 224, 224)])
def test_pixels_are_those_of_clips_own_preprocessing(height, width, size):
    array = smooth(height, width).round().astype(np.uint8)
    processor = CLIPImageProcessor(size={"height": size, "width": size}, do_center_crop=False)
    wanted = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    image = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
    got = pixels(image, size, torch.tensor(MEAN).reshape(1, 3, 1, 1), torch.tensor(STD).reshape(1, 3, 1, 1))
    assert (got - wanted).abs().max() < 1.1 / 255 / min(STD)  # theirs is rounded to whole levels after resizing


def test_what_goes_into_the_network_is_differentiable(vision, image):
    encoder = ClipImageEncoder(vision)
    image = image.requires_grad_()
    tokens, pooled = encoder(image)
    for output in (tokens, pooled):
        (gradient,) = torch.autograd.grad(output.square().sum(), image, retain_graph=True)
        assert gradient.isfinite().all() and (gradient.abs().amax((0, 1)) > 0).float().mean() > 0.99  # every pixel counts


def test_embedding_is_transformers_own(vision, image):
    encoder = ClipImageEncoder(vision)
    assert (encoder.token_width, encoder.embedding_width, encoder.tokens) == (24, 16, 16)
    with torch.no_grad():
        tokens, pooled = encoder(image)
        reference = vision(pixel_values=pixels(image, 32, encoder.mean, encoder.std))
        assert tokens.shape == (2, 16, 24) and pooled.shape == (2, 16)
        torch.testing.assert_close(pooled, reference.image_embeds)


def test_tokens_have_gone_through_the_same_last_norm_as_the_pooled_one(vision, image):
    encoder = ClipImageEncoder(vision)
    with torch.no_grad():
        tokens, _ = encoder(image)
        hidden = vision.vision_model(pixel_values=pixels(image, 32, encoder.mean, encoder.std))
        torch.testing.assert_close(tokens, vision.vision_model.post_layernorm(hidden.last_hidden_state)[:, 1:])
        # so each is on the scale of the token that CLIP's embedding is made of
        torch.testing.assert_close(tokens.norm(dim=-1).mean(), hidden.pooler_output.norm(dim=-1).mean(), rtol=0.01, atol=0)
    assert tokens.isfinite().all()


def test_half_precision_takes_any_image(vision, image):
    half = CLIPVisionModelWithProjection(vision.config).to(torch.bfloat16)
    half.load_state_dict(vision.state_dict())
    encoder = ClipImageEncoder(half)
    assert encoder.mean.dtype == torch.float32
    with torch.no_grad():
        tokens, pooled = encoder(image)
        wanted = ClipImageEncoder(vision)(image)
    assert tokens.dtype == pooled.dtype == torch.bfloat16
    for got, reference in zip((tokens, pooled), wanted, strict=True):
        assert (got.float() - reference).abs().max() < 0.06 * reference.abs().max()


def assert_vision(network, other):
    assert type(network) is CLIPVisionModelWithProjection and network.dtype == torch.float32 and not network.training
    wanted = other.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in network.state_dict().items())


def test_it_loads_from_a_vision_tower_from_a_whole_clip_and_from_what_holds_one(saved, vision, whole, image, capfd):
    assert_vision(load_clip(saved / "vision"), vision)
    assert_vision(load_clip(str(saved / "run")), vision)
    assert_vision(load_clip(saved / "whole"), whole)
    inner = CLIPVisionModelWithProjection.from_pretrained(saved / "checkpoint" / "image_encoder")
    capfd.readouterr()
    loaded = load_clip(saved / "checkpoint")
    assert_vision(loaded, inner)
    with torch.no_grad():  # also what is in no file: the numbers of the positions
        for got, wanted in zip(ClipImageEncoder(loaded)(image), ClipImageEncoder(inner.eval())(image), strict=True):
            assert torch.equal(got, wanted)
    assert capfd.readouterr() == ("", "")


def test_a_whole_clip_says_beside_its_towers_how_wide_the_embedding_is(whole, tmp_path):
    whole.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["projection_dim"] = 512
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_clip(tmp_path).config.projection_dim == 16


def test_files_of_2022_with_numbered_positions_in_half_precision_load_in_float32(vision, tmp_path):
    vision.save_pretrained(tmp_path)
    tensors = {name: tensor.half() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_clip(tmp_path)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.visual_projection.weight, vision.visual_projection.weight.half().float())


def test_shards_are_read_whole(vision, tmp_path):
    vision.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_vision(load_clip(tmp_path), vision)


def test_from_a_hub_it_is_the_same_without_a_table_of_the_text_half(saved, whole, capfd):
    for folder, wanted in ((saved / "whole", whole), (saved / "vision", None)):
        loaded = module._from_hub(str(folder))  # transformers takes a folder where it takes a hub id
        assert_vision(loaded, wanted or load_clip(folder))
    said = "".join(capfd.readouterr())
    assert "UNEXPECTED" not in said and "REPORT" not in said


def test_what_is_no_clip_is_refused_in_one_line(vision, tmp_path):
    def refusal(where):
        with pytest.raises(ValueError) as error:
            load_clip(where)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no CLIP image encoder at runs/my/clip: it is no folder here" in refusal("runs/my/clip")
    assert "holds no config.json, so it is no CLIP" in refusal(tmp_path)
    for config, message in [
        ({"model_type": "bert"}, "is of type bert; wanted a CLIP"),
        ({}, "is of type None"),
        ({"model_type": "clip_vision_model"}, "model.safetensors is missing"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert message in refusal(tmp_path)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path / "bare")  # without the projection
    assert "its weights lack vision_model.embeddings.class_embedding and" in refusal(tmp_path / "bare")
    vision.save_pretrained(tmp_path / "wide")
    (tmp_path / "wide" / "config.json").write_text(json.dumps(VISION | {"model_type": "clip_vision_model", "hidden_size": 32}))
    assert "by its configuration" in refusal(tmp_path / "wide")
    (tmp_path / "wide" / "config.json").write_text(
        json.dumps(VISION | {"model_type": "clip_vision_model", "hidden_size": "wide"})
    )
    assert "config.json is damaged: Validation error for field 'hidden_size': TypeError" in refusal(tmp_path / "wide")
    vision.save_pretrained(tmp_path / "wide")
    (tmp_path / "wide" / "model.safetensors").unlink()
    torch.save(vision.state_dict(), tmp_path / "wide" / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which can run code and is never loaded" in refusal(tmp_path / "wide")
