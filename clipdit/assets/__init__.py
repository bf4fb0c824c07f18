"""What comes with the package: the small edges2emoji checkpoint and a handful of sample drawings."""

from importlib.resources import files
from pathlib import Path


def built_in_checkpoint() -> Path:
    """The folder of the edges2emoji checkpoint. ValueError when this installation was built without it."""
    folder = Path(str(files(__name__) / "edges2emoji"))
    if not (folder / "model_index.json").exists():
        raise ValueError("this installation has no built-in checkpoint; give --model, or --vae and --clip, by folder or hub id")
    return folder
