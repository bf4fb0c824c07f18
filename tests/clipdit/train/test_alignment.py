"""REPA: which tokens are compared with which, where the gradient goes, and what of it stays in a checkpoint: nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from clipdit.backend import Condition
from clipdit.data.pairs import find_pairs
from clipdit.images import to_float
from clipdit.model.dit import DiT
from clipdit.train.alignment import Alignment
from clipdit.train.loop import train
from clipdit.train.runs import run, translation_task
from clipdit.train.translation import LossSettings, TranslationTask


def network(depth: int = 6) -> DiT:
    torch.manual_seed(0)
    dit = DiT(latent_channels=4, width=32, depth=depth, heads=2, conditioning="concat")
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return dit


def run_once(dit: DiT) -> torch.Tensor:
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return dit(z, torch.tensor([0.2, 0.7]), Condition(tokens=z.new_zeros(2, 0, 1), pooled=z.new_zeros(2, 1), latent=z))


def test_it_is_one_minus_the_cosine_with_the_tokens_behind_a_third_of_the_blocks():
    dit, seen = network(), []
    alignment = Alignment(dit, 32)
    alignment.project = nn.Sequential()  # the tokens themselves
    dit.blocks[1].register_forward_hook(lambda block, arguments, output: seen.append(output[0]))
    run_once(dit)
    tokens = seen[0].detach()  # 2 x 16 x 32
    for wanted, expected in ((tokens, 0.0), (-3 * tokens, 2.0)):
        run_once(dit)
        torch.testing.assert_close(alignment((4, 4), wanted), torch.full((2,), expected), atol=1e-5, rtol=0)


def test_another_grid_is_brought_to_the_tokens():
    dit = network()
    alignment = Alignment(dit, 32)
    run_once(dit)
    assert alignment._tokens is not None
    direction = nn.functional.normalize(torch.ones(32), dim=0)
    expected = 1 - alignment.project(alignment._tokens) @ direction / alignment.project(alignment._tokens).norm(dim=-1)
    torch.testing.assert_close(alignment((4, 4), torch.ones(2, 49, 32)), expected.mean(1))


def test_its_gradient_reaches_the_blocks_before_and_none_behind():
    dit = network()
    alignment = Alignment(dit, 8)
    run_once(dit)
    alignment((4, 4), torch.randn(2, 16, 8)).mean().backward()
    reached = [any(p.grad is not None and bool(p.grad.any()) for p in block.fc1.parameters()) for block in dit.blocks]
    assert reached == [True, True, False, False, False, False]
    assert all(p.grad is not None for p in alignment.parameters())


@pytest.mark.parametrize("model", [{}, {"conditioning": "concat"}])
def test_a_batch_holds_clips_tokens_of_its_targets_whether_or_not_the_model_reads_clip(
    model: dict, tiny_experiment, pairs_folder: Path, tmp_path: Path
):
    pairs = find_pairs(pairs_folder).split("train")
    task = translation_task(tiny_experiment(model=model, loss=LossSettings(alignment=0.5)), pairs, pairs, tmp_path)
    assert isinstance(task, TranslationTask) and task.clip is not None and task.weights["alignment"] == 0.5
    images = torch.stack([image.flip(-1) if f else image for p in pairs for image in [p.read()[1]] for f in (0, 1)])
    with torch.no_grad():
        known = task.clip(to_float(images))[0]
    batch = task.draw(0)
    assert ("tokens" in batch) == (not model)
    for tokens in batch["target_tokens"]:
        assert (known - tokens).abs().amax((1, 2)).min() < 5e-3  # float16 in the cache
    losses = task.module(batch)
    assert losses["alignment"].shape == (4,) and bool((losses["alignment"] > 0.1).all())


def test_it_is_learnt_and_leaves_no_trace_in_the_checkpoint(tiny_experiment, pairs_folder: Path, tmp_path: Path):
    experiment = tiny_experiment(train={"steps": 60, "lr": 3e-3}, loss=LossSettings(alignment=1.0))
    pairs = find_pairs(pairs_folder).split("train")
    task = translation_task(experiment, pairs, pairs, tmp_path / "cache-of-it")
    before = task.module(task.draw(0))["alignment"].mean().item()
    train(task, experiment.train, tmp_path / "run", experiment={})
    assert task.module(task.draw(0))["alignment"].mean().item() < 0.7 * before
    with safe_open(tmp_path / "run" / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as saved:
        assert not [name for name in saved.keys() if "project" in name]  # noqa: SIM118  (it is no dict)


def test_a_run_with_it_goes_on_from_where_it_stopped(tiny_experiment, pairs_folder: Path, tmp_path: Path):
    experiment = tiny_experiment(train={"steps": 3}, loss=LossSettings(alignment=0.5))
    run(experiment, "edges2emoji", pairs_folder, tmp_path / "run")
    longer = replace(experiment, train=replace(experiment.train, steps=5))
    assert run(longer, "edges2emoji", pairs_folder, tmp_path / "run", resume=True).step == 5


def test_it_needs_a_clip(tiny_experiment):
    with pytest.raises(ValueError, match=r"loss.alignment needs CLIP; give --clip, or --loss.alignment 0"):
        tiny_experiment(model={"conditioning": "concat"}, clip=None, loss=LossSettings(alignment=0.5))
