"""Other ways to compute what a fused operation does, by name. What is no part of PyTorch is asked for by package, and left out,
with the reason, where that is not installed."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTIONS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention of PyTorch": SDPBackend.FLASH_ATTENTION,
    "memory-efficient of PyTorch": SDPBackend.EFFICIENT_ATTENTION,
}


def inductor(operation: Callable[..., Any], *, own_products: bool = False) -> Callable[..., Any]:
    """torch.compile at its best for a loop that is one CUDA graph anyway: each shape by itself, kernels and their settings chosen
    by timing them. Products are cuBLAS's unless `own_products`: choosing among its own as well takes minutes, and for large ones
    it chose cuBLAS's (docs/kernels.md)."""
    options: dict[str, Any] = {"max_autotune": True, "coordinate_descent_tuning": True}
    if not own_products:
        options["max_autotune_gemm_backends"] = "ATEN"
    return torch.compile(operation, options=options, dynamic=False, fullgraph=True)


def with_attention(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
    """`operation` with one of ATTENTIONS, which raises for what it does not take."""

    def chosen(*arguments: Any) -> Any:
        with sdpa_kernel(ATTENTIONS[name]):
            return operation(*arguments)

    return chosen


def flex_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """PyTorch's FlexAttention; to be compiled."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    q, k, v = (rearrange(z, "B N (heads d) -> B heads N d", heads=heads) for z in (q, k, v))
    out = flex(q, k, v)
    assert isinstance(out, Tensor)
    return rearrange(out, "B heads N d -> B N (heads d)")


def from_package(package: str, function: str) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """An attention that takes (B, N, heads, d): of `xformers.ops`, `flash_attn_interface` or `flash_attn`, or of `sageattention`,
    asked for in the same layout. ModuleNotFoundError at its first call where the package is not installed."""

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        attend = getattr(import_module(package), function)
        options = {"tensor_layout": "NHD"} if package == "sageattention" else {}
        out = attend(*(z.unflatten(-1, (heads, -1)) for z in (q, k, v)), **options)
        return (out[0] if isinstance(out, tuple) else out).flatten(-2)

    return attention


PACKAGES = {
    "xformers": from_package("xformers.ops", "memory_efficient_attention"),
    "FlashAttention 3": from_package("flash_attn_interface", "flash_attn_func"),
    "FlashAttention 2": from_package("flash_attn", "flash_attn_func"),
    "SageAttention": from_package("sageattention", "sageattn"),
}


def quantize_whole_rows(x: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One scale a row, as the products of integers and of 8-bit floats in PyTorch take them: (numbers, scales (rows, 1))."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / largest
    numbers = x.float() / scale
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scale


def int_mm(x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    """cuBLAS's product of 8-bit integers, then scales and bias; to be compiled. x is (rows, D), the result in bias's type."""
    total = torch._int_mm(x, weight.t()).float() * x_scale * w_scale.t()
    return (total + bias.float()).to(bias.dtype)


def scaled_mm(x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    """cuBLAS's product of e4m3 with a scale a row."""
    return torch._scaled_mm(x, weight.t(), scale_a=x_scale, scale_b=w_scale.t(), bias=bias, out_dtype=bias.dtype)
