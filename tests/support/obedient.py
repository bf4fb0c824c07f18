"""`clipdit serve` in a process of its own, with a model that does as files tell it: wherever its replicas run, they see them.

    python obedient.py FOLDER serve --engine ray --backend fake ...

FOLDER/delay holds seconds that each batch takes longer; while FOLDER/hold is there, batches wait. FOLDER/batches-PID has a line
for each batch of a process: its number of images. FOLDER/revision is the revision of a model that is opened then; while
FOLDER/broken is there, none can be.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import clipdit.translator
import clipdit_serve.opening
from clipdit.fake_backend import FakeBackend

VARIABLE = "CLIPDIT_TEST_FOLDER"


class Obedient(clipdit.translator.Translator):
    """The fake backend's translator, which looks at the folder before each batch but those of the warm-up."""

    def __init__(self) -> None:
        super().__init__(FakeBackend())
        self._folder = Path(os.environ[VARIABLE])
        self._batches = self._folder / f"batches-{os.getpid()}"
        self._batches.touch()
        if (revision := self._folder / "revision").exists():
            self.backend.fingerprint = revision.read_text().ljust(64, "0")

    @classmethod
    def open(cls) -> "Obedient":
        if (Path(os.environ[VARIABLE]) / "broken").exists():
            raise ValueError("the model is broken")
        return cls()

    def __call__(self, source_u8: torch.Tensor, *, seeds: Sequence[int], **sampling) -> torch.Tensor:
        if source_u8.any():  # the warm-up's are black
            with self._batches.open("a") as file:
                file.write(f"{len(source_u8)}\n")
            while (self._folder / "hold").exists():
                time.sleep(0.01)
            delay = self._folder / "delay"
            time.sleep(float(delay.read_text()) if delay.exists() else 0.0)
        return super().__call__(source_u8, seeds=seeds, **sampling)


if __name__ == "__main__":
    from obedient import Obedient as Importable  # in a replica the module has this name, and not __main__

    from clipdit import cli

    os.environ[VARIABLE] = sys.argv[1]
    clipdit_serve.opening.opener = lambda *words, **options: Importable.open
    sys.exit(cli.main(sys.argv[2:]))
