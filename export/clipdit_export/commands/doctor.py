"""`clipdit doctor`: what can run here, and for what cannot: why, and the command that mends it."""

import json as json_module
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    what: str
    works: bool
    said: str
    """The version or the device where it works; else why not, ending in what to do."""


def doctor(*, model: str | None = None, json: bool = False) -> int:
    """Say what can run here, and for what cannot: why, and the command that mends it.

    Args:
        model: a checkpoint or bundle whose backends are tried; the built-in checkpoint if not given.
        json: print it as JSON.
    """
    from clipdit.backend import BUILT_IN, available_backends, locate
    from clipdit.cli import DONE
    from clipdit.provenance import provenance

    folder = Path(locate(model or BUILT_IN))
    backends = available_backends(folder)
    findings = [*_machine(), *_packages(), *_conflicts()]
    if json:
        told = {"provenance": provenance(), "findings": [asdict(f) for f in findings], "backends": backends}
        print(json_module.dumps(told))
        return DONE
    for finding in findings:
        print(f"{'ok' if finding.works else 'no':3} {finding.what:28} {finding.said}")
    print(f"\nbackends for {folder}:")
    for name, reason in backends.items():
        print(f"{'ok' if reason is None else 'no':3} {name:28} {reason or 'can run it here'}")
    return DONE


def _machine() -> list[Finding]:
    import torch

    from clipdit.provenance import hardware

    found = hardware()
    said = f"{found['cpu']}, {found['cores']} cores, {found.get('memory_gib', '?')} GiB"
    cpu = Finding(what="CPU", works=True, said=said)
    if torch.cuda.is_available():
        names = [
            f"{torch.cuda.get_device_name(i)} (sm{''.join(map(str, torch.cuda.get_device_capability(i)))})"
            for i in range(torch.cuda.device_count())
        ]
        return [cpu, Finding(what="GPU", works=True, said=", ".join(names))]
    built = torch.version.cuda
    why = (
        "PyTorch was built without CUDA"
        if built is None
        else f"PyTorch (CUDA {built}) finds none; `nvidia-smi` says whether there is one"
    )
    return [cpu, Finding(what="GPU", works=False, said=why)]


PACKAGES = {
    "onnxruntime": ("ONNX Runtime", "onnx"),
    "onnxscript": ("export to ONNX", "onnx"),
    "openvino": ("OpenVINO", "openvino"),
    "tensorrt_rtx": ("TensorRT-RTX engines", "rtx"),
    "tensorrt": ("TensorRT engines", "tensorrt"),
    "cryptography": ("signed bundles", "sign"),
    "stlpips_pytorch": ("ST-LPIPS", "metrics"),
}
"""Module -> what needs it, and the extra that brings it."""


def _packages() -> list[Finding]:
    findings = []
    for module, (what, extra) in PACKAGES.items():
        if find_spec(module) is None:
            findings.append(Finding(what=what, works=False, said=f'not installed. Run `pip install "clipdit[{extra}]"`'))
        else:
            findings.append(Finding(what=what, works=True, said=f"{module} {_version(module)}"))
    return findings


def _conflicts() -> list[Finding]:
    """Packages that are here and cannot work together."""
    findings = []
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name) != "?"]
    if len(both) == 2:
        findings.append(
            Finding(
                what="two ONNX Runtimes",
                works=False,
                said="onnxruntime and onnxruntime-gpu share one folder, and the CPU one wins. Run `pip uninstall onnxruntime` "
                "and reinstall onnxruntime-gpu",
            )
        )
    if _version("onnxruntime-gpu") != "?" and _version("tensorrt").startswith("11"):
        findings.append(
            Finding(
                what="ONNX Runtime's TensorRT",
                works=False,
                said="its provider wants TensorRT 10 beside your 11 (microsoft/onnxruntime#32278); use our tensorrt backend, or "
                "the CUDA provider",
            )
        )
    return findings


def _version(package: str) -> str:
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "?"
