"""Files are whole or absent, whatever happens while they are written."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipdit.files import clear_leftovers, replace_file, replace_folder_contents, write_atomically


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_written_with_its_folders_and_readable_by_others(tmp_path: Path):
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "a" / "b.txt", "Ä")
        write_atomically(tmp_path / "a" / "b.txt", b"second", durable=True)
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"second"
    assert (tmp_path / "a" / "b.txt").stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == {"a/b.txt"}


def test_a_file_that_a_library_made_private_is_opened_to_others(tmp_path: Path):
    def private(path: Path) -> None:
        path.touch(mode=0o600)

    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "file", private)
        replace_folder_contents(tmp_path, lambda folder: ((folder / "b").mkdir(), private(folder / "b" / "file")), last="x")
    finally:
        assert os.umask(before) == 0o027
    for file in (tmp_path / "file", tmp_path / "b" / "file"):
        assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [RuntimeError("ours"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException):
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    write_atomically(tmp_path / "file", "old")
    with pytest.raises(type(error)):
        replace_file(tmp_path / "file", write)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_an_error_of_the_disk_names_the_file_that_was_wanted(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_atomically(tmp_path / "taken", "x")
    assert caught.value.filename == str(tmp_path / "taken")
    assert names(tmp_path) == set()

    def write(temporary: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught:
        replace_file(tmp_path / "file", write)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "file"))


def test_a_kill_while_writing_leaves_the_old_file_and_what_the_next_start_removes(tmp_path: Path):
    write_atomically(tmp_path / "run" / "file", "old")
    code = """
import os, signal, sys
from pathlib import Path
from clipdit.files import replace_file
def write(path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
replace_file(Path(sys.argv[1]), write)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run" / "file"])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "file").read_text() == "old"
    assert len(names(tmp_path)) == 2
    (tmp_path / "run" / ".contents.part").mkdir()
    clear_leftovers(tmp_path / "run")
    assert names(tmp_path) == {"run/file"}
    assert not (tmp_path / "run" / ".contents.part").exists()


def test_a_file_too_large_for_the_disk_leaves_the_old_one(tmp_path: Path):
    code = """
import resource, sys
from pathlib import Path
from clipdit.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_atomically(Path(sys.argv[1]), b"x" * 999)
try:
    write_atomically(Path(sys.argv[1]), b"y" * 1001)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], capture_output=True, text=True)
    assert done.stdout == f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{tmp_path / 'file'}'\n"
    assert (tmp_path / "file").read_bytes() == b"x" * 999
    assert names(tmp_path) == {"file"}


def test_a_folders_contents_are_moved_in_with_the_last_one_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    moved = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), real(a, b)))

    def write(folder: Path) -> None:
        write_names = {"index": "1", "a/x": "2", "zebra": "3"}
        for name, text in write_names.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("of a killed process")
    (tmp_path / "kept").write_text("0")
    replace_folder_contents(tmp_path, write, last="index")
    assert moved[-1] == "index"
    assert names(tmp_path) == {"index", "a/x", "zebra", "kept"}
    assert not list(tmp_path.glob(".*"))


def test_a_folders_contents_that_cannot_be_written_change_nothing(tmp_path: Path):
    def write(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError) as caught:
        replace_folder_contents(tmp_path, write, last="a")
    assert caught.value.filename == str(tmp_path)
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}
