"""When the loop of a backend becomes a CUDA graph, and what it then computes. On a CPU recording stands in for the graph."""

import copy

import pytest
import torch

from clipdit.backend import available_backends, open_backend
from clipdit.diffusion import DDPM
from clipdit.graphed_backend import GRAPHS, GraphedBackend
from clipdit.sampling import flow_table, seeded_noise
from clipdit.testing import tiny_checkpoint, tiny_pipeline
from clipdit.torch_backend import EagerBackend


class Recorded(GraphedBackend):
    """Recording stands in for a CUDA graph: it runs again on the memory it was given, and writes where its result lay."""

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.limits = copy.copy(self.limits)
        self._captures = True
        self.recorded = self.replayed = 0

    def _record(self, run):
        result = run()
        self.recorded += 1

        def replay():
            self.replayed += 1
            result.copy_(run())

        return replay, result


@pytest.fixture
def recorded() -> Recorded:
    return Recorded(tiny_pipeline())


def given(seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return seeded_noise(range(seed, seed + batch), (4, 8, 8)), images


def eager(noise, images, table, guidance) -> torch.Tensor:
    backend = EagerBackend(tiny_pipeline())
    return backend.sample(noise, backend.encode(images), table, guidance=guidance)


@torch.inference_mode()
def test_a_loop_is_captured_at_its_second_call_and_replayed_from_then_on(recorded: Recorded):
    for i, guidance in enumerate([2.0, 2.0, 2.0, 2.0]):
        noise, images = given(i)  # each replay reads its own noise and its own source
        result = recorded.sample(noise, recorded.encode(images), flow_table(3), guidance=guidance)
        torch.testing.assert_close(result, eager(noise, images, flow_table(3), guidance), rtol=1e-4, atol=1e-4)
    assert (recorded.recorded, recorded.replayed) == (1, 3)


@torch.inference_mode()
def test_what_a_replay_returned_is_not_overwritten_by_the_next(recorded: Recorded):
    results = []
    for i in range(4):
        noise, images = given(i)
        results.append(recorded.sample(noise, recorded.encode(images), flow_table(2)))
    kept = [result.clone() for result in results[:3]]
    assert all(torch.equal(a, b) for a, b in zip(results, kept, strict=False)) and not torch.equal(results[2], results[3])


@torch.inference_mode()
def test_every_shape_table_and_guidance_has_its_own_and_the_oldest_goes(recorded: Recorded):
    kinds = [(batch, steps, guidance) for batch in (1, 2) for steps in (1, 2, 3) for guidance in (1.0, 2.0)]
    for batch, steps, guidance in kinds:
        for _ in range(2):
            noise, images = given(0, batch)
            result = recorded.sample(noise, recorded.encode(images), flow_table(steps), guidance=guidance)
            torch.testing.assert_close(result, eager(noise, images, flow_table(steps), guidance), rtol=1e-4, atol=1e-4)
    assert recorded.recorded == len(kinds) and len(recorded._graphs) == GRAPHS


@torch.inference_mode()
def test_a_closed_backend_says_so(recorded: Recorded):
    noise, images = given(0)
    condition = recorded.encode(images)
    recorded.close()
    with pytest.raises(RuntimeError, match="the graphed backend is closed"):
        recorded.sample(noise, condition, flow_table(2))


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.inference_mode()
def test_a_loop_over_tokens_is_the_loop_over_latents(solver: str, guidance: float):
    """Guidance and solvers treat every number alike, so it does not matter how they lie; memories of two rows included."""
    noise, images = given(0)
    table = flow_table(4, solver)
    backend = GraphedBackend(tiny_pipeline())
    result = backend.sample(noise, backend.encode(images), table, guidance=guidance)
    torch.testing.assert_close(result, eager(noise, images, table, guidance), rtol=2e-5, atol=2e-5)


@torch.inference_mode()
def test_a_model_that_predicts_noise_is_sampled_too():
    pipelines = [tiny_pipeline(objective=DDPM()) for _ in range(2)]
    noise, images = given(0)
    results = []
    for backend in (EagerBackend(pipelines[0]), GraphedBackend(pipelines[1])):
        results.append(backend.sample(noise, backend.encode(images), backend.table(3, "ddim"), guidance=2.0))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


WAITING = ["item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero"]
"""Ways to ask a tensor for its numbers, for which the host would wait; a loop that does cannot be captured."""


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.inference_mode()
def test_the_loop_asks_no_number_of_a_device(guidance: float, monkeypatch: pytest.MonkeyPatch):
    noise, images = given(0)
    backend = GraphedBackend(tiny_pipeline())
    condition, asked = backend.encode(images), []
    backend.sample(noise, condition, flow_table(2), guidance=guidance)  # the table and the positions are uploaded once

    def noted(name: str):
        plainly = getattr(torch.Tensor, name)
        return lambda self, *arguments, **options: (asked.append(name), plainly(self, *arguments, **options))[1]

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, noted(name))
    backend.sample(noise, condition, flow_table(2), guidance=guidance)
    assert asked == []
    assert bool(noise.sum() > noise.max().item()) is not None and set(asked) >= {"item", "__bool__"}  # it would have been noticed


def test_without_a_gpu_it_says_what_to_use(tmp_path):
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    reason = "CUDA graphs run on NVIDIA GPUs, not on cpu; use the eager backend there"
    with pytest.raises(ValueError, match=reason):
        open_backend(folder, "graphed", device="cpu")
    if not torch.cuda.is_available():
        assert available_backends(folder)["graphed"] == reason
