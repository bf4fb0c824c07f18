"""The order of examples and all randomness follow from the seed and the step: nothing has to be saved to go on exactly."""

import numpy as np
import pytest
import torch

from clipdit.train.order import batch_indices, rank_slice, step_generator


def order(size: int, batch: int, steps: int, seed: int = 0) -> np.ndarray:
    return np.concatenate([batch_indices(size, batch, step, seed) for step in range(steps)])


@pytest.mark.parametrize("size, batch", [(12, 4), (10, 4), (3, 8), (7, 7)])
def test_every_example_comes_once_an_epoch_and_epochs_follow_without_a_gap(size, batch):
    epochs = 5
    drawn = order(size, batch, -(-epochs * size // batch))[: epochs * size].reshape(epochs, size)
    assert (np.sort(drawn, axis=1) == np.arange(size)).all()


def test_epochs_and_seeds_are_shuffled_differently():
    first, second = order(100, 100, 2).reshape(2, 100)
    assert (first != second).any()
    assert (first != np.arange(100)).any()
    assert (first != order(100, 100, 1, seed=1)).any()


def test_a_batch_does_not_depend_on_those_drawn_before():
    wanted = [batch_indices(10, 4, step, 3) for step in range(20)]
    for step in (17, 2, 19, 0, 17):
        assert (batch_indices(10, 4, step, 3) == wanted[step]).all()


def test_random_numbers_of_a_step_follow_from_seed_and_step():
    def numbers(seed: int, step: int) -> list[float]:
        return torch.rand(4, generator=step_generator(seed, step)).tolist()

    assert numbers(0, 7) == numbers(0, 7)
    assert len({tuple(numbers(seed, step)) for seed in range(3) for step in range(50)}) == 150


def test_processes_and_parts_share_a_batch_without_loss_or_repetition():
    batch = {"image": torch.arange(24).reshape(12, 2), "time": torch.arange(12)}
    shares = [rank_slice(batch, rank, 3) for rank in range(3)]
    parts = [rank_slice(share, part, 2) for share in shares for part in range(2)]
    for pieces in (shares, parts):
        assert len({len(piece["time"]) for piece in pieces}) == 1
        for name, rows in batch.items():
            assert torch.equal(torch.cat([piece[name] for piece in pieces]), rows)
