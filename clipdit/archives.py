"""A checkpoint or bundle as one .zip file: to be sent, stored and opened like the folder.

Files are stored as they are: weights do not shrink. What is opened is a copy in the user's cache, unpacked once.
"""

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from clipdit.files import cache_home, naming, replace_file

ENDING = ".zip"


def pack(folder: Path, archive: Path) -> None:
    """Write all files of `folder` into `archive`, in one step; the same files give the same bytes."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as file:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())  # dated 1980, so that hours make no difference
                    entry.external_attr = 0o644 << 16
                    with path.open("rb") as source, file.open(entry, "w", force_zip64=True) as target:
                        shutil.copyfileobj(source, target, 1 << 20)

    replace_file(archive, write)


def unpacked(archive: Path) -> Path:
    """The folder of an archive, unpacked into the cache (XDG_CACHE_HOME, or ~/.cache) at its first use.

    ValueError, one line, for a file that is no zip, is damaged, or would write outside its folder."""
    with archive.open("rb") as stream:
        key = hashlib.file_digest(stream, "sha256").hexdigest()
    home = cache_home() / "archives"
    folder = home / key[:32] / archive.stem
    if folder.exists():
        return folder
    part = home / f".{key[:32]}.{os.getpid()}.part"
    try:
        with naming(folder):
            part.mkdir(parents=True)
            with zipfile.ZipFile(archive) as file:
                if outside := [name for name in file.namelist() if name.startswith("/") or ".." in Path(name).parts]:
                    raise ValueError(f"{archive} holds {outside[0]}, which is outside of its folder; it is not unpacked")
                file.extractall(part / archive.stem)
            try:
                os.replace(part, home / key[:32])
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive} cannot be unpacked: {error}; wanted a .zip file of a checkpoint or bundle") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
