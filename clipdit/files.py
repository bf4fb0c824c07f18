"""Files that are whole or absent: one sees the old file, no file or the new one, also after a kill or on a full disk.

What a killed process was writing stays behind under a hidden name that ends in `.part`; `clear_leftovers` removes it.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_home() -> Path:
    """Where a user's copies and compiled kernels are kept, which can be deleted at any time: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipdit"


def write_atomically(path: Path, data: bytes | str, *, durable: bool = False) -> None:
    """Write a file (text as UTF-8), making folders as needed. Otherwise as `replace_file`."""
    content = data.encode("utf-8") if isinstance(data, str) else data
    replace_file(path, lambda temporary: temporary.write_bytes(content), durable=durable)


def replace_file(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """`write` a new file, then put it in the place of `path` in one step. A failure leaves the old file and nothing else.

    durable: also after a power cut; costs a wait for the disk. Raises OSError that names `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, because os.replace is atomic only within one file system; hidden, so that no listing takes it up; short, because
    # the target's name may already be as long as names can be.
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with naming(path):
            write(temporary)
            _open_to_others(temporary)
            if durable:
                _bring_to_disk(temporary)
            os.replace(temporary, path)
            if durable:
                _bring_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder_contents(folder: Path, write: Callable[[Path], object], *, last: str) -> None:
    """`write` files and folders into a folder of their own, then move them into `folder`, where they take the place of equal
    names. `last` comes last, so that whoever waits for it finds all the others. A kill may leave a `.part` folder behind."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".contents.part"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
    try:
        with naming(folder):
            temporary.mkdir()
            write(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _open_to_others(file)
            for part in sorted(temporary.iterdir(), key=lambda part: part.name == last):
                if (folder / part.name).is_dir():
                    shutil.rmtree(folder / part.name)
                os.replace(part, folder / part.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing with the functions above: nobody else may be writing here now."""
    for left in folder.glob(".*.part"):
        if left.is_dir():
            shutil.rmtree(left)
    for left in folder.rglob(".*.part"):
        if left.is_file():
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an OSError within name `path`: a full disk fails a write, and a write does not know its file's name."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the operating system: its text says all
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _open_to_others(file: Path) -> None:
    """The rights that a new file usually has: safetensors makes files that nobody else can read."""
    mask = os.umask(0)  # it cannot be read without being set
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def _bring_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
