import numpy as np
import pytest
from PIL import Image

from clipdit.data.folders import find_layout


def write(folder, *names, size=(64, 32)):
    """Images of (width, height) at these paths below folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path)


def described(folder, direction="AtoB"):
    """id -> (source, target, half, split) of what is found, paths relative to folder."""
    layout = find_layout(folder, direction)
    return layout.name, {
        pair.id: (str(pair.source.relative_to(folder)), str(pair.target.relative_to(folder)), pair.source_half, pair.split)
        for pair in layout.pairs
    }


def test_side_by_side_in_either_direction(tmp_path):
    write(tmp_path, "1_AB.jpg", "2_AB.jpg")
    assert described(tmp_path) == (
        "side-by-side",
        {"1_AB": ("1_AB.jpg", "1_AB.jpg", "left", ""), "2_AB": ("2_AB.jpg", "2_AB.jpg", "left", "")},
    )
    assert described(tmp_path, "BtoA")[1]["1_AB"][2] == "right"


def test_side_by_side_in_split_folders(tmp_path):
    write(tmp_path, "train/1.png", "val/1.png", "Testing/1.png")
    name, pairs = described(tmp_path)
    assert name == "side-by-side" and {id: pair[3] for id, pair in pairs.items()} == {
        "train/1": "train",
        "val/1": "val",
        "test/1": "test",
    }


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("A", "B"),
        ("a", "b"),
        ("source", "target"),
        ("input", "output"),
        ("face", "comics"),
        ("edges", "photos"),
        ("photos", "comics"),
        ("labels", "images"),
        ("sketch", "anything"),
        ("anything", "comics"),
        ("data/A", "data/B"),
    ],
)
def test_folder_names_say_which_is_the_source(tmp_path, source, target):
    write(tmp_path, f"{source}/7.png", f"{target}/7.jpg")
    name, pairs = described(tmp_path)
    assert name == "two-folders"
    assert list(pairs.values()) == [(f"{source}/7.png", f"{target}/7.jpg", None, "")]
    swapped = described(tmp_path, "BtoA")[1]
    assert list(swapped.values()) == [(f"{target}/7.jpg", f"{source}/7.png", None, "")] and list(swapped) == list(pairs)


@pytest.mark.parametrize(
    "pattern",
    [
        "{split}{AB}/{name}",
        "{split}_{AB}/{name}",
        "{split}-{AB}/{name}",
        "{AB}/{split}/{name}",
        "{split}/{AB}/{name}",
        "set/{split}/{AB}/{name}",
    ],
)
def test_two_folders_nest_with_splits_in_every_order(tmp_path, pattern):
    for split, name in (("train", "1.png"), ("train", "2.png"), ("val", "1.png"), ("test", "1.png")):
        write(tmp_path, *(pattern.format(split=split, AB=side, name=name) for side in "AB"), size=(32, 32))
    name, pairs = described(tmp_path)
    prefix = "set/" if pattern.startswith("set") else ""  # a folder that all have in common
    assert name == "two-folders"
    assert {id.replace(prefix, ""): split for id, (*_, split) in pairs.items()} == {
        "train/1": "train",
        "train/2": "train",
        "val/1": "val",
        "test/1": "test",
    }
    for source, target, *_ in pairs.values():
        assert source == target.replace("B/", "A/") and "A/" in source


def test_pix2pixhd_label_and_img(tmp_path):
    write(tmp_path, "train_img/1.jpg", "train_label/1.png", "test_label/2.png", "test_img/2.jpg")
    assert described(tmp_path)[1] == {
        "train/1": ("train_label/1.png", "train_img/1.jpg", None, "train"),
        "test/2": ("test_label/2.png", "test_img/2.jpg", None, "test"),
    }


def test_names_that_do_not_say_are_taken_in_alphabetical_order_with_a_note(tmp_path):
    write(tmp_path, "winter/1.png", "summer/1.png", size=(32, 32))
    layout = find_layout(tmp_path, "AtoB")
    assert layout.pairs[0].source == tmp_path / "summer/1.png"
    assert "summer/ is taken as source" in layout.notes[0] and "BtoA" in layout.notes[0]
    assert find_layout(tmp_path, "BtoA").pairs[0].source == tmp_path / "winter/1.png"


def test_classes_of_side_by_side_images_are_not_sides(tmp_path):
    write(tmp_path, "boots/1.png", "sandals/1.png", size=(64, 32))
    name, pairs = described(tmp_path)
    assert name == "side-by-side" and sorted(pairs) == ["boots/1", "sandals/1"]


def test_a_third_folder_is_passed_over_with_a_note(tmp_path):
    write(tmp_path, "source/1.png", "source/2.png", "target/1.png", "mask/1.png", "mask/2.png", "overview.png")
    layout = find_layout(tmp_path, "AtoB")
    assert [pair.id for pair in layout.pairs] == ["1"]
    assert [str(problem) for problem in layout.problems] == [f"{tmp_path}/source/2.png: has no partner 2.* in target/"]
    assert any("3 images in neither source/ nor target/" in note for note in layout.notes)


def test_ambiguous_folders_are_refused_by_name(tmp_path):
    write(tmp_path, "x/1.png", "y/1.png", "z/1.png", size=(32, 32))
    with pytest.raises(ValueError, match="which two of the folders x, y, z belong together"):
        find_layout(tmp_path, "AtoB")


def test_every_file_without_a_usable_partner_is_named(tmp_path):
    write(tmp_path, "A/1.png", "B/1.png", "A/alone.png", "B/lonely.jpg", "A/double.png", "A/double.jpg", "B/double.png")
    write(tmp_path, "A/shape.png", size=(64, 32))
    write(tmp_path, "B/shape.png", size=(64, 48))
    write(tmp_path, "A/larger.png", size=(128, 64))
    write(tmp_path, "B/larger.png", size=(64, 32))
    (tmp_path / "A/broken.png").write_bytes(b"")
    write(tmp_path, "B/broken.png")
    (tmp_path / "notes.txt").write_text("no image")
    layout = find_layout(tmp_path, "AtoB")
    assert [pair.id for pair in layout.pairs] == ["1", "larger"]
    reasons = {str(problem.path.relative_to(tmp_path)): problem.reason for problem in layout.problems}
    double = "cannot be paired: double.jpg and double.png in one folder have the same name but for the suffix. Keep one"
    assert reasons == {
        "A/alone.png": "has no partner alone.* in B/",
        "B/lonely.jpg": "has no partner lonely.* in A/",
        "A/double.png": double,
        "A/double.jpg": double,
        "B/double.png": double,
        "B/shape.png": "is 64 x 48, its source 64 x 32; wanted equal aspects, within 1 %",
        "A/broken.png": "is empty (0 bytes)",
    }
    assert "1 files that are no images were passed over: notes.txt" in layout.notes


def test_stray_and_odd_shapes_among_side_by_side_images_are_named(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(30)))
    write(tmp_path, "stray.png", size=(32, 32))
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    layout = find_layout(tmp_path, "AtoB")
    assert len(layout.pairs) == 30
    assert {problem.path.name: problem.reason.split(";")[0] for problem in layout.problems} == {
        "stray.png": "is 32 x 32",
        "cut.png": "is damaged or of a rare kind: its first bytes say image, the rest does not follow",
    }


def test_halves_that_are_not_square_are_taken_with_a_note_and_odd_widths_named(tmp_path):
    write(tmp_path, "1.png", "2.png", size=(160, 60))
    write(tmp_path, "odd.png", size=(161, 60))
    layout = find_layout(tmp_path, "AtoB")
    assert [pair.id for pair in layout.pairs] == ["1", "2"] and "look at some" in layout.notes[0]
    assert layout.problems[0].reason == "is 161 x 60; a side-by-side image must have an even width"


def test_single_pictures_are_refused_rather_than_cut_in_two(tmp_path):
    write(tmp_path, "trainA/1.png", "trainB/2.png", size=(32, 32))
    with pytest.raises(ValueError, match="is 32 x 32, a single picture, and no two folders here share file names"):
        find_layout(tmp_path, "AtoB")


def test_equal_names_with_other_suffix_are_two_side_by_side_pairs(tmp_path):
    write(tmp_path, "1.png", "1.jpg", "2.png")
    assert sorted(described(tmp_path)[1]) == ["1.jpg", "1.png", "2"]


def test_what_systems_leave_behind_is_no_data_and_links_are_followed_once(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write(data, "A/1.png", ".hidden/2.png", "A/._1.png", "__MACOSX/A/1.png")
    write(elsewhere, "1.png")
    (data / "B").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(data)
    layout = find_layout(data, "AtoB")
    assert [pair.id for pair in layout.pairs] == ["1"] and not layout.problems


def test_no_images_at_all(tmp_path):
    (tmp_path / "README.md").write_text("empty")
    with pytest.raises(ValueError, match="holds no images; wanted side-by-side images, two folders"):
        find_layout(tmp_path, "AtoB")
