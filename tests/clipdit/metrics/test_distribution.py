"""KID is unbiased and FD is the closed form of Gaussians."""

import pytest
import torch

from clipdit.metrics.distribution import frechet_distance, kid, polynomial_mmd


def draw(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whitened(n: int, width: int, seed: int) -> torch.Tensor:
    """Features with a sample mean of exactly 0 and a sample covariance of exactly 1."""
    x = draw(n, width, seed)
    x = x - x.mean(dim=0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T


def test_mmd_of_four_numbers():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    # k(a, b) = (a b + 1)^3; off the diagonal: k(0, 1) = 1, k(2, 3) = 343; across: 1, 1, 27, 64
    assert polynomial_mmd(x, y) == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4)


def test_kid_of_equal_distributions_is_zero_on_average():
    values = torch.tensor([polynomial_mmd(draw(40, 8, 2 * i), draw(60, 8, 2 * i + 1)) for i in range(100)])
    standard_error = values.std() / 10
    assert abs(values.mean()) < 3 * standard_error
    assert (values < 0).any()  # an estimate that never falls below 0 is biased


def test_kid_grows_with_the_distance_of_the_distributions():
    reference = draw(100, 8, 0)
    values = [kid(draw(100, 8, 1) + shift, reference, subsets=2).mean for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert values[-1] > 1


def test_kid_tells_the_noise_of_its_subsets():
    result = kid(draw(40, 8, 0), draw(300, 8, 1), subsets=20)
    assert result.subset_size == 20
    assert 0 < result.std < 1
    assert result == kid(draw(40, 8, 0), draw(300, 8, 1), subsets=20)


def test_frechet_distance_of_gaussians_with_equal_axes():
    scale_x, scale_y, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5]), torch.tensor([1.0, 0.0, -2.0])
    x, y = whitened(50, 3, 0) * scale_x, whitened(70, 3, 1) * scale_y + shift
    wanted = float(shift.square().sum() + (scale_x - scale_y).square().sum())
    assert frechet_distance(x, y) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(("n", "m", "width"), [(40, 30, 6), (7, 9, 20), (50, 9, 20)])
def test_frechet_distance_agrees_with_matrix_square_roots(n, m, width):
    x, y = draw(n, width, 0), draw(m, width, 1) * 1.5 + 0.3

    def root(matrix: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T

    sx, sy = torch.cov(x.T), torch.cov(y.T)
    wanted = (x.mean(0) - y.mean(0)).square().sum() + (sx + sy - 2 * root(root(sx) @ sy @ root(sx))).trace()
    assert frechet_distance(x, y) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("width", [4, 50])
def test_a_set_is_at_no_distance_from_itself(width):
    x = draw(20, width, 0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_one_image_is_no_distribution():
    with pytest.raises(ValueError, match="2 or more"):
        polynomial_mmd(draw(1, 4, 0), draw(9, 4, 1))
    with pytest.raises(ValueError, match="2 or more"):
        frechet_distance(draw(5, 4, 0), draw(1, 4, 1))
