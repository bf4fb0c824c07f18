"""A model as it lies in its folder now, opened again for each reload."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from clipdit.backend import BUILT_IN, locate
from clipdit.translator import Translator

_ONE_AT_A_TIME = threading.Lock()
"""The libraries that load networks switch global things over meanwhile: which class a module is made of, and on which device."""


def opener(model: str | None, *, backend: str | None = None, device: str | None = None) -> Callable[[], Translator]:
    """What opens a checkpoint or bundle whenever it is called, from any thread; arguments as those of `Translator.open`. It can
    be sent to other processes.

    A symbolic link is followed once: where it leads to later on makes no difference to a model that is open. ValueError where the
    folder is replaced while it is read, beside what `Translator.open` raises."""
    return partial(_open, model, backend, device)


def _open(model: str | None, backend: str | None, device: str | None) -> Translator:
    with _ONE_AT_A_TIME:
        folder = Path(locate(model or BUILT_IN))
        folder = folder.resolve() if folder.is_dir() else folder
        before = _identity(folder)
        translator = Translator.open(folder, backend=backend, device=device)
        translator.backend.fingerprint  # noqa: B018  read from the files, when it is first asked for
        if _identity(folder) != before:
            translator.backend.close()
            raise ValueError(f"{folder} was replaced while it was read; try again")
        return translator


def _identity(folder: Path) -> tuple[int, int] | None:
    """Of the folder that has this name now."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
