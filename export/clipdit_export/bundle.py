"""A bundle: a folder with a manifest, the graphs and engines of one checkpoint, and all that is needed to run them.

manifest.json     what it is; lists every other file with its hash
graphs/           ONNX graphs for each size, variant and part, and weights.bin, which they share
engines/          of TensorRT and TensorRT-RTX
recipes/          what each variant runs in which precision; `clipdit export --recipe` reads them again
scheduler/        diffusers' configuration of the noise schedule, as in the checkpoint
README.md         the same in words
"""

from dataclasses import dataclass, field
from pathlib import Path

from clipdit.objective import Objective
from clipdit.pipeline import load_objective
from clipdit_export.manifest import Manifest, check_file, read_manifest
from clipdit_export.signature import check_trusted


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An open bundle. Files are checked when they are used."""

    folder: Path
    manifest: Manifest
    objective: Objective
    _seen: set[str] = field(default_factory=set)

    def checked(self, name: str) -> Path:
        """The path of a listed file; its bytes, and those of the weights it reads, are the exported ones. ValueError if not."""
        needed = [name, *(other for other in self.manifest.files if other.endswith("weights.bin") and name.endswith(".onnx"))]
        for file in needed:
            if file not in self._seen:  # once for each opening: hashing gigabytes takes seconds
                check_file(self.folder, file, self.manifest)
                self._seen.add(file)
        return self.folder / name


def open_bundle(folder: Path) -> Bundle:
    """Read the manifest and the noise schedule. ValueError, one line, when they are missing or damaged, or the bundle is not
    signed by whom this machine trusts (`clipdit_export.signature`)."""
    manifest = read_manifest(folder)
    check_trusted(folder)
    check_file(folder, "scheduler/scheduler_config.json", manifest)
    return Bundle(folder=folder, manifest=manifest, objective=load_objective(folder / "scheduler"))
