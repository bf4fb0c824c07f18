"""What every backend promises, on every backend that is installed and can open a checkpoint here.

A new backend needs nothing but its entry point to be held to this. Tolerances: clipdit.testing.
"""

from pathlib import Path

import jaxtyping
import pytest
import torch

from clipdit.backend import Backend, Condition, OneCall, available_backends, open_backend
from clipdit.sampling import guide, sample, seeded_noise
from clipdit.testing import TOLERANCES, tiny_checkpoint
from clipdit.torch_backend import CompiledBackend
from clipdit.translator import Translator
from clipdit_export.backends.base import BundleBackend
from clipdit_export.backends.cuda import OnnxCudaBackend, TensorRtBackend, TensorRtRtxBackend
from clipdit_export.backends.onnx import OnnxBackend
from clipdit_export.backends.openvino import OpenVinoBackend
from clipdit_export.build import build
from clipdit_export.engines.api import capability_here
from clipdit_export.order import Order

OF_BUNDLES: dict[str, type[BundleBackend]] = {
    backend.name: backend for backend in (OnnxBackend, OpenVinoBackend, OnnxCudaBackend, TensorRtBackend, TensorRtRtxBackend)
}
DEVICES = {name: backend.device_type for name, backend in OF_BUNDLES.items()}
SLOW = {CompiledBackend.name}
SLOW_MARKS = [pytest.mark.slow, pytest.mark.timeout(1800)]  # builds kernels for several batch sizes
NAMES = [pytest.param(name, marks=SLOW_MARKS) if name in SLOW else name for name in available_backends()]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Inductor's, about kernels it could not make


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("contract") / "checkpoint")


@pytest.fixture(scope="module")
def folder_for(checkpoint):
    """Backend's name -> what it opens: the checkpoint, or for a backend of bundles what an export makes of it."""
    bundle = checkpoint.with_name("bundle")

    def folder(name: str) -> Path:
        if name in OF_BUNDLES and not bundle.exists():
            engines = [kind.target for kind in (TensorRtBackend, TensorRtRtxBackend) if kind.missing() is None]
            gpus = (capability_here(),) if "tensorrt-rtx" in engines else ()
            build(checkpoint, bundle, Order(targets=("onnx", "openvino", *engines), gpus=gpus, unroll=(2,)))
        return bundle if name in OF_BUNDLES else checkpoint

    return folder


@pytest.fixture(scope="module", params=NAMES)
def backend(request, folder_for):
    folder = folder_for(request.param)
    reason = available_backends(folder)[request.param]
    if reason is not None:
        pytest.skip(reason)
    backend = open_backend(folder, request.param, device=DEVICES.get(request.param, "cpu"), dtype=torch.float32)
    # torch.compile breaks its graph at every call that is checked: it would build hundreds of small kernels, and not ours
    jaxtyping.config.update("jaxtyping_disable", request.param in SLOW)
    yield backend
    jaxtyping.config.update("jaxtyping_disable", False)
    backend.close()


@pytest.fixture
def sources(backend):
    height, width = backend.limits.native_size
    return torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def latents(backend):
    return seeded_noise([1, 2, 3], backend.limits.latent_shape(*backend.limits.native_size), backend.limits.device)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def close(got: torch.Tensor, wanted: torch.Tensor, backend: Backend) -> bool:
    """Within the tolerance of the backend's dtype."""
    got, wanted, tolerance = got.float().cpu(), wanted.float().cpu(), TOLERANCES[backend.limits.dtype]
    return bool((got - wanted).abs().max() <= tolerance.relative * wanted.abs().max())


def largest_difference(got: torch.Tensor, wanted: torch.Tensor) -> int:
    return int((got.int() - wanted.int()).abs().max())


def test_it_says_what_it_is(backend):
    assert isinstance(backend, Backend)
    assert backend.name in available_backends()
    assert len(backend.fingerprint) == 64 and backend.fingerprint == backend.fingerprint
    assert backend.defaults.steps >= 1 and backend.limits.dtype in TOLERANCES
    assert all(side % backend.limits.multiple == 0 for side in backend.limits.native_size)


def test_condition_has_the_shapes_of_the_legend_and_is_finite(backend, sources):
    condition = backend.encode(sources)
    assert condition.latent.shape == (3, *backend.limits.latent_shape(*backend.limits.native_size))
    assert condition.tokens.ndim == 3 and condition.pooled.ndim == 2
    for tensor in (condition.tokens, condition.pooled, condition.latent):
        assert len(tensor) == 3 and tensor.isfinite().all() and tensor.device.type == backend.limits.device.type


def test_velocity_is_like_x_and_finite_from_noise_to_target(backend, sources, latents):
    condition = backend.encode(sources)
    for t in (0.0, 0.5, 1.0):
        f = backend.velocity(latents, torch.full((3,), t, device=latents.device), condition)
        assert f.shape == latents.shape and f.dtype == latents.dtype and f.isfinite().all()


def test_velocity_depends_on_x_on_time_on_source_and_on_nothing_else(backend, sources, latents):
    condition = backend.encode(sources)
    half = torch.full((3,), 0.5, device=latents.device)
    f = backend.velocity(latents, half, condition)
    assert torch.equal(backend.velocity(latents, half, condition), f)
    assert close(backend.velocity(latents, half, backend.encode(sources)), f, backend)
    assert not close(backend.velocity(latents.flip(0), half, condition), f, backend)
    assert not close(backend.velocity(latents, half / 2, condition), f, backend)
    assert not close(backend.velocity(latents, half, backend.encode(sources.flip(0))), f, backend)
    assert not close(backend.velocity(latents, half, condition.null()), f, backend)


def test_each_image_of_a_call_has_its_own_time(backend, sources, latents):
    condition = backend.encode(sources)
    times = torch.tensor([0.1, 0.5, 0.9], device=latents.device)
    f = backend.velocity(latents, times, condition)
    for i in range(3):
        one = condition.map(lambda tensor, i=i: tensor[i : i + 1])
        assert close(backend.velocity(latents[i : i + 1], times[i : i + 1], one), f[i : i + 1], backend)


def test_decode_gives_pixels_of_the_size_that_was_encoded(backend, sources):
    image = backend.decode(backend.encode(sources).latent)
    assert image.shape == sources.shape and image.dtype == torch.uint8
    extreme = backend.decode(100 * backend.encode(sources).latent)  # clipped, not wrapped around
    assert extreme.dtype == torch.uint8 and extreme.shape == sources.shape


def test_numbers_that_are_not_finite_are_refused_and_not_drawn(backend, sources):
    latent = backend.encode(sources).latent.clone()
    latent[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite|NaN"):
        backend.decode(latent)


def test_inputs_are_left_unchanged(backend, sources, latents):
    condition = backend.encode(sources)
    times = torch.full((3,), 0.5, device=latents.device)
    given = [sources, latents, times, condition.tokens, condition.pooled, condition.latent]
    before = [tensor.clone() for tensor in given]
    backend.encode(sources), backend.velocity(latents, times, condition), backend.decode(condition.latent)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_same_seed_gives_same_image_in_any_batch(backend, sources, guidance):
    translator, levels = Translator(backend), TOLERANCES[backend.limits.dtype].levels
    given = {"guidance": guidance, "steps": 2}
    together = translator(sources, seeds=[5, 6, 7], **given)
    assert largest_difference(translator(sources.flip(0), seeds=[7, 6, 5], **given).flip(0), together) <= levels
    for i in range(3):
        assert largest_difference(translator(sources[i : i + 1], seeds=[5 + i], **given), together[i : i + 1]) <= levels
    assert largest_difference(translator(sources, seeds=[1, 2, 3], **given), together) > levels


def test_agrees_with_eager(backend, checkpoint, sources):
    if backend.name == "fake":
        pytest.skip("has a model of its own")
    eager = open_backend(checkpoint, "eager", device="cpu", dtype=torch.float32)
    condition, wanted = backend.encode(sources), eager.encode(sources)
    for name in ("tokens", "pooled", "latent"):
        assert close(getattr(condition, name), getattr(wanted, name), backend), name
    ours, theirs = (Translator(b)(sources, seeds=[1, 2, 3], guidance=1.5) for b in (backend, eager))
    assert largest_difference(ours, theirs) <= TOLERANCES[backend.limits.dtype].levels
    assert backend.fingerprint == eager.fingerprint


@pytest.mark.parametrize(("steps", "guidance"), [(2, 1.5), (3, 1.0)])
def test_whole_loop_is_the_loop(backend, sources, latents, steps, guidance):
    if not hasattr(backend, "sample"):
        pytest.skip("offers no whole loop")
    condition, table = backend.encode(sources), backend.table(steps)
    wanted = sample(guide(backend.velocity, condition, guidance), latents, table)
    assert close(backend.sample(latents, condition, table, guidance=guidance), wanted, backend)


def test_one_call_is_the_same_translation_as_its_parts(backend, sources, latents):
    table = backend.table(2)
    if not isinstance(backend, OneCall) or not backend.is_one_call(backend.limits.native_size, table, 1.0):
        pytest.skip("holds no translation as one call")
    parts = backend.decode(sample(guide(backend.velocity, backend.encode(sources), 1.0), latents, table))
    whole = backend.translate(sources, latents, table, guidance=1.0)
    assert whole.dtype == torch.uint8 and largest_difference(whole, parts) <= TOLERANCES[backend.limits.dtype].levels
    assert not backend.is_one_call(backend.limits.native_size, table, 2.0)  # no graph of another guidance, or other steps,
    assert not backend.is_one_call(backend.limits.native_size, backend.table(3), 1.0)  # is taken for it


def test_table_takes_the_steps_and_refuses_unknown_solvers(backend):
    assert backend.table(3).steps == 3
    with pytest.raises(ValueError, match="no_such_solver"):
        backend.table(3, "no_such_solver")


def test_limits_are_enforced_in_words(backend, sources):
    multiple = backend.limits.multiple
    for wrong in (sources[..., : sources.shape[-1] - 1], sources[0], sources[..., :0], torch.cat([sources, sources], dim=1)):
        with pytest.raises((ValueError, TypeError), match=r"multiples of|wanted \(B, 3, H, W\)|takes|source_u8"):
            backend.encode(wrong)
    with pytest.raises(ValueError, match=f"multiples of {multiple}|takes"):
        backend.limits.check_images((1, 3, multiple + 1, multiple))


def test_condition_of_another_batch_is_refused(backend, sources, latents):
    condition = backend.encode(sources)
    with pytest.raises(ValueError):
        backend.velocity(latents[:2], torch.full((2,), 0.5, device=latents.device), condition)


def test_what_is_kept_for_a_condition_goes_with_it(backend, sources, latents):
    contexts = getattr(backend, "_contexts", None)
    if contexts is None:
        pytest.skip("keeps nothing for a condition")
    condition = backend.encode(sources)
    backend.velocity(latents, torch.full((3,), 0.5, device=latents.device), condition)
    kept = len(contexts)
    del condition
    assert len(contexts) == kept - 1


@pytest.mark.parametrize("name", NAMES)
def test_every_call_after_close_says_so(name, folder_for):
    folder = folder_for(name)
    if available_backends(folder)[name] is not None:
        pytest.skip("cannot run here")
    backend = open_backend(folder, name, device="cpu")
    height, width = backend.limits.native_size
    source = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    x = torch.zeros(1, *backend.limits.latent_shape(height, width))
    backend.close()
    backend.close()  # twice is as good as once
    condition = Condition(tokens=torch.zeros(1, 1, 1), pooled=torch.zeros(1, 1), latent=x)
    calls = [lambda: backend.encode(source), lambda: backend.velocity(x, torch.zeros(1), condition), lambda: backend.decode(x)]
    for call in calls:
        with pytest.raises(RuntimeError, match="closed"):
            call()
