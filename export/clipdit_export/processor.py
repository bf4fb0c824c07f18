"""What the CPU of this machine multiplies in, as far as it decides what a variant is worth here."""

import platform
from pathlib import Path

from clipdit_export.manifest import Variant

CPUINFO = Path("/proc/cpuinfo")
DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")
"""x86's instructions that add products of 8-bit integers in 32 bits."""


def flags() -> frozenset[str] | None:
    """As Linux tells them; None elsewhere."""
    return frozenset(CPUINFO.read_text(encoding="utf-8").split()) if CPUINFO.exists() else None


def computes_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16 (AMX or AVX512-BF16): elsewhere OpenVINO would only imitate it."""
    known = flags()
    return known is not None and not known.isdisjoint(("amx_bf16", "avx512_bf16"))


def adds_int8_exactly() -> bool:
    """Whether products of 8-bit integers are added in 32 bits. x86 without VNNI adds two of them in 16, which overflow and are
    cut off (`vpmaddubsw`); runtimes use that, and pictures come out worse than where a variant was judged."""
    known = flags()
    return platform.machine() not in ("x86_64", "AMD64") or known is None or not known.isdisjoint(DOT_PRODUCTS)


def doubt(variant: Variant) -> str | None:
    """Why a variant that runs on CPUs is not opened here unless it is asked for by name; None when it is as good as any."""
    if variant.target not in ("onnx", "openvino") or variant.recipe.quantize != "int8" or adds_int8_exactly():
        return None
    return "this CPU has no VNNI, so sums of 8-bit products overflow and pictures are worse than on one that has"
