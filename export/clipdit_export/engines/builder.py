"""ONNX graph -> serialised engine, by the Python API of TensorRT or TensorRT-RTX.

Precision is in the graph (networks of TensorRT 11 and RTX are strongly typed); nothing here sets one. TF32 is on in TensorRT
unless it is cleared: our fp32 is fp32.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from clipdit.files import write_atomically
from clipdit_export.engines.api import EngineTarget, load, logger_of

Flag = Literal["refittable", "stripped", "hardware_compatible", "version_compatible"]
"""Of `EngineOptions`, those that a user chooses."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is built, beside what its graph says."""

    batches: tuple[int, int, int] = (1, 4, 16)
    """Smallest, most usual and largest batch of the optimisation profile."""
    gpus: tuple[str, ...] = ()
    """Compute capabilities ("SM89") that a TensorRT-RTX engine serves; TensorRT's is that of the machine's GPU."""
    refittable: bool = False
    """Weights can be exchanged without a build."""
    stripped: bool = False
    """The engine holds no weights, which come from the bundle's graphs when it is opened. Implies refittable."""
    hardware_compatible: bool = False
    """TensorRT: runs on Ampere and later, more slowly."""
    version_compatible: bool = False
    """TensorRT: opens with later versions of the same major one."""
    timing_cache: Path | None = None
    """TensorRT: measured kernels are kept here. TensorRT-RTX has none: setting one would make it look for a GPU."""


class EngineError(ValueError):
    """The graph cannot be made an engine; the first reason that the builder gave."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine, and what its builder was given."""

    data: bytes
    network: Counter[str]
    """Products and convolutions of the parsed network by the type of what they read. Networks are strongly typed: a builder
    follows these types."""


def build_engine(target: EngineTarget, graph: Path, options: EngineOptions, *, name: str = "engine") -> Built:
    """Build the engine of one graph; its external weights lie beside it. A progress bar shows the builder's phases.

    Raises EngineError with the parser's or the builder's own words."""
    trt = load(target)
    if (options.refittable or options.stripped) and not torch.cuda.is_available():
        raise EngineError("refittable and weight-stripped engines are compiled on a GPU, and there is none here")
    told = logger_of(trt)
    builder = trt.Builder(told)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, told)
    if not parser.parse_from_file(str(graph)):
        raise EngineError(f"{graph.name}: {parser.get_error(0).desc() if parser.num_errors else 'the parser gave no reason'}")
    _let_attention_decompose(trt, network)
    config = builder.create_builder_config()
    _set_flags(trt, config, target, options)
    config.add_optimization_profile(_profile(builder, network, options.batches))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the audit; costs nothing at run time
    if target == "tensorrt-rtx":
        config.num_compute_capabilities = len(options.gpus)
        for i, gpu in enumerate(options.gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, gpu), i)
    elif options.timing_cache is not None:
        kept = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False)
    with tqdm(total=1, desc=name, unit="step", leave=False, disable=None) as bar:
        config.progress_monitor = _monitor(trt, bar)
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(f"{graph.name}: the builder made no engine: {told.last or 'it gave no reason'}")
    if target == "tensorrt" and options.timing_cache is not None:
        write_atomically(options.timing_cache, bytes(config.get_timing_cache().serialize()))
    return Built(data=bytes(serialized), network=_products(trt, network))


def _let_attention_decompose(trt: ModuleType, network: Any) -> None:
    """Attention as one node (opset 23) has no kernel for every type and width of a head; unless it may be taken apart, the build
    then fails: always in fp32, for one."""
    for layer in _layers(network):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how NVIDIA's samples cast: a network hands out plain ILayers
            layer.attention.decomposable = True


def _products(trt: ModuleType, network: Any) -> Counter[str]:
    """An attention counts as the two products that it is made of."""
    kinds = {trt.LayerType.MATRIX_MULTIPLY: 1, trt.LayerType.CONVOLUTION: 1, trt.LayerType.DECONVOLUTION: 1}
    kinds[trt.LayerType.ATTENTION_INPUT] = 2
    types = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}
    counts: Counter[str] = Counter()
    for layer in _layers(network):
        if layer.type in kinds:
            counts[types.get(layer.get_input(0).dtype, "other")] += kinds[layer.type]
    return counts


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(i) for i in range(network.num_layers)]


def _set_flags(trt: ModuleType, config: Any, target: EngineTarget, options: EngineOptions) -> None:
    flags = trt.BuilderFlag
    config.clear_flag(flags.TF32)
    if options.refittable or options.stripped:
        config.set_flag(flags.REFIT)
    if options.stripped:
        config.set_flag(flags.STRIP_PLAN)
    if target == "tensorrt":
        if options.version_compatible:
            config.set_flag(flags.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _profile(builder: Any, network: Any, batches: Sequence[int]) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        if shape and shape[0] == -1:
            profile.set_shape(tensor.name, *((batch, *shape[1:]) for batch in batches))
    return profile


def _monitor(trt: ModuleType, bar: tqdm) -> Any:
    class Monitor(trt.IProgressMonitor):
        """The builder's phases, innermost last; the bar follows the outermost."""

        def __init__(self):
            super().__init__()
            self.outer: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if self.outer is None:
                self.outer = phase_name
                bar.reset(total=num_steps)
            bar.set_postfix_str(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self.outer:
                self.outer = None

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.outer:
                bar.update()
            return True  # False stops the build

    return Monitor()
