"""Everything that an export depends on, by name: when all of it is as before there is nothing to do, and what differs is why a
bundle is built again.

Caches that leave something out serve stale engines: of another GPU, an older runtime, a retrained checkpoint. (Torch-TensorRT's
key has no GPU, driver or version; that of ONNX Runtime's TensorRT provider nothing of the model.)
"""

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import clipdit
import clipdit_export
from clipdit.provenance import hardware, versions
from clipdit_export.order import Order
from clipdit_export.pictures import Pictures
from clipdit_export.precision import modelopt

BUILDERS = ("onnx", "onnx-ir", "onnxscript")


def cache_key(fingerprint: str, order: Order, pictures: Pictures) -> dict[str, str]:
    """By what it is of: weights, order, pictures, code, packages, machine."""
    key = {"checkpoint": fingerprint, "pictures": _hash(pictures.calibration, pictures.sources, pictures.targets)}
    key |= {f"order.{name}": str(value) for name, value in vars(order).items() if name not in ("recipes", "calibration")}
    key |= {f"recipe.{recipe.name}": recipe.model_dump_json() for recipe in order.recipes}
    key |= {f"version.{name}": found for name, found in export_versions().items()}
    if order.modelopt_python is not None:  # asked ahead of all work: it may not be there
        key["version.nvidia-modelopt"] = modelopt.version(order.modelopt_python)
    machine = hardware()
    key |= {"machine.cpu": str(machine["cpu"]), "machine.threads": str(machine["threads"]), "machine.gpu": _gpu()}
    return key | {"code": _code()}


def what_changed(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """A line for each difference; empty when there is nothing to build."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if before is None or after is None:
            lines.append(f"{name} is {'new' if before is None else 'gone'}")
        elif max(len(before), len(after)) > 60:
            lines.append(f"{name} is another")
        else:
            lines.append(f"{name} was {before or 'nothing'}, is {after or 'nothing'}")
    return lines


def export_versions() -> dict[str, str]:
    """Of the packages that a bundle can depend on."""
    found = versions()
    for package in BUILDERS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hash(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _gpu() -> str:
    """Names, compute capabilities and driver."""
    if not torch.cuda.is_available():
        return ""
    found = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append(f"{torch.cuda.get_device_name(i)} sm{major}{minor}")
    program = shutil.which("nvidia-smi")
    if program:
        asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        found.append("driver " + subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip())
    return ", ".join(found)


def _code() -> str:
    """Of all that makes graphs from weights: this package, and the core's model and sampling."""
    core, export = Path(clipdit.__path__[0]), Path(clipdit_export.__path__[0])
    files = [*export.rglob("*.py"), *(core / "model").glob("*.py"), core / "sampling.py", core / "pipeline.py"]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
