"""The sampling loop on fused operations, and when it becomes a CUDA graph."""

import copy

import pytest
import torch
from bars import FLOORS
from guarded import DEVICE

from clipdit.backend import Condition, available_backends, open_backend
from clipdit.model.dit import SIZES, DiT
from clipdit.model.ops import PLAIN
from clipdit.pipeline import save_checkpoint
from clipdit.sampling import flow_table, guide, sample, seeded_noise
from clipdit.testing import tiny_checkpoint, tiny_pipeline
from clipdit_kernels import backend as module
from clipdit_kernels import fp8, launch
from clipdit_kernels.backend import TritonBackend
from clipdit_kernels.fused import FUSED, fused_for

STEPS, GUIDANCE = 3, 4.0


def awake(size: str, depth: int, dtype: torch.dtype, **changes) -> DiT:
    """Blocks of a published width; nothing is zero."""
    torch.manual_seed(0)
    width, _, heads = SIZES[size]
    dit = DiT(latent_channels=4, width=width, depth=depth, heads=heads, clip_token_width=24, clip_embedding_width=16, **changes)
    for parameter in dit.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return dit.to(DEVICE, dtype).eval()


def sampled(dit: DiT, condition: Condition) -> torch.Tensor:
    """Three guided Euler steps of one image, carried in at least float32."""
    dtype = dit.dtype

    def velocity(x, t, of):
        return dit(x.to(dtype), t, of.map(lambda tensor: tensor.to(dtype))).to(x.dtype)

    noise = seeded_noise([1], (4, 8, 4), DEVICE, torch.promote_types(dtype, torch.float32))
    with torch.inference_mode():
        return sample(guide(velocity, condition, GUIDANCE), noise, flow_table(STEPS))


@pytest.mark.parametrize(
    "size, depth, dtype, changes",
    [
        ("S", 2, torch.float32, {}),
        ("S", 2, torch.bfloat16, {}),
        ("S", 1, torch.float32, {"mlp": "swiglu", "mlp_ratio": 8 / 3, "norm": "rms"}),
        ("S", 1, torch.float32, {"conditioning": "concat", "qk_norm": False, "positions": "sincos"}),
        ("B", 1, torch.float32, {}),
        ("XL", 1, torch.float32, {}),
    ],
)
def test_a_sampler_over_fused_operations_is_the_plain_one_in_float64(size: str, depth: int, dtype: torch.dtype, changes: dict):
    """In the type it is sampled in, at most 1.25 times as far from float64 as the plain operations, and a floor for each step."""
    torch.manual_seed(1)
    condition = Condition(
        tokens=torch.randn(1, 17, 24, device=DEVICE),
        pooled=torch.randn(1, 16, device=DEVICE),
        latent=torch.randn(1, 4, 8, 4, device=DEVICE),
    )
    dit = awake(size, depth, dtype, **changes)
    wanted = sampled(copy.deepcopy(dit).double(), condition.map(lambda tensor: tensor.double()))
    plain = sampled(dit, condition)
    dit.use(fused_for(dit)[0])
    fused = sampled(dit, condition)
    scale = wanted.abs().max()
    errors = [float((got.double() - wanted).abs().max() / scale) for got in (fused, plain)]
    assert errors[0] <= 1.25 * errors[1] + STEPS * FLOORS[dtype], errors
    assert not torch.equal(fused, plain)  # another order of sums: something else ran


def given(seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return seeded_noise(range(seed, seed + batch), (4, 8, 8)), images


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch):
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(module, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    reason = available_backends(folder)["triton"]
    if not torch.cuda.is_available():
        assert reason == "fused kernels run on NVIDIA GPUs, not on cpu; use the eager backend there"
        with pytest.raises(ValueError, match="fused kernels run on NVIDIA GPUs"):
            TritonBackend.open(folder)


def test_what_stays_plain_is_said_and_why(monkeypatch):
    dit = DiT(latent_channels=4, width=32, depth=1, heads=4, clip_token_width=24, clip_embedding_width=16)
    ops, left = fused_for(dit)
    assert left == dict.fromkeys(("attention", "qkv_attention"), "a head is 8 wide; the kernel takes 16 to 256")
    assert ops.attention is PLAIN.attention and ops.gelu_mlp is FUSED.gelu_mlp
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    assert fused_for(dit)[1].keys() == {"attention", "qkv_attention"}
    assert fused_for(dit.bfloat16())[1].keys() == {"attention", "qkv_attention"}


@torch.inference_mode()
@pytest.mark.parametrize("variant, allowed", [("int8", 0.03), ("fp8", 0.1)])
def test_8_bits_are_variants_near_the_others(variant: str, allowed: float, tmp_path):
    pipeline = tiny_pipeline()
    dit = DiT(latent_channels=4, width=128, depth=1, heads=2, clip_token_width=24, clip_embedding_width=16)
    for parameter in dit.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    pipeline.register_modules(transformer=dit.eval())
    save_checkpoint(pipeline, tmp_path / "checkpoint")
    assert TritonBackend.variants(tmp_path / "checkpoint") == ["fp32", "bf16", "int8", "fp8"]
    noise, images = given(0, 1)
    results = []
    for name in ("triton", f"triton:{variant}"):  # of the same type otherwise
        backend = open_backend(tmp_path / "checkpoint", name)
        on = noise.to(backend.limits.device)
        results.append(backend.sample(on, backend.encode(images), flow_table(2), guidance=2.0))
        backend.close()
    drift = (results[1] - results[0]).norm() / results[0].norm()
    assert 1e-4 < drift < allowed


def test_8_bit_floats_are_refused_where_no_tensor_core_multiplies_them(monkeypatch: pytest.MonkeyPatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert fp8.why_not_on(gpu, torch.bfloat16) == (
        "this GPU has compute capability 8.6; 8-bit floats want 8.9 (Ada) or later. Use int8"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "Open it in bfloat16" in str(fp8.why_not_on(gpu, torch.float16))
    assert fp8.why_not_on(gpu, torch.bfloat16) is None


def test_a_model_that_int8_does_not_take_is_refused_when_it_is_opened(tmp_path):
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"the model is 32 wide; int8 wants a multiple of 128, which share a scale\. Use bf16"):
        open_backend(folder, "triton:int8")


def test_opening_a_checkpoint_changes_none_of_its_files(tmp_path):
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    TritonBackend.open(folder).close()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
