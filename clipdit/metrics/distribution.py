"""How far a set of images is from another set, as sets of features: KID and the Fréchet distance.

Neither asks which image belongs to which, so they measure realism and not faithfulness. The features are handed in (features.py);
a distance is named after the network they come from.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KID:
    """Kernel distance between two sets of features: 0 in the mean for equal distributions, so at times below; lower is nearer."""

    mean: float
    """Unbiased estimate from all features."""
    std: float
    """Deviation of the estimate over random subsets of `subset_size`: its noise at that size, larger than that of `mean`."""
    subset_size: int


def polynomial_mmd(x: Float[Tensor, "n F"], y: Float[Tensor, "m F"]) -> float:
    """Unbiased squared MMD with the kernel (x.y / F + 1)^3 (Binkowski et al. 2018, sec. 3 and appendix).

    Raises ValueError with fewer than 2 images in a set. Computed in float64.
    """
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"KID compares sets of {len(x)} and {len(y)} images; it needs 2 or more in each")
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    return float(mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean())


def kid(x: Float[Tensor, "n F"], y: Float[Tensor, "m F"], *, subsets: int = 50, subset_size: int = 100, seed: int = 0) -> KID:
    """KID of two sets of features, with its deviation over `subsets` subsets of at most half of the smaller set."""
    size = max(2, min(subset_size, len(x) // 2, len(y) // 2))
    random = np.random.default_rng(seed)

    def some(features: Tensor) -> Tensor:
        return features[torch.from_numpy(random.choice(len(features), size, replace=False))]

    mean = polynomial_mmd(x, y)
    values = [polynomial_mmd(some(x), some(y)) for _ in range(subsets)]
    return KID(mean=mean, std=float(np.std(values)), subset_size=size)


def frechet_distance(x: Float[Tensor, "n F"], y: Float[Tensor, "m F"]) -> float:
    """Squared Fréchet distance of the two sets taken as Gaussians (Heusel et al. 2017), lower is nearer:
    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^1/2).

    Biased upwards in small sets (n below a few thousand): compare only values of equal n. With S = A^T A, A the (n, F) centred
    features / sqrt(n - 1), tr (S_x S_y)^1/2 is the sum of the singular values of A_x A_y^T, an (n, m) matrix: exact for n < F
    too, where the matrix square root of a singular product is not.
    """
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"the Fréchet distance compares sets of {len(x)} and {len(y)} images; it needs 2 or more in each")
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    a, b = (x - mean_x) / (len(x) - 1) ** 0.5, (y - mean_y) / (len(y) - 1) ** 0.5
    if max(len(x), len(y)) > x.shape[1]:  # many images: (F, F) triangles of A = Q R have the same singular products
        a, b = (torch.linalg.qr(m, mode="r").R if len(m) > m.shape[1] else m for m in (a, b))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)
