"""Guidance and a row of the sampling table in one pass."""

import pytest
import torch
from bars import close, doubles
from guarded import DEVICE, Guarded

from clipdit.diffusion import DDPM
from clipdit.model import ops as plain
from clipdit.sampling import SamplingTable, flow_table, sample
from clipdit_kernels import fused
from clipdit_kernels.launch import Unsupported

ROW = torch.tensor([0.3, 0.9, -0.4, 0.7, 0.0, 0.2], device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guidance", [1.0, 4.0, 7.5])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 5, 9, 11), (2, 16, 32, 32)])
def test_a_guided_row(shape: tuple[int, ...], guidance: float, dtype: torch.dtype):
    make = Guarded()
    copies = 1 if guidance == 1.0 else 2
    x, memory, row = make.randn(*shape), make.randn(*shape), make.put(ROW)
    f = make.randn(copies * shape[0], *shape[1:], dtype=dtype)
    got = fused.guided_step(x, memory, f, row, guidance=guidance)
    wanted = plain.guided_step(*doubles((x, memory, f, row)), guidance=guidance)
    like = plain.guided_step(x, memory, f, row, guidance=guidance)
    assert close(got, wanted, like=like) and got[2].dtype == dtype and make.untouched()


TABLES = [flow_table(5), flow_table(4, "heun"), flow_table(6, "dpmpp_2m"), DDPM().table(5, "ddim"), DDPM().table(6, "dpmpp_2m")]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.solver}-{table.steps}")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("ops", [plain, fused], ids=["plain", "fused"])
def test_rows_in_turn_are_the_sampling_loop(ops, guidance: float, table: SamplingTable):
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    target = noise.flip(0)

    def velocity(x, t, condition=None):
        answers = (target - x) * (1 - 0.3 * t[:, None, None, None])
        return answers if guidance == 1.0 else torch.cat([answers, 0.5 * x])

    def guided(x, t):
        given, blank = velocity(x, t).chunk(2)
        return blank + guidance * (given - blank)

    wanted = sample(velocity if guidance == 1.0 else guided, noise, table)
    rows, x, memory = table.tensor(DEVICE), noise, torch.zeros_like(noise)
    for row in rows:
        x, memory, _ = ops.guided_step(x, memory, velocity(x, row[:1].expand(2)), row, guidance=guidance)
    torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)


X = torch.zeros(2, 4, 4, 4, device=DEVICE)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"x": X.half()}, "x is of torch.float16; wanted float32, in which latents are carried"),
        ({"x": X[:0], "f": X[:0], "memory": X[:0]}, r"x is empty, \(0, 4, 4, 4\)"),
        ({"memory": X[:1]}, r"memory has shape \(1, 4, 4, 4\); wanted \(2, 4, 4, 4\)"),
        ({"f": X, "guidance": 2.0}, r"f has shape \(2, 4, 4, 4\); wanted \(4, 4, 4, 4\)"),
        ({"f": X.mT}, "f has strides"),
        ({"row": ROW[:5]}, r"row has shape \(5,\); wanted \(6,\): time, a, b, c, d, e"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(change: dict, said: str):
    with pytest.raises(Unsupported, match=f"guided_step: {said}"):
        fused.guided_step(**{"x": X, "memory": X, "f": X, "row": ROW} | change)
