"""Eager: the networks of a checkpoint folder, asked the way everything else is compared with."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipdit.backend import available_backends, builtin_checkpoint, locate, open_backend
from clipdit.diffusion import DDPM
from clipdit.images import to_float
from clipdit.model.dit import DiT
from clipdit.pipeline import load_checkpoint
from clipdit.sampling import seeded_noise
from clipdit.testing import TOLERANCES, tiny_checkpoint, tiny_pipeline
from clipdit.torch_backend import CompiledBackend, EagerBackend, best_dtype, checkpoint_fingerprint
from clipdit.translator import Translator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def sources():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_eager_is_what_a_checkpoint_folder_opens_with(folder):
    assert next(name for name, reason in available_backends(folder).items() if reason is None) == "eager"
    backend = open_backend(str(folder))
    assert isinstance(backend, EagerBackend) and backend.name == "eager"
    limits = backend.limits
    assert (limits.multiple, limits.downscale, limits.latent_channels, limits.native_size) == (8, 4, 4, (32, 32))
    assert backend.defaults.steps == 4


@pytest.mark.parametrize("conditioning", ["both", "clip", "concat"])
def test_velocity_is_the_networks_forward(sources, conditioning):
    pipeline = tiny_pipeline(conditioning=conditioning)
    backend = EagerBackend(pipeline)
    condition = backend.encode(sources)
    x, t = seeded_noise([1, 2, 3], (4, 8, 8)), torch.tensor([0.0, 0.4, 1.0])
    torch.testing.assert_close(backend.velocity(x, t, condition), pipeline.transformer(x, t, condition))


def test_condition_is_the_latent_and_what_clip_sees(sources):
    pipeline = tiny_pipeline()
    condition = EagerBackend(pipeline).encode(sources)
    image = to_float(sources)
    torch.testing.assert_close(condition.latent, pipeline.autoencoder.encode(image))
    assert pipeline.clip is not None
    tokens, pooled = pipeline.clip(image)
    torch.testing.assert_close(condition.tokens, tokens)
    torch.testing.assert_close(condition.pooled, pooled)


def test_model_without_clip_has_an_empty_clip_condition(sources):
    condition = EagerBackend(tiny_pipeline(conditioning="concat")).encode(sources)
    assert condition.tokens.shape == (3, 0, 24) and condition.pooled.shape == (3, 16) and not condition.pooled.any()


@pytest.mark.parametrize(("guidance", "contexts"), [(1.0, 1), (2.0, 1)])
def test_what_the_source_decides_is_computed_once_an_image(sources, monkeypatch, guidance, contexts):
    calls = []
    context = DiT.context
    monkeypatch.setattr(DiT, "context", lambda self, condition: calls.append(condition) or context(self, condition))
    Translator(EagerBackend(tiny_pipeline()))(sources, seeds=[1, 2, 3], steps=5, guidance=guidance)
    assert len(calls) == contexts


def test_noise_prediction_translates_with_its_own_solvers(sources):
    translator = Translator(EagerBackend(tiny_pipeline(objective=DDPM(timesteps=100))))
    assert translator.settings().solver == "ddim"
    for solver in ("ddim", "ddpm", "dpmpp_2m"):
        together = translator(sources, seeds=[1, 2, 3], solver=solver, steps=6)
        alone = translator(sources[1:2], seeds=[2], solver=solver, steps=6)
        assert (together[1:2].int() - alone.int()).abs().max() <= TOLERANCES[torch.float32].levels
    with pytest.raises(ValueError, match=r"euler.*ddim, ddpm, dpmpp_2m"):
        translator(sources, seeds=[1, 2, 3], solver="euler")


def test_any_size_the_patches_divide(sources):
    translator = Translator(EagerBackend(tiny_pipeline()))
    wide = torch.cat([sources, sources.flip(-1)], dim=-1)
    assert translator(wide, seeds=[1, 2, 3]).shape == (3, 3, 32, 64)
    with pytest.raises(ValueError, match="both sides must be multiples of 8"):
        translator(wide[..., :60], seeds=[1, 2, 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float32(folder, sources, dtype):
    low, full = Translator.open(folder, dtype=dtype), Translator.open(folder, dtype=torch.float32)
    assert low.backend.limits.dtype == dtype
    difference = low(sources, seeds=[1, 2, 3]).int() - full(sources, seeds=[1, 2, 3]).int()
    assert difference.abs().max() <= TOLERANCES[dtype].levels


def test_pipeline_call_is_the_translators(folder, sources):
    pipeline = load_checkpoint(folder)
    expected = Translator(EagerBackend(pipeline))(sources, seeds=[4, 5, 6], steps=3)
    assert torch.equal(pipeline(sources, seeds=[4, 5, 6], steps=3), expected)
    assert torch.equal(Translator.open(folder, device="cpu")(sources, seeds=[4, 5, 6], steps=3), expected)


def test_fingerprint_is_of_what_matters_to_the_result(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("another card")
    (copy / "experiment.json").write_text("{}")
    assert checkpoint_fingerprint(copy) == checkpoint_fingerprint(folder) == open_backend(folder).fingerprint

    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"latents_mean": [0.0] * 4}))
    configured = checkpoint_fingerprint(copy)
    (weights,) = (copy / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["latent_in.bias"] += 1e-3
    save_file(tensors, weights)
    assert len({checkpoint_fingerprint(folder), configured, checkpoint_fingerprint(copy)}) == 3


def test_unsaved_pipelines_are_never_taken_for_one_another():
    a, b = EagerBackend(tiny_pipeline()), EagerBackend(tiny_pipeline())
    assert a.fingerprint == a.fingerprint != b.fingerprint


def test_folders_that_cannot_be_opened_say_why(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (weights,) = (damaged / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    for path, message in [
        (tmp_path / "nothing", "there is no folder .*nothing"),
        (tmp_path / "empty", "holds no model_index.json"),
        (damaged, "damaged"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            open_backend(path)
        assert "\n" not in str(raised.value)
    assert "holds no model_index.json" in str(available_backends(tmp_path / "empty")["eager"])


def test_devices_and_dtypes_that_are_not_there_are_named(folder):
    with pytest.raises(ValueError, match="device is nonsense"):
        open_backend(folder, device="nonsense")
    with pytest.raises(ValueError, match="device is cuda:99, but PyTorch sees"):
        open_backend(folder, device="cuda:99")
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; wanted float32"):
        open_backend(folder, dtype=torch.int8)
    assert best_dtype(torch.device("cpu")) == torch.float32


def test_built_in_checkpoint_lies_in_the_package():
    assert builtin_checkpoint().parts[-3:] == ("clipdit", "assets", "edges2emoji")
    assert locate("built-in") == str(builtin_checkpoint())
    assert locate("somewhere/else") == "somewhere/else"


def test_an_installation_without_a_built_in_checkpoint_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("clipdit.backend.builtin_checkpoint", lambda: tmp_path)
    with pytest.raises(ValueError, match="this installation has no built-in checkpoint; name another, by folder or hub id"):
        open_backend("built-in")


def test_every_kind_of_block_stays_compiled_at_any_batch(monkeypatch):
    """PyTorch's own limit is eight ways to compile a function, and it runs the ninth slowly, with no more than a log line."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    pipeline = tiny_pipeline()
    settings = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
    pipeline.register_modules(transformer=DiT(**(settings | {"depth": 3, "cross_attention_every": 2})))
    backend, plain = CompiledBackend(pipeline), EagerBackend(pipeline)
    with torch.inference_mode(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch in (1, 2, 8, 5):
            source = torch.randint(0, 256, (batch, 3, *pipeline.native_size), dtype=torch.uint8)
            condition, noise = plain.encode(source), torch.randn(batch, 4, 8, 8)
            got = backend.velocity(noise, torch.rand(batch), condition)
            assert got.shape == noise.shape and got.isfinite().all()


def test_compiled_blocks_are_the_backends_own_and_share_their_weights():
    """A pipeline that is used, and not changed: its own blocks stay as they are, and what is trained on is what is computed."""
    pipeline = tiny_pipeline()
    dit, backend = pipeline.transformer, CompiledBackend(pipeline)
    twin = backend._step.__self__  # pyright: ignore[reportOptionalMemberAccess]  (a method's owner)
    assert twin is not dit and len(twin.blocks) == len(dit.blocks)
    for own, block in zip(twin.blocks, dit.blocks, strict=True):
        assert own._compiled_call_impl is not None and block._compiled_call_impl is None
    shared = dict(twin.named_parameters())
    assert shared.keys() == dict(dit.named_parameters()).keys()
    assert all(parameter is shared[name] for name, parameter in dit.named_parameters())
    assert list(dit.state_dict()) == list(twin.state_dict())
