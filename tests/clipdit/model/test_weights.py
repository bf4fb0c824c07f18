"""Reading networks out of folders: exactly what was written, or one line that says what is wrong."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import nn

from clipdit.model.dit import DiT
from clipdit.model.weights import fill, load_diffusers, read_json, read_tensors

STEM = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    DiT(width=32, depth=2, heads=2, conditioning="concat").save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def assert_same(network, other):
    for (name, a), (other_name, b) in zip(network.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(a, b), name


def test_a_network_is_what_diffusers_would_have_loaded(folder, capfd):
    network, wanted = load_diffusers(DiT, folder), DiT.from_pretrained(folder)
    assert_same(network, wanted)
    assert {k: v for k, v in network.config.items() if k[0] != "_"} == {k: v for k, v in wanted.config.items() if k[0] != "_"}
    assert not network.training and all(p.requires_grad and p.device.type == "cpu" for p in network.parameters())
    assert capfd.readouterr() == ("", "")


def test_weights_in_shards_are_read_whole(folder, tmp_path):
    whole = load_diffusers(DiT, folder)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(load_diffusers(DiT, tmp_path / "shards"), whole)


def test_the_dtype_is_the_one_asked_for_whatever_was_stored(folder):
    whole = load_diffusers(DiT, folder)
    half = {name: tensor.half() for name, tensor in whole.state_dict().items()}
    save_file(half, folder / f"{STEM}.safetensors")
    again = load_diffusers(DiT, folder)
    assert again.dtype == torch.float32
    assert torch.equal(again.latent_in.weight, whole.latent_in.weight.half().float())
    assert load_diffusers(DiT, folder, torch.bfloat16).dtype == torch.bfloat16


def test_a_network_does_not_keep_hold_of_its_file(folder):
    network = load_diffusers(DiT, folder)
    before = network.latent_in.weight.detach().clone()
    file = folder / f"{STEM}.safetensors"
    with file.open("rb+") as stream:  # in place, as `cp` does
        stream.truncate(0)
    assert torch.equal(network.latent_in.weight, before)


def test_attention_names_of_2022_are_understood(tmp_path):
    """sd-vae-ft-mse has them."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    vae.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / f"{STEM}.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in tensors.items()}
    assert any("query" in key for key in tensors)
    save_file(tensors, tmp_path / f"{STEM}.safetensors")
    assert_same(load_diffusers(AutoencoderKL, tmp_path), vae)


def test_what_does_not_fit_is_named(folder):
    whole = load_diffusers(DiT, folder).state_dict()
    network = nn.Linear(2, 3)
    good = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    for tensors, message in [
        ({"weight": good["weight"]}, "its weights lack bias"),
        (good | {"more": good["bias"]}, "its weights hold, beside what its configuration asks for, more"),
        (whole, "its weights lack bias and 1 more"),
        (good | {"weight": torch.zeros(2, 3)}, "weight is 2x3 in its weights, 3x2 by its configuration"),
        (good | {"bias": torch.tensor(1.0)}, "bias is a number in its weights, 3 by its configuration"),
        (good | {"bias": torch.tensor([1.0, torch.nan, 0])}, "bias holds numbers that are not finite in torch.float32"),
    ]:
        with pytest.raises(ValueError) as error:
            fill(network, tensors, "here")
        assert str(error.value).startswith("here ") and message in str(error.value)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        fill(network, good | {"bias": torch.full((3,), 1e6)}, "here", torch.float16)
    with pytest.raises(ValueError, match="is of class DiT; wanted AutoencoderTiny"):
        load_diffusers(AutoencoderTiny, folder)


def test_shards_that_cannot_be_had_are_named(folder, tmp_path):
    shards = tmp_path / "shards"
    load_diffusers(DiT, folder).save_pretrained(shards, max_shard_size="40KB")
    index = shards / f"{STEM}.safetensors.index.json"
    plain = read_json(index)
    one = next(iter(plain["weight_map"].values()))
    for weight_map, message in [
        ({"a": "../outside.safetensors"}, "wanted a weight_map from tensors to files beside it"),
        ([], "wanted a weight_map from tensors to files beside it"),
        (plain["weight_map"] | {"a": "absent.safetensors"}, "absent.safetensors is missing, which"),
        ({"a": one}, "its weights lack"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            load_diffusers(DiT, shards)
    index.write_text(json.dumps(plain))
    save_file({"a": torch.zeros(1)}, shards / f"{STEM}.safetensors")
    with pytest.raises(ValueError, match=r"holds both .* delete the one that is out of date"):
        read_tensors(shards, STEM)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00\x01", "[" * 100_000])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged: .+") as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)
