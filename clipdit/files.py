"""Files that are whole or absent: one sees the old file, no file or the new one, also after a kill or on a full disk."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file (text as UTF-8), making folders as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside it, because os.replace is atomic only within one file system; hidden, so that no listing takes it up
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
