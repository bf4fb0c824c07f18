"""Inputs at URLs, through fsspec: s3://bucket/in, zip://drawings::archive.zip, https://host/drawings/ ...

Only what whoever starts a job names is fetched. An input given as a URL is one's own word; a manifest is somebody's file, and a
row in it could name an address that only this machine reaches. So URLs in a manifest are read only below prefixes that were
allowed, or below the folder of a manifest that is at a URL itself. HTTP redirects are not followed, for they lead elsewhere.
The decoders in `clipdit.images` take files and bytes and know no URLs; the HTTP service uses those alone.
"""

import functools
import io
import posixpath
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clipdit.images import ImageError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MAX_BYTES = 512 * 2**20
"""Largest image file fetched from a URL, bytes."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_IN_ARCHIVE = ("zip", "tar", "libarchive")
"""File systems within a file, which is named behind `::`."""
_CACHES = ("simplecache", "filecache", "blockcache")
"""May stand in front of another link of a chain."""
_PASSWORD = re.compile(r"://[^/?#]*:[^/?#]*@")


def is_url(source: str) -> bool:
    """Whether a source is a URL and no path: it begins with a scheme of at least two letters and `://`."""
    return _URL.match(source) is not None


def local_path(source: str) -> str:
    """file:///a/b.png as /a/b.png; anything else as it is."""
    scheme, separator, path = source.partition("://")
    return path if separator and scheme.lower() in ("file", "local") and path.startswith("/") and "::" not in path else source


def check_url(url: str) -> None:
    """ValueError for a URL that holds a password: job.json, plan.jsonl and ledger.jsonl would hold it too."""
    if _PASSWORD.search(url):
        raise ValueError(
            f"{_PASSWORD.sub('://...@', url)} holds a password, which would be written to job.json; "
            "set it where the file system's package reads it"
        )


def is_allowed(url: str, prefixes: Sequence[str]) -> bool:
    """Whether a URL of a manifest may be read. What decides in a chain is its last link, the file that is fetched; those before
    it may only be archives and caches. A last link without a scheme is a file of this machine, as a path in a manifest is."""
    *links, last = url.split("::")
    if any(link.partition("://")[0] not in _IN_ARCHIVE + _CACHES for link in links):
        return False
    if not is_url(last):
        return bool(links)
    if "\\" in last or any(part in ("..", ".") for part in re.split("/|%2f", last.lower().replace("%2e", "."))):
        return False
    return any(last == prefix or last.startswith(prefix if prefix.endswith("/") else prefix + "/") for prefix in prefixes)


def join(folder: str, name: str) -> str:
    """The URL of a file below a folder's URL: within the archive where that is one."""
    first, *rest = folder.split("::")
    scheme, _, path = first.partition("://")
    path = posixpath.normpath(posixpath.join("/", path, name)).lstrip("/")
    return "::".join([f"{scheme}://{'/' if _is_rooted(first) else ''}{path}", *rest])


def parent(url: str) -> str:
    """The URL of the folder that a file is in."""
    first, *rest = url.split("::")
    scheme, _, path = first.partition("://")
    return "::".join([f"{scheme}://{posixpath.dirname(path)}", *rest])


def is_folder(url: str) -> bool:
    """Whether there are files below a URL. ValueError when it cannot be reached, or is nothing."""
    system, path = _located(url)
    with _explained(url):
        if system.isfile(path) and not (path.endswith("/") and url.startswith("http")):
            return False
        if system.isdir(path) or path.strip("/") == "":
            return True
    raise ValueError(f"{url} does not exist; wanted an image, a folder or a manifest")


def find(url: str) -> list[tuple[str, str]]:
    """(path relative to the URL, URL) of every file below it, sorted. ValueError when it cannot be listed."""
    _archive.cache_clear()  # archives may have changed since an earlier job of this process
    system, root = _located(url)
    with _explained(url):
        names: Any = system.find(root)
    inside = root.rstrip("/") + "/" if root.strip("/") else root
    first, *rest = url.split("::")
    found = []
    for name in names:
        if not name.startswith(inside):  # a page of links may name anything
            continue
        location = name if is_url(name) else f"{first.partition('://')[0]}://{name}"
        found.append((name[len(inside) :].lstrip("/"), "::".join([location, *rest])))
    return sorted(found)


def open_text(url: str) -> io.TextIOWrapper:
    """A manifest at a URL, for reading. ValueError when it cannot be read."""
    try:
        return io.TextIOWrapper(io.BytesIO(fetch(url)), encoding="utf-8-sig", newline="")
    except ImageError as error:
        raise ValueError(f"{url} {error.reason}") from error


def fetch(url: str) -> bytes:
    """The file at a URL. Raises ImageError, and nothing else, for what cannot be read."""
    try:
        system, path = _located(url)
        with _opened(system, path) as stream:
            parts, length = [], 0
            while part := stream.read(min(MAX_BYTES + 1 - length, 2**24)):
                parts.append(part)
                length += len(part)
                if length > MAX_BYTES:
                    raise ImageError(f"is larger than {MAX_BYTES // 2**20} MiB", fault="large")
            return b"".join(parts)
    except ImageError:
        raise
    except (FileNotFoundError, KeyError) as error:
        raise ImageError("does not exist") from error
    except PermissionError as error:
        raise ImageError(f"cannot be read: permission denied ({_one_line(error)})") from error
    except Exception as error:  # of whichever client: botocore's, aiohttp's, zipfile's ... one file must not end a run
        raise ImageError(f"cannot be read: {_one_line(error)}") from error


def _opened(system: "AbstractFileSystem", path: str) -> Any:
    if not path.startswith(("http://", "https://")):
        return system.open(path, "rb")
    # One GET, as a stream; a size is given so that none is asked for before.
    stream: Any = system.open(path, "rb", block_size=0, size=1, allow_redirects=False)
    if stream.r.status >= 300:
        where = stream.r.headers.get("Location", "another address")
        stream.close()
        raise ImageError(f"redirects to {where}; redirects are not followed. Give the address itself")
    return stream


def _located(url: str) -> tuple["AbstractFileSystem", str]:
    """The file system of a URL and the path in it. ValueError where there is none, or its package is missing."""
    from fsspec.core import url_to_fs

    first, *rest = url.split("::")
    scheme, _, _ = first.partition("://")
    try:
        if scheme in _IN_ARCHIVE and rest:
            system = _archive(scheme, "::".join(rest))
            return system, str(system._strip_protocol(first))
        system, path = url_to_fs(url)
        return system, str(path)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{url} cannot be read: {_one_line(error)}") from error


@functools.lru_cache(maxsize=8)
def _archive(scheme: str, chain: str) -> "AbstractFileSystem":
    """Opened once a process: its directory would be read again for every file in it."""
    from fsspec.core import url_to_fs

    return url_to_fs(f"{scheme}://::{chain}")[0]


class _explained:
    """Around what a file system does: its errors, of any kind, become a ValueError of one line that names the URL."""

    def __init__(self, url: str):
        self.url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Exception) and not (isinstance(error, ValueError) and self.url in str(error)):
            raise ValueError(f"{self.url} cannot be read: {_one_line(error)}") from error


def _is_rooted(link: str) -> bool:
    return link.partition("://")[2].startswith("/")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
