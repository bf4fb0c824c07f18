"""Training of the small CLIP: names and pictures that belong together come together, and transformers opens what was saved."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from clipdit.data.layouts import Pair
from clipdit.images import to_float
from clipdit.model.clip import ClipImageEncoder, load_clip
from clipdit.train.clip import ClipSettings, ClipTask, contrast, read_captions, train_tokenizer
from clipdit.train.loop import TrainSettings, train
from clipdit.train.record import read_history

TINY = ClipSettings(
    image_size=32, patch_size=8, width=64, layers=1, text_width=64, text_layers=1, embedding=16, vocabulary=400, max_words=12
)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "grey": (90, 90, 90),
           "yellow": (255, 255, 0), "purple": (160, 0, 160), "black": (0, 0, 0)}  # fmt: skip


def colour_pairs() -> torch.Tensor:
    """(8, 2, 3, 32, 32): a half-coloured source and a coloured target."""
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)[:, None, :, None, None].repeat(1, 2, 1, 32, 32)
    colours[:, 0, :, :16] = 128
    return colours


def captions() -> list[list[str]]:
    return [[f"a {name} square", name, "square"] for name in COLOURS]


@pytest.fixture(scope="module")
def task() -> ClipTask:
    return make_task()


def make_task(batch: int = 8) -> ClipTask:
    return ClipTask(TINY, colour_pairs(), captions(), colour_pairs()[:3], captions()[:3], batch, 0)


def test_contrast_is_the_mean_of_both_cross_entropies():
    a, b = (F.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(i)), dim=1) for i in (0, 1))
    scale = torch.tensor(7.0)
    matches = torch.eye(5)
    rows = -(matches * torch.log_softmax(scale * a @ b.T, dim=1)).sum(1)
    columns = -(matches * torch.log_softmax(scale * b @ a.T, dim=1)).sum(1)
    torch.testing.assert_close(contrast(a, b, scale), (rows + columns) / 2)
    assert contrast(a, a, torch.tensor(100.0)).max() < contrast(a, a.roll(1, 0), torch.tensor(100.0)).min()


def test_the_tokenizer_reads_what_it_was_trained_on_and_what_it_was_not():
    tokenizer = train_tokenizer(["a red square", "a blue square", "grinning face"] * 3, TINY)
    assert tokenizer.decode(tokenizer("A Red square")["input_ids"], skip_special_tokens=True).strip() == "a red square"
    ids = tokenizer("ünknown 🦊")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|startoftext|>" and len(ids) > 3
    assert len(tokenizer) <= TINY.vocabulary + 256  # the alphabet of bytes comes first


def test_a_batch_is_a_function_of_the_step_with_captions_that_begin_with_the_name(task: ClipTask):
    one, two = task.draw(3), task.draw(3)
    assert one.keys() == {"source", "target", "source_theta", "target_theta", "input_ids", "attention_mask"}
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["source_theta"], task.draw(4)["source_theta"])
    assert not torch.equal(one["source_theta"], one["target_theta"])
    names = {bytes(image[:, 0, 0].tolist()): caption[0] for image, caption in zip(colour_pairs()[:, 1], captions(), strict=True)}
    for image, ids in zip(one["target"], one["input_ids"], strict=True):
        text = task.tokenizer.decode(ids, skip_special_tokens=True)
        assert text.strip().startswith(names[bytes(image[:, 0, 0].tolist())])
    assert one["input_ids"].shape == (8, 12)


def test_augmentation_moves_images_a_little_and_mirrors_half_of_them(task: ClipTask):
    theta = torch.cat([task.draw(step)["source_theta"] for step in range(40)])
    assert theta.shape == (320, 2, 3)
    mirrored = theta[:, 0, 0] < 0
    assert 0.35 < mirrored.float().mean() < 0.65
    scale = torch.linalg.det(theta[:, :, :2]).abs().sqrt()
    assert scale.min() > 0.84 and scale.max() < 1.16
    assert theta[:, :, 2].abs().max() < 0.081


def test_it_learns_which_name_belongs_to_which_picture(tmp_path: Path):
    task = make_task()
    settings = TrainSettings(
        steps=40, batch_size=8, lr=3e-3, warmup_steps=5, precision="fp32", log_every=5, save_every=100, schedule="constant"
    )
    train(task, settings, tmp_path, experiment={})
    rows = read_history(tmp_path)
    for name in ("target_text", "source_text", "source_target"):
        assert rows[-1][f"loss/{name}"] < 0.7 * rows[0][f"loss/{name}"], name


def test_transformers_opens_what_was_saved(task: ClipTask, tmp_path: Path):
    task.save(tmp_path)
    task.save(tmp_path)
    folder = tmp_path / "clip"
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    text = "a red square, red"
    assert tokenizer(text)["input_ids"] == task.tokenizer(text)["input_ids"]
    encoder = ClipImageEncoder(load_clip(tmp_path)).eval()
    assert (encoder.token_width, encoder.embedding_width, encoder.tokens) == (64, 16, 16)
    image = colour_pairs()[:2, 0]
    task.module.eval()
    with torch.no_grad():
        tokens, pooled = encoder(to_float(image))
        still = torch.eye(2, 3).expand(2, 2, 3)
        torch.testing.assert_close(F.normalize(pooled, dim=1), task.module.images(image, still), rtol=1e-4, atol=1e-5)
        pixels = processor(list(image), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(clip.get_image_features(pixels).pooler_output, pooled, rtol=1e-3, atol=1e-3)
    assert tokens.shape == (2, 16, 64)
    assert not list(tmp_path.rglob(".*"))


def test_the_sheet_shows_the_nearest_pictures(task: ClipTask, tmp_path: Path):
    task.sheet(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 7 * 96


def pairs(*names: str) -> list[Pair]:
    return [Pair(id=f"train/{name}", source=Path(name), target=Path(name)) for name in names]


def test_captions_are_the_name_then_the_keywords(tmp_path: Path):
    rows = [{"id": "a", "name": "fox", "keywords": ["fox", "animal"]}, {"id": "b", "name": "owl"}]
    (tmp_path / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_captions(tmp_path, pairs("b", "a")) == [["owl"], ["fox", "animal"]]


@pytest.mark.parametrize(
    "lines, reason",
    [
        (None, "names.jsonl is missing; CLIP learns from names: one JSON object a line with id, name and keywords"),
        ('{"id": "a", "name": "fox"}\n', "has no name for train/b and 1 more of 3 pairs"),
        ('{"id": "a", "name": "fox"}\nfox\n', "line 2 is no JSON object with id and name"),
        ('{"id": "a"}\n', "line 1 is no JSON object with id and name"),
        ('["a"]\n', "line 1 is no JSON object with id and name"),
    ],
)
def test_missing_names_are_named_in_one_line(tmp_path: Path, lines: str | None, reason: str):
    if lines is not None:
        (tmp_path / "names.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=reason) as caught:
        read_captions(tmp_path, pairs("a", "b", "c"))
    assert str(tmp_path / "names.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"width": 32}, r"model.width is 32; wanted a multiple of 64"),
        ({"text_width": 100}, r"model.text_width is 100"),
        ({"layers": 0}, r"model.layers is 0; wanted at least 1"),
        ({"image_size": 100}, r"model.image_size 100 does not divide into patches of 16"),
        ({"patch_size": 0}, r"model.patch_size is 0"),
        ({"scale_range": 1.0}, r"model.scale_range is 1.0"),
    ],
)
def test_impossible_settings_are_refused_by_name(change: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        ClipSettings(**change)
