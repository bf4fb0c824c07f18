"""Evaluation: every kind of metric, floors beside the model, each failure under its name, the same seeds every time."""

import dataclasses
import json
import math

import pytest
import torch

from clipdit.evaluate import SEED_STRIDE, Evaluator, PairImages, choose, evaluate, read_pairs
from clipdit.evaluation_report import as_dict, row_dict, sheet, table
from clipdit.images import ImageError
from clipdit.metrics.judges import Judges

SIZE = 64
NO_NETWORKS = Judges(features=None, perceptual={}, missing={"efficientnet_lite0": "left out", "st_lpips_alex": "left out"})


@dataclasses.dataclass(frozen=True)
class MemoryPair:
    id: str
    source: torch.Tensor
    target: torch.Tensor

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.source, self.target


class BrokenPair:
    id = "broken"

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise ImageError("broken.png is cut off")


def shape_pair(i: int) -> MemoryPair:
    """The outline of a box -> the box, filled with a colour."""
    random = torch.Generator().manual_seed(i)
    top, left = torch.randint(4, 28, (2,), generator=random).tolist()
    height, width = torch.randint(14, 32, (2,), generator=random).tolist()
    target = torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8)
    colour = torch.randint(0, 150, (3,), generator=random, dtype=torch.uint8)
    colour[i % 3] = 230
    target[:, top : top + height, left : left + width] = colour[:, None, None]
    source = torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8)
    source[:, top : top + height, left : left + width] = 0
    source[:, top + 1 : top + height - 1, left + 1 : left + width - 1] = 255
    return MemoryPair(f"box {i}", source, target)


PAIRS = [shape_pair(i) for i in range(12)]
TARGETS = {pair.source.numpy().tobytes(): pair.target for pair in PAIRS}


def near_target(source_u8: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    """The true target with noise of its seed."""
    outputs = []
    for source, seed in zip(source_u8, seeds, strict=True):
        noise = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * (1 + seed // SEED_STRIDE)
        outputs.append((TARGETS[source.numpy().tobytes()] + noise).round().clamp(0, 255).to(torch.uint8))
    return torch.stack(outputs)


@pytest.fixture(scope="module")
def judged():
    """With the networks that come in packages; 6 pairs, 3 seeds."""
    return evaluate(near_target, PAIRS[:6], size=(SIZE, SIZE), training=PAIRS[6:], samples=3)


@pytest.fixture(scope="module")
def report(judged) -> dict:
    return json.loads(json.dumps(as_dict(judged), allow_nan=False))


def test_the_report_is_complete(report):
    assert report["format"] == "clipdit-evaluation-1"
    assert {"date", "command", "versions", "hardware", "protocol", "networks", "missing", "warnings", "rows", "seconds"} <= set(
        report
    )
    assert report["protocol"] == {
        "pairs": 6,
        "size_px": [SIZE, SIZE],
        "samples_per_source": 3,
        "first_seed": 0,
        "seed_rule": f"sample k of source i: first_seed + k * {SEED_STRIDE} + i",
        "sources_are_drawings": True,
        "faithfulness": "edges",
        "edge_tolerance_px": 1,
        "training_targets": 6,
    }
    assert set(report["rows"]) == {"model", "copy_source", "mean_target", "real"}
    model = report["rows"]["model"]
    assert set(model["realism"]) == {"kid_efficientnet_lite0", "fd_efficientnet_lite0"}
    assert set(model["faithfulness"]) == {"edge_precision", "edge_recall", "edge_f1", "edge_f1_other_source"}
    assert {"psnr_db", "ssim", "st_lpips_alex"} <= set(model["distance_to_target"])
    assert set(model["distance_to_target"]["st_lpips_alex"]) == {"mean", "best"}
    assert model["diversity"]["pairwise_st_lpips_alex"] > 0
    assert [image["id"] for image in report["by_image"]] == [f"box {i}" for i in range(6)]


def test_the_model_beats_the_floors_where_it_should(report):
    rows = report["rows"]
    distance = {name: row["distance_to_target"] for name, row in rows.items() if name != "real"}
    for floor in ("copy_source", "mean_target"):
        assert distance["model"]["psnr_db"]["mean"] > distance[floor]["psnr_db"]["mean"] + 10
        assert distance["model"]["st_lpips_alex"]["mean"] < distance[floor]["st_lpips_alex"]["mean"] / 2
        kid = {name: rows[name]["realism"]["kid_efficientnet_lite0"]["mean"] for name in ("model", floor)}
        assert kid["model"] < kid[floor]
    assert rows["copy_source"]["faithfulness"]["edge_f1"] == 1
    assert rows["mean_target"]["faithfulness"]["edge_f1"] < 0.6
    assert rows["real"]["faithfulness"]["edge_f1"] == 1
    assert "distance_to_target" not in rows["real"]


def test_best_is_the_best_sample_and_mean_the_mean_of_all(judged, report):
    row, distance = judged.rows["model"], report["rows"]["model"]["distance_to_target"]
    assert row.values["psnr_db"].shape == (6, 3)
    assert distance["psnr_db"]["mean"] == pytest.approx(row.values["psnr_db"].mean().item(), rel=1e-4)
    assert distance["psnr_db"]["best"] == pytest.approx(row.values["psnr_db"][:, 0].mean().item(), rel=1e-4)  # the least noise
    assert distance["st_lpips_alex"]["best"] < distance["st_lpips_alex"]["mean"]


def test_diversity_is_the_mean_distance_of_all_pairs_of_samples(judged):
    distance = judged.evaluator.judges.perceptual["st_lpips_alex"]
    source = PAIRS[0].source[None]
    outputs = [near_target(source, [k * SEED_STRIDE]).float() / 127.5 - 1 for k in range(3)]
    with torch.no_grad():
        pairs = [distance(outputs[a], outputs[b]).item() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert judged.rows["model"].values["pairwise_st_lpips_alex"][0].item() == pytest.approx(sum(pairs) / 3, rel=1e-3)


def test_seeds_do_not_depend_on_batches_or_on_the_number_of_samples():
    asked: list[list[int]] = []

    def recording(source_u8: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        asked.append(seeds)
        return near_target(source_u8, seeds)

    def scores(batch_size: int, samples: int) -> torch.Tensor:
        evaluator = Evaluator(read_pairs(PAIRS[:5], (SIZE, SIZE)), NO_NETWORKS)
        found = evaluator.run(recording, samples=samples, first_seed=7, batch_size=batch_size)
        return found.rows["model"].values["psnr_db"]

    few, many = scores(2, 1), scores(5, 2)
    assert torch.equal(few[:, 0], many[:, 0])
    assert asked == [[7, 8], [9, 10], [11], [7, 8, 9, 10, 11], [i + 7 + SEED_STRIDE for i in range(5)]]


SPOILED = {
    "black": lambda source, seeds: source * 0,
    "near_constant": lambda source, seeds: source * 0 + 128,
    "blurred": lambda source, seeds: torch.nn.functional.avg_pool2d(near_target(source, seeds).float(), 15, 1, 7).to(torch.uint8),
    "ignored_source": lambda source, seeds: near_target(PAIRS[11].source[None], [1]).expand_as(source),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_failing_model_is_told_so(kind):
    found = evaluate(SPOILED[kind], PAIRS[:10], size=(SIZE, SIZE), training=PAIRS[10:], judges=NO_NETWORKS, samples=2)
    counts = row_dict(found, "model")["failures"]
    assert counts["of"] == 20
    # one box may by chance lie like another: ignoring the source is counted in most cases, not in all
    assert counts[kind] >= (10 if kind == "ignored_source" else 20)
    assert as_dict(found)["warnings"]
    good = evaluate(near_target, PAIRS[:10], size=(SIZE, SIZE), training=PAIRS[10:], judges=NO_NETWORKS, samples=2)
    assert row_dict(good, "model")["failures"][kind] == 0


def test_what_cannot_be_measured_is_named_and_left_out():
    found = as_dict(evaluate(near_target, PAIRS[:4], size=(SIZE, SIZE), judges=NO_NETWORKS, samples=1))
    assert found["missing"]["kid_efficientnet_lite0"] == found["missing"]["fd_efficientnet_lite0"] == "left out"
    assert found["missing"]["st_lpips_alex"] == "left out"
    assert "realism" not in found["rows"]["model"]
    assert set(found["rows"]["model"]["distance_to_target"]) == {"psnr_db", "ssim"}
    assert "nan" not in json.dumps(found).lower().replace("nano", "")


def test_pictures_that_are_no_drawings_are_compared_by_clip():
    def encoder(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.nn.functional.adaptive_avg_pool2d(image, 4).flatten(2).transpose(1, 2)
        return tokens, tokens.flatten(1)

    judges = dataclasses.replace(NO_NETWORKS, clip=encoder, networks={"clip_similarity": "means of blocks"})
    swapped = [MemoryPair(pair.id, pair.target, pair.source) for pair in PAIRS[:6]]
    found = evaluate(lambda source, seeds: source, swapped, size=(SIZE, SIZE), judges=judges, samples=1)
    rows = as_dict(found)["rows"]
    assert found.evaluator.faithfulness == "clip"
    assert rows["model"]["faithfulness"] == {"clip_similarity_to_source": pytest.approx(1)}
    sources, targets = (torch.stack(images) / 127.5 - 1 for images in zip(*(pair.read() for pair in swapped), strict=True))
    wanted = torch.nn.functional.cosine_similarity(encoder(sources)[1], encoder(targets)[1])
    similarity = rows["model"]["distance_to_target"]["clip_similarity_to_target"]["mean"]
    assert similarity == pytest.approx(float(wanted.mean()), rel=1e-3)
    assert rows["real"]["faithfulness"]["clip_similarity_to_source"] == pytest.approx(similarity, rel=1e-3)


def test_floors_need_no_model_and_one_pair_is_enough():
    found = evaluate(None, PAIRS[:1], size=(SIZE, SIZE), judges=NO_NETWORKS)
    report = json.loads(json.dumps(as_dict(found), allow_nan=False))
    assert list(report["rows"]) == ["copy_source", "mean_target", "real"]
    assert report["by_image"] == []
    assert "model" not in table(found)
    assert sheet(found).shape[0] == 3


def test_the_autoencoder_of_a_model_is_judged_by_the_real_targets():
    evaluator = Evaluator(read_pairs(PAIRS[:4], (SIZE, SIZE)), NO_NETWORKS)
    exact = as_dict(evaluator.run(None, autoencode=lambda targets: targets.clone()))
    assert list(exact["rows"]) == ["autoencoded", "copy_source", "mean_target", "real"]
    assert exact["rows"]["autoencoded"]["distance_to_target"]["psnr_db"]["mean"] == 100
    assert exact["rows"]["autoencoded"]["hues"]
    assert not any("autoencoder" in line for line in exact["warnings"])


def test_an_autoencoder_that_turns_colours_is_warned_of():
    targets = torch.full((2, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    targets[:, :, 16:48, 16:48] = torch.tensor([0, 190, 80], dtype=torch.uint8)[:, None, None]
    pairs = PairImages(ids=["a", "b"], sources=targets.clone(), targets=targets)
    blue = targets[:, [0, 2, 1]]
    warned = as_dict(Evaluator(pairs, NO_NETWORKS).run(None, autoencode=lambda _: blue))["warnings"]
    assert any("does not keep the targets' colours: green comes back blue" in line for line in warned)


def test_unreadable_pairs_are_named_and_the_rest_goes_on():
    found = evaluate(near_target, [BrokenPair(), *PAIRS[:3]], size=(SIZE, SIZE), judges=NO_NETWORKS, samples=1)
    assert as_dict(found)["problems"] == {"broken": "broken.png is cut off"}
    assert found.evaluator.pairs.ids == ["box 0", "box 1", "box 2"]
    with pytest.raises(ValueError, match="none of 1 pairs can be read"):
        read_pairs([BrokenPair()], (SIZE, SIZE))


def test_outputs_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"of shape \(3, 1, 3, 32, 32\); wanted uint8 of shape \(3, S, 3, 64, 64\)"):
        evaluate(lambda s, _: s[..., :32, :32], PAIRS[:3], size=(SIZE, SIZE), judges=NO_NETWORKS, samples=1)
    with pytest.raises(ValueError, match="wanted at least 1"):
        evaluate(near_target, PAIRS[:3], size=(SIZE, SIZE), judges=NO_NETWORKS, samples=0)


def test_a_choice_is_the_beginning_of_a_larger_one():
    assert choose(PAIRS, 3) == choose(PAIRS, 7)[:3]
    assert sorted(pair.id for pair in choose(PAIRS, None)) == sorted(pair.id for pair in PAIRS)


def test_the_table_shows_every_row_and_the_sheet_every_column(judged):
    lines = table(judged).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["model", "copy_source", "mean_target", "real"]
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 130
    assert list(judged.examples) == ["output", "seed 2", "seed 3"]
    picture = sheet(judged, title="boxes")
    assert picture.dtype == torch.uint8
    assert picture.shape[2] > 5 * 128


def test_numbers_that_are_not_finite_become_null():
    images = PairImages(ids=["a"], sources=PAIRS[0].source[None], targets=PAIRS[0].target[None])
    found = Evaluator(images, NO_NETWORKS).run(near_target, samples=1)
    assert math.isnan(found.rows["model"].values["edge_f1_other_source"].item())
    assert as_dict(found)["rows"]["model"]["faithfulness"]["edge_f1_other_source"] is None
    assert row_dict(found, "model")["failures"]["ignored_source"] == 0
