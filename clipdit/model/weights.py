"""Networks out of folders: a JSON configuration and safetensors, nothing else. What is missing, damaged or does not fit is
refused in one line that names the file.

diffusers and transformers write these folders and could read them, too. But where a file does not fit they fill gaps with random
numbers, try pickles, and tell of it in tables on stderr; we refuse, and are quiet.
"""

import contextlib
import json
import textwrap
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderTiny, ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)
Diffusers = TypeVar("Diffusers", bound=ModelMixin)

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def one_line(error: BaseException) -> str:
    """An error's message on one line, cut where it becomes a table; its name where it has no message."""
    return textwrap.shorten(str(error), 240, placeholder=" ...") or type(error).__name__


@contextlib.contextmanager
def refused(what: object) -> Iterator[None]:
    """Turns an error in the block into a ValueError of one line, "WHAT: message"; the cause stays attached.

    Any error: a configuration edited by hand breaks a constructor in every way from TypeError to ZeroDivisionError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError when the file is missing or holds something else."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} is not whole: {path.name} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(plain).__name__}, wanted a JSON object")
    return plain


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of STEM.safetensors, or of the shards in STEM.safetensors.index.json. ValueError if a file is not there."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.exists() and index.exists():
        raise ValueError(f"{folder} holds both {whole.name} and {index.name}; delete the one that is out of date")
    files = _shards(index) if index.exists() else [whole]
    if not index.exists() and not whole.exists():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        hint = f"; {pickles[0]} is a pickle, which can run code and is never loaded" if pickles else ""
        raise ValueError(f"{folder} is not whole: {whole.name} is missing{hint}")
    tensors = {}
    for file in files:
        if not file.exists():
            raise ValueError(f"{folder} is not whole: {file.name} is missing, which {index.name} names")
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or no safetensors file: {one_line(error)}") from error
    return tensors


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise ValueError(f"{index} is damaged: wanted a weight_map from tensors to files beside it")
    return [index.parent / name for name in sorted(set(names.values()))]


def fill(network: Network, tensors: dict[str, Tensor], where: object, dtype: torch.dtype = torch.float32) -> Network:
    """`network` with exactly these tensors as its weights, floating ones in `dtype`, for inference (`eval`).

    `where` is what the message of the ValueError begins with when a name or a shape differs, or a number is not finite."""
    wanted = network.state_dict()
    absent, foreign = (sorted(a.keys() - b.keys()) for a, b in ((wanted, tensors), (tensors, wanted)))
    if absent or foreign:
        names, verb = (absent, "lack") if absent else (foreign, "hold, beside what its configuration asks for,")
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"{where} does not fit together: its weights {verb} {names[0]}{more}")
    state = {}
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            got, want = ("x".join(map(str, t.shape)) or "a number" for t in (tensor, wanted[name]))
            raise ValueError(f"{where} does not fit together: {name} is {got} in its weights, {want} by its configuration")
        # a copy: the file is mapped, and who truncates it later would kill this process
        state[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        if tensor.is_floating_point() and not state[name].isfinite().all():
            raise ValueError(f"{where} is damaged: {name} holds numbers that are not finite in {dtype}")
    network.load_state_dict(state, assign=True)
    return network.eval()


@contextlib.contextmanager
def hub_errors(name: str, what: str) -> Iterator[None]:
    """Turns what goes wrong between here and a hub into a ValueError of one line."""
    try:
        yield
    except (OSError, ValueError) as error:  # no connection, no such repository or file, a name that no repository can have
        raise ValueError(
            f"no {what} at {name}: it is no folder here, and the hub does not give it ({one_line(error)})"
        ) from error


def load_diffusers(kind: type[Diffusers], folder: Path, dtype: torch.dtype = torch.float32) -> Diffusers:
    """A diffusers model of class `kind` from its folder, on the CPU, for inference. ValueError, one line, if that cannot be."""
    config = read_json(folder / "config.json")
    if config.get("_class_name") != kind.__name__:
        raise ValueError(f"{folder / 'config.json'} is of class {config.get('_class_name')}; wanted {kind.__name__}")
    if kind is AutoencoderTiny:
        config.pop("block_out_channels", None)  # diffusers writes it, and on reading complains that it did
    tensors = OrderedDict(read_tensors(folder, "diffusion_pytorch_model"))
    with refused(f"{folder / 'config.json'} is damaged"), init_empty_weights(include_buffers=False):
        network = cast(Diffusers, kind.from_config(config))  # pyright: ignore[reportAttributeAccessIssue]  (also a ConfigMixin)
    network._fix_state_dict_keys_on_load(tensors)  # names of before 2023, as in sd-vae-ft-mse; what from_pretrained calls
    return fill(network, tensors, folder, dtype)
