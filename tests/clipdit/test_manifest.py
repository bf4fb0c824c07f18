import json
import shutil

import numpy as np
import pytest
from PIL import Image

from clipdit.data.manifest import read_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b", "c, d"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


def test_csv_with_all_columns(folder):
    path = folder / "pairs.csv"
    path.write_text(
        "id,source,target,split,group\n"
        "first,pictures/a.png,pictures/b.png,Train,g1\n"
        'second,"pictures/c, d.png",pictures/a.png,validation,g2\n'
    )
    layout = read_manifest(path, "AtoB")
    assert [(p.id, p.source.name, p.target.name, p.split, p.group) for p in layout.pairs] == [
        ("first", "a.png", "b.png", "train", "g1"),
        ("second", "c, d.png", "a.png", "val", "g2"),
    ]
    assert [(p.id, p.source.name) for p in read_manifest(path, "BtoA").pairs] == [("first", "b.png"), ("second", "a.png")]


def test_jsonl_and_csv_say_the_same(folder):
    rows = [
        {"source": "pictures/a.png", "target": "pictures/b.png"},
        {"source": str(folder / "pictures/b.png"), "target": "pictures/a.png"},
    ]
    (folder / "pairs.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    (folder / "pairs.csv").write_text(
        "Source, Target\n" + "".join(f"{row['source']}, {row['target']}\n" for row in rows), "utf-8-sig"
    )
    assert read_manifest(folder / "pairs.jsonl", "AtoB").pairs == read_manifest(folder / "pairs.csv", "AtoB").pairs


def test_paths_written_on_windows_are_understood(folder):
    (folder / "pairs.csv").write_text("source,target\npictures\\a.png,pictures\\b.png\n")
    (pair,) = read_manifest(folder / "pairs.csv", "AtoB").pairs
    assert (pair.id, pair.source) == ("pictures/a", folder / "pictures/a.png")


def test_ids_of_absolute_paths_begin_below_what_they_share(folder):
    """So they neither change with the machine nor tell its folders to whoever reads a report."""
    shutil.copytree(folder / "pictures", folder / "others")
    sources = folder / "pictures/a.png", folder / "others/a.png", "pictures/b.png"
    (folder / "pairs.csv").write_text("source,target\n" + "".join(f"{source},pictures/b.png\n" for source in sources))
    assert [pair.id for pair in read_manifest(folder / "pairs.csv", "AtoB").pairs] == ["pictures/a", "others/a", "pictures/b"]


def test_one_source_with_two_targets_gives_two_ids(folder):
    (folder / "pairs.csv").write_text("source,target\npictures/a.png,pictures/b.png\npictures/a.png,pictures/a.png\n")
    assert [pair.id for pair in read_manifest(folder / "pairs.csv", "AtoB").pairs] == ["pictures/a-line2", "pictures/a-line3"]


def test_rows_that_cannot_be_used_are_named_by_line(folder):
    csv, jsonl = folder / "pairs.csv", folder / "pairs.jsonl"
    csv.write_text(
        "source,target,split\n"
        "pictures/a.png,pictures/b.png,\n"
        "pictures/a.png,,\n"
        "pictures/a.png,pictures/gone.png,\n"
        "pictures/a.png,pictures/b.png,later\n"
        "pictures/c, d.png,pictures/a.png,train\n"
    )
    layout = read_manifest(csv, "AtoB")
    assert len(layout.pairs) == 1
    assert {str(problem) for problem in layout.problems} == {
        f"{csv}: line 3: has no target",
        f"{folder}/pictures/gone.png: does not exist",
        f'{csv}: line 5: split is "later"; wanted train, val or test',
        f"{csv}: line 6: has more than 3 fields; quote paths that hold commas",
    }
    jsonl.write_text('{"source": \n["a", "b"]\n{"source": "pictures/a.png", "target": "pictures/b.png"}\n')
    layout = read_manifest(jsonl, "AtoB")
    assert len(layout.pairs) == 1
    assert [problem.reason for problem in layout.problems] == [
        "line 1: is no JSON (Expecting value)",
        "line 2: is list; wanted an object with source and target",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"picture,label\na.png,7\n", "has the columns picture, label; wanted source and target"),
        (b"", "has the columns nothing"),
        (b"source,target\n", "names no pairs"),
        (b"source,target\n\xff\xfe\n", "is not UTF-8 text"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, content, reason):
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_manifest(tmp_path / "pairs.csv", "AtoB")
