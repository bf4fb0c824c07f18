import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdit.data.pairs import Pair, find_pairs
from clipdit.images import ImageError, fit, read_image


def drawing(seed, colour=(40, 40, 40), size=48):
    """A few rectangles in one colour on white, (H, W, 3) uint8: equal shapes for equal seeds."""
    random = np.random.default_rng(seed)
    image = np.full((size, size, 3), 255, np.uint8)
    for _ in range(4):
        top, left, height, width = random.integers(2, size // 2, 4)
        image[top : top + height, left : left + width] = colour
    return image


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def variants(tmp_path):
    """40 side-by-side drawings; those numbered 10n to 10n + 3 are one drawing in four colours."""
    colours = [(200, 20, 20), (20, 200, 20), (20, 20, 200), (90, 90, 90)]
    for number in range(40):
        seed, colour = (number // 10, colours[number % 10]) if number % 10 < 4 else (100 + number, colours[number % 4])
        save(tmp_path / f"{number:02}.png", np.concatenate([drawing(seed), drawing(seed, colour)], axis=1))
    return tmp_path


def test_halves_are_read_in_the_asked_direction(tmp_path):
    left, right = drawing(1, (255, 0, 0)), drawing(2, (0, 0, 255))
    save(tmp_path / "1.png", np.concatenate([left, right], axis=1))
    for direction, expected in (("AtoB", (left, right)), ("BtoA", (right, left))):
        (pair,) = find_pairs(tmp_path, direction=direction).pairs
        for pixels, want in zip(pair.read(), expected, strict=True):
            assert torch.equal(pixels, torch.from_numpy(want).permute(2, 0, 1)) and pixels.is_contiguous()


def test_partners_of_different_size_are_fitted_to_one(tmp_path):
    save(tmp_path / "A/1.png", drawing(1, size=64))
    save(tmp_path / "B/1.png", drawing(1, (0, 0, 255), size=32))
    (pair,) = find_pairs(tmp_path).pairs
    assert [tuple(image.shape) for image in pair.read()] == [(3, 64, 64), (3, 32, 32)]
    source, target = pair.read((16, 24))
    assert torch.equal(source, fit(read_image(pair.source), (16, 24))[0])
    assert torch.equal(target, fit(read_image(pair.target), (16, 24))[0])


def test_a_pair_survives_pickling_and_says_which_file_is_damaged(tmp_path):
    save(tmp_path / "A/1.png", drawing(1))
    save(tmp_path / "B/1.png", drawing(1))
    (pair,) = find_pairs(tmp_path).pairs
    assert pickle.loads(pickle.dumps(pair)) == pair
    pair.target.write_bytes(pair.target.read_bytes()[:-40])
    with pytest.raises(ImageError, match=r"B/1\.png: is damaged"):
        pair.read()


def test_near_duplicates_share_group_and_split(variants):
    found = find_pairs(variants)
    members = Counter(pair.group for pair in found.pairs)
    assert {group: size for group, size in members.items() if size > 1} == {"00": 4, "10": 4, "20": 4, "30": 4}
    splits = {pair.id: pair.split for pair in found.pairs}
    for ten in range(4):
        assert len({splits[f"{ten}{unit}"] for unit in range(4)}) == 1
    assert all(found.split(name) for name in ("train", "val", "test"))
    assert sum(len(found.split(name)) for name in ("train", "val", "test")) == 40


def test_the_split_is_the_same_every_time_and_in_both_directions(variants):
    splits = [(pair.id, pair.split) for pair in find_pairs(variants).pairs]
    assert splits == [(pair.id, pair.split) for pair in find_pairs(variants).pairs]
    assert splits == [(pair.id, pair.split) for pair in find_pairs(variants, direction="BtoA").pairs]


def test_without_grouping_nothing_is_read_and_every_pair_is_its_own_group(variants):
    found = find_pairs(variants, group_near_duplicates=False)
    assert found.scan is None and len({pair.group for pair in found.pairs}) == 40


def test_given_splits_are_kept_and_nothing_is_read(tmp_path):
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        for number in range(count):
            save(tmp_path / split / f"{number}.png", np.concatenate([drawing(number)] * 2, axis=1))
    found = find_pairs(tmp_path)
    assert {name: len(found.split(name)) for name in ("train", "val", "test")} == {"train": 5, "val": 2, "test": 3}
    assert found.scan is None and [pair.id for pair in found.split("val")] == ["val/0", "val/1"]


def test_train_alone_gives_val_and_test_of_its_own_with_a_note(variants):
    os.mkdir(variants / "train")
    for path in list(variants.glob("*.png")):
        path.rename(variants / "train" / path.name)
    found = find_pairs(variants)
    assert found.notes == ["only train is given: val and test are taken from it"]
    assert all(found.split(name) for name in ("train", "val", "test"))
    assert len(find_pairs(variants, val_fraction=0, test_fraction=0).split("train")) == 40


def test_groups_are_kept_in_a_file_until_an_image_changes(variants, tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "deep" / "groups.json"
    (variants / "bad.png").write_bytes((variants / "00.png").read_bytes()[:-30])
    first = find_pairs(variants, groups_file=file)
    again = find_pairs(variants, groups_file=file)
    assert first.scan is not None and again.scan is None
    assert again.pairs == first.pairs and again.problems == first.problems != []
    save(variants / "05.png", np.concatenate([drawing(7777)] * 2, axis=1))
    assert find_pairs(variants, groups_file=file).scan is not None
    file.write_text("{}")
    with pytest.raises(ValueError, match="is no file of groups"):
        find_pairs(variants, groups_file=file)


def test_manifest_rows_that_share_a_file_or_group_stay_together(tmp_path):
    rows = ["source,target,group"]
    for number in range(30):
        save(tmp_path / f"s{number}.png", drawing(number))
        save(tmp_path / f"t{number}.png", drawing(number, (0, 0, 250)))
        rows.append(f"s{number}.png,t{number}.png,{'odd' if number in (3, 21) else ''}")
        rows.append(f"s{number}.png,t{(number + 1) % 30 if number < 2 else number}.png,")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    found = find_pairs(tmp_path)
    assert found.layout == "manifest" and len(found.pairs) == 60
    sources: dict[str, set[str]] = {}
    for pair in found.pairs:
        sources.setdefault(pair.group, set()).add(pair.source.stem)
    assert {"s0", "s1", "s2"} in sources.values() and {"s3", "s21"} in sources.values() and len(sources) == 27


def test_a_manifest_that_leaks_says_so(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png", drawing(ord(name)))
    (tmp_path / "m.csv").write_text("source,target,split\na.png,b.png,train\na.png,c.png,test\nc.png,c.png,\n")
    found = find_pairs(tmp_path / "m.csv")
    assert [pair.split for pair in found.pairs] == ["train", "test", "train"]
    assert found.notes == [
        "1 pairs without a split, among others with one, are taken as train",
        "1 groups (equal files, or the same group given) are in more than one split",
    ]


def test_progress_counts_every_pair(variants):
    seen = []
    find_pairs(variants, on_pair=lambda done, of: seen.append((done, of)))
    assert seen == [(done, 40) for done in range(1, 41)]


def test_an_interrupted_scan_stops(variants):
    def interrupt(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_pairs(variants, on_pair=interrupt)


def test_wrong_folders_and_options_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for path, reason in ((tmp_path / "none", "does not exist"), (tmp_path / "a.txt", "is a file; wanted a folder of pairs")):
        with pytest.raises(ValueError, match=reason):
            find_pairs(path)
    for name in ("manifest.csv", "manifest.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"has both manifest\.csv and manifest\.jsonl"):
        find_pairs(tmp_path)


def test_pairs_are_small():
    pair = Pair(id="train/1", source=Path("/data/A/1.png"), target=Path("/data/B/1.png"), split="train", group="train/1")
    assert len(pickle.dumps(pair)) < 500
