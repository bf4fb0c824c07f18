import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdit.commands.data_check import check
from clipdit.data.check import check_folder
from clipdit.data.pairs import find_pairs
from clipdit.images import ImageError, image_size


def write(path, seed, size=(64, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def good(tmp_path):
    for number in range(6):
        write(tmp_path / f"{number}.png", number)
    write(tmp_path / "5b.png", 5)  # an exact copy
    return tmp_path


def test_a_good_folder_passes(good, capsys):
    assert check(good) == 0
    out = capsys.readouterr().out
    assert f"{good}: side-by-side, AtoB" in out
    assert "7 usable, 0 problems" in out and "6; 2 pairs have a near-duplicate" in out and "32 x 32 (7)" in out


def test_json_says_the_same_and_nothing_else_is_on_stdout(good, capsys):
    assert check(good, json=True, direction="BtoA") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pairs"] == 7 and report["groups"] == 6 and report["direction"] == "BtoA" and report["problems"] == []
    assert sum(report["splits"].values()) == 7 and set(report["splits"]) == {"train", "val", "test"}


def test_broken_files_are_named_and_the_rest_is_usable(good, capsys):
    (good / "cut.png").write_bytes((good / "1.png").read_bytes()[:-50])
    assert check(good) == 3
    out = capsys.readouterr().out
    assert "cut.png: is damaged: image file is truncated" in out and "7 usable, 1 problems" in out


def test_nothing_usable_is_exit_code_2_with_the_reasons(tmp_path, capsys):
    for side in "AB":
        write(tmp_path / side / "1.png", 0)
    (tmp_path / "B/1.png").write_bytes(b"")
    assert check(tmp_path) == 2
    captured = capsys.readouterr()
    assert "B/1.png: is empty (0 bytes)" in captured.out and "has no usable pair" in captured.err


def test_given_splits_are_counted(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for number in range(count):
            write(tmp_path / split / f"{number}.png", number)
    report = check_folder(tmp_path)
    assert report.splits == {"train": 3, "val": 0, "test": 2} and report.exit_code == 0


def test_every_odd_file_is_usable_or_named_with_its_reason_and_none_is_lost(odd_images, tmp_path):
    manifest = tmp_path / "manifest.csv"
    with manifest.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["source", "target", "id"])
        writer.writerows([odd_images.folder / name, odd_images.folder / name, name] for name in odd_images.expected)
    report = check_folder(manifest)
    fine = {name for name, outcome in odd_images.expected.items() if outcome == "ok"}
    reasons = {problem["path"].rsplit("/", 1)[-1]: problem["reason"] for problem in report.problems}
    assert report.exit_code == 3
    assert report.pairs == len(fine) and report.pairs + len(report.problems) == len(odd_images.expected) >= 80
    assert set(reasons) == set(odd_images.expected) - fine
    assert all(odd_images.expected[name] in reason for name, reason in reasons.items())
    assert all("\n" not in line for line in report.lines())
    converted = {path.rsplit("/", 1)[-1] for path in report.conversions["16 bits reduced to 8"]}
    assert converted == {"grey16.png", "grey16.tif", "int32.tif"}


def test_odd_files_as_one_side_of_a_folder_are_all_accounted_for(odd_images, tmp_path):
    """As users have them: a folder of sources, a folder of targets."""
    (tmp_path / "A").symlink_to(odd_images.folder)
    for name in odd_images.expected:
        try:
            height, width = image_size(odd_images.folder / name)
        except ImageError:
            height, width = 8, 8
        write(tmp_path / "B" / Path(name).with_suffix(".png"), 1, (width, height))
    found = find_pairs(tmp_path, read_pixels=True)
    usable = {pair.source.name for pair in found.pairs}
    named = {problem.path.name for problem in found.problems if problem.path.parent.name == "A"}
    assert found.layout == "two-folders" and not usable & named
    assert usable | named == set(odd_images.expected)
    assert {name for name, outcome in odd_images.expected.items() if outcome != "ok"} <= named
