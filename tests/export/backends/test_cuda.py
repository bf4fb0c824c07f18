"""The backends of NVIDIA GPUs, as far as they can be tried without one: ONNX Runtime's bound buffers on the CPU, the calls into
TensorRT against a stand-in that has nothing but what the real package has, and what is said where they cannot run.

On a machine with a GPU tests/contract runs them for real."""

import contextlib
import ctypes
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clipdit.backend import available_backends, open_backend
from clipdit_export.backends import cuda
from clipdit_export.backends.cuda import BoundSession, EngineGraph, OnnxCudaBackend, TensorRtBackend, TensorRtRtxBackend
from clipdit_export.bundle import open_bundle
from clipdit_export.engines.api import why_not
from clipdit_export.sessions import call, open_session

CPU = torch.device("cpu")
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def part(bundle: Path, name: str) -> Path:
    return bundle / open_bundle(bundle).manifest.variants["onnx-fp32"].parts["32x32"][name]


def latents(batch: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_bound_buffers_give_what_the_session_gives_again_and_at_another_batch(bundle: Path):
    session = open_session(part(bundle, "vae_decoder"))
    bound, kept = BoundSession(session, CPU), []
    for batch, seed in ((2, 0), (2, 1), (3, 2), (2, 3)):
        given = {"latent": latents(batch, seed)}
        wanted = call(session, {"latent": given["latent"].numpy()})
        kept.append((bound(given), wanted))
    for got, wanted in kept:  # compared last: the next call must not write into what was handed out
        assert got.keys() == wanted.keys()
        assert all(np.array_equal(got[name].numpy(), wanted[name]) for name in wanted)


class Context:
    """IExecutionContext of the stand-in: reads its inputs from the addresses that it was given, and writes to the others."""

    def __init__(self, session):
        self.session, self.shapes, self.addresses, self.runs = session, {}, {}, 0

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        (value,) = [output for output in self.session.get_outputs() if output.name == name]
        return (next(iter(self.shapes.values()))[0], *value.shape[1:])

    def execute_async_v3(self, stream):
        self.runs += 1
        feed = {}
        for name, shape in self.shapes.items():
            memory = (ctypes.c_float * math.prod(shape)).from_address(self.addresses[name])
            feed[name] = np.ctypeslib.as_array(memory).reshape(shape)
        for name, array in call(self.session, feed).items():
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return True


class Engine:
    def __init__(self, session):
        self.values = {value.name: (value, "INPUT") for value in session.get_inputs()}
        self.values |= {value.name: (value, "OUTPUT") for value in session.get_outputs()}
        self.session, self.num_io_tensors = session, len(self.values)

    def get_tensor_name(self, i):
        return list(self.values)[i]

    def get_tensor_mode(self, name):
        return self.values[name][1]

    def get_tensor_dtype(self, name):
        return {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(bool)": "bool"}[self.values[name][0].type]

    def create_execution_context(self, config=None):
        return Context(self.session)

    def create_runtime_config(self):
        return RuntimeConfig()


class RuntimeConfig:
    cuda_graph_strategy = None

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache):
        return True


class RuntimeCache:
    def deserialize(self, blob):
        assert blob == b"kernels"
        return True

    def serialize(self):
        return b"kernels"


class Refitter:
    def __init__(self, engine, logger):
        self.engine = engine

    def refit_cuda_engine(self):
        return self.engine.session is not None

    def get_missing_weights(self):
        return [] if self.engine.session else ["blocks.0.fc1.weight"]


class OnnxParserRefitter:
    def __init__(self, refitter, logger):
        self.refitter = refitter

    def refit_from_file(self, model):
        if "vae_decoder" in model:  # what the engine was built from
            self.refitter.engine.session = open_session(Path(model))
        return True


class Logger:
    ERROR = 1


@pytest.fixture
def stand_in(monkeypatch, bundle: Path):
    """A module like tensorrt, whose "engine" is the path of a graph."""
    part_of_decoder = part(bundle, "vae_decoder")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, data):
            if data == b"of another GPU":
                self.logger.log(Logger.ERROR, "the engine was built for another GPU")
                return None
            if data == b"stripped":
                engine = Engine(open_session(part_of_decoder))
                engine.session = None
                return engine
            return Engine(open_session(Path(data.decode())))

    names = "float32 float16 bfloat16 int64 int32 uint8 bool".split()
    modes, graphs = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT"), SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)
    return SimpleNamespace(
        __name__="tensorrt_rtx", __version__="0", Runtime=Runtime, ILogger=Logger, TensorIOMode=modes, CudaGraphStrategy=graphs,
        Refitter=Refitter, OnnxParserRefitter=OnnxParserRefitter, **{name: name for name in names},
    )  # fmt: skip


def test_an_engine_is_given_the_addresses_of_tensors_and_its_kernels_are_kept(stand_in, bundle: Path, tmp_path: Path):
    engine, graph = tmp_path / "decoder.engine", part(bundle, "vae_decoder")
    engine.write_bytes(str(graph).encode())
    cache, session = tmp_path / "cache" / "kernels", open_session(graph)
    for _ in range(2):  # the second finds what the first has kept
        opened = EngineGraph(stand_in, engine, CPU, cache=cache)
        for batch in (1, 3):
            given = latents(batch, batch)
            got, wanted = opened({"latent": given, "unread": given}), call(session, {"latent": given.numpy()})
            assert all(np.array_equal(got[name].numpy(), wanted[name]) for name in wanted)
        assert cache.read_bytes() == b"kernels"


def test_a_stripped_engine_takes_its_weights_from_the_graph_that_it_was_built_from(stand_in, bundle: Path, monkeypatch):
    manifest = open_bundle(bundle).manifest
    graphs = manifest.variants["onnx-fp32"]
    engines = {size: {name: f"engines/{size}.{name}.engine" for name in parts} for size, parts in graphs.parts.items()}
    stripped = {"target": "tensorrt", "parts": engines, "engine": ("stripped",), "gpus": ()}
    variants = manifest.variants | {"tensorrt-fp32": graphs.model_copy(update=stripped)}
    opened = replace(open_bundle(bundle), manifest=manifest.model_copy(update={"variants": variants}))
    monkeypatch.setattr(cuda, "load", lambda target: stand_in)
    backend = TensorRtBackend(opened, "tensorrt-fp32", device=CPU)
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"stripped" if path.suffix == ".engine" else real(path))
    graph = backend._load(bundle / engines["32x32"]["vae_decoder"], variants["tensorrt-fp32"])
    given = latents(2, 0)
    wanted = call(open_session(part(bundle, "vae_decoder")), {"latent": given.numpy()})
    assert all(np.array_equal(graph({"latent": given})[name].numpy(), wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match=r"weights do not fit the stripped engine: blocks\.0\.fc1\.weight \.\.\. are missing"):
        EngineGraph(stand_in, bundle / "e.engine", CPU, weights_of=part(bundle, "step"))


def test_an_engine_that_cannot_be_opened_is_a_line_with_the_runtimes_own_reason(stand_in, tmp_path: Path):
    (tmp_path / "e.engine").write_bytes(b"of another GPU")
    with pytest.raises(ValueError, match=r"e\.engine: tensorrt_rtx 0 cannot open it here: the engine was built for another"):
        EngineGraph(stand_in, tmp_path / "e.engine", CPU)


@pytest.mark.skipif(why_not("tensorrt-rtx") is not None, reason=why_not("tensorrt-rtx") or "")
def test_the_stand_in_has_nothing_that_the_real_package_lacks(stand_in):
    import tensorrt_rtx as real

    pairs = {Context: real.IExecutionContext, Engine: real.ICudaEngine, RuntimeConfig: real.IRuntimeConfig}
    pairs |= {RuntimeCache: real.IRuntimeCache, stand_in.Runtime: real.Runtime}
    pairs |= {Refitter: real.Refitter, OnnxParserRefitter: real.OnnxParserRefitter}
    for mine, theirs in pairs.items():
        assert {name for name in vars(mine) if not name.startswith("_")} <= set(dir(theirs))
    assert all(hasattr(real, name) for name in vars(stand_in))
    assert hasattr(real.TensorIOMode, "INPUT") and hasattr(real.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")


def test_engines_for_another_gpu_are_refused_with_what_to_do(bundle: Path, monkeypatch):
    manifest = open_bundle(bundle).manifest
    of_ada = manifest.variants["onnx-fp32"].model_copy(update={"target": "tensorrt-rtx", "gpus": ("sm89", "sm120")})
    monkeypatch.setattr(cuda, "capability_here", lambda: "sm86")
    assert TensorRtRtxBackend.unfit(of_ada) == "its engines are for sm89, sm120, and this GPU is sm86; export with --gpus sm86"
    monkeypatch.setattr(cuda, "capability_here", lambda: "sm89")
    assert TensorRtRtxBackend.unfit(of_ada) is None


@without_a_gpu
@pytest.mark.parametrize("backend", [TensorRtBackend, TensorRtRtxBackend, OnnxCudaBackend])
def test_without_a_gpu_each_says_why_it_cannot_run_and_what_to_do(backend, bundle: Path):
    reason = available_backends(bundle)[backend.name]
    assert reason is not None and ("pip install" in reason or "clipdit doctor" in reason)
    with pytest.raises(ValueError, match=re.escape(reason)):
        open_backend(bundle, backend.name)
