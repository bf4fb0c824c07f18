"""A folder as one file: the same bytes each time, opened like the folder, and refused when it is damaged or means harm."""

import zipfile
from pathlib import Path

import pytest
import torch

from clipdit.archives import pack, unpacked
from clipdit.backend import locate
from clipdit.testing import tiny_checkpoint
from clipdit.translator import Translator

SOURCE = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_checkpoint_in_a_zip_file_opens_like_its_folder(tmp_path: Path):
    folder = tiny_checkpoint(tmp_path / "model")
    pack(folder, tmp_path / "model.zip")
    there, here = Translator.open(tmp_path / "model.zip"), Translator.open(folder)
    assert torch.equal(there(SOURCE, seeds=[1]), here(SOURCE, seeds=[1]))


def test_it_is_unpacked_once_and_another_one_elsewhere(tmp_path: Path):
    for name, content in (("a", b"1"), ("b", b"2")):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_bytes(content)
        pack(tmp_path / name, tmp_path / f"{name}.zip")
    first = locate(str(tmp_path / "a.zip"))
    at = (Path(first) / "sub" / "file").stat().st_mtime_ns
    assert locate(str(tmp_path / "a.zip")) == first and (Path(first) / "sub" / "file").stat().st_mtime_ns == at
    assert (unpacked(tmp_path / "b.zip") / "sub" / "file").read_bytes() == b"2"


def test_the_same_files_are_the_same_archive(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"1" * 1000)
    pack(tmp_path / "a", tmp_path / "one.zip")
    (tmp_path / "a" / "file").touch()
    pack(tmp_path / "a", tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_a_damaged_archive_is_refused_in_a_line_and_leaves_nothing(tmp_path: Path, cache: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"1" * 1000)
    pack(tmp_path / "a", tmp_path / "a.zip")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[100] ^= 1  # of the file's content
    for damage in (bytes(data), bytes(data[:-30]), b"no zip"):
        (tmp_path / "bad.zip").write_bytes(damage)
        with pytest.raises(ValueError, match=r"bad\.zip cannot be unpacked: .*; wanted a \.zip file of a checkpoint or bundle"):
            unpacked(tmp_path / "bad.zip")
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_an_archive_that_would_write_outside_is_not_unpacked(name: str, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr(name, "x")
    with pytest.raises(ValueError, match="which is outside of its folder; it is not unpacked"):
        unpacked(tmp_path / "evil.zip")
    assert not list(tmp_path.rglob("evil"))
