"""Cosines of gradients, and their reliability, from inner products between parts of the images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement

import torch
from torch import Tensor


ESTIMATORS = ("unbiased", "plain")


def gram(features: Tensor) -> Tensor:
    """Inner products of all rows: float64 `(parts, parts, timesteps, timesteps)`.

    Args:
        features: float32 `(parts, timesteps, size)` on the CPU.
    """
    num_parts, num_timesteps, _ = features.shape
    products = torch.zeros(num_parts, num_parts, num_timesteps, num_timesteps, dtype=torch.float64)
    for columns in features.split(1024, dim=2):  # all of them in float64 would take twice the memory
        columns = columns.double()
        for i, j in combinations_with_replacement(range(num_parts), 2):
            products[i, j].addmm_(columns[i], columns[j].T)
    for i, j in combinations(range(num_parts), 2):
        products[j, i] = products[i, j].T
    return products


def cosines(products: Tensor, estimator: str) -> Tensor:
    r"""Cosines of the gradients of n timesteps, of which the inner products between parts of the images are known.

    With $g_t^i$ the gradient at timestep t over the images of part i, of k parts:

    * `"plain"`: cosines of the gradients over all images, $\frac{1}{k} \sum_i g_t^i$, as in ANT (arXiv 2306.00354).
      The images and their noise are the same at all timesteps, so what finitely many of them add to the expected
      gradient is alike at neighbouring timesteps, and part of these cosines.
    * `"unbiased"`: products of independent images only,
      $K_{st} = \frac{1}{k(k-1)} \sum_{i \ne j} \langle g_s^i, g_t^j \rangle$, whose expectations are the inner
      products of the expected gradients. The cosine $K_{st} / \sqrt{K_{ss} K_{tt}}$ is, with few images, not confined
      to [-1, 1].

    Args:
        products: float64 `(k, k, n, n)`, see [`gram`].
        estimator: One of these names; "unbiased" takes k >= 2 parts.

    Returns:
        float64 `(n, n)`, symmetric, with ones on the diagonal. NaN in the rows and columns of timesteps without a
        positive squared norm.
    """
    num_parts = len(products)
    total = products.sum((0, 1))
    if estimator == "plain":
        inner = total / num_parts**2
    else:
        inner = (total - products.diagonal().sum(-1)) / (num_parts * (num_parts - 1))
    inner = (inner + inner.T) / 2
    norms = inner.diagonal().clamp(min=0).sqrt()
    matrix = (inner / norms.outer(norms)).fill_diagonal_(1.0)
    matrix[norms == 0] = torch.nan
    matrix[:, norms == 0] = torch.nan
    return matrix


def reliability(all_products: Sequence[Tensor], estimator: str) -> float:
    """Split-half reliability of the mean of several cosine matrices, by the formula of Spearman and Brown.

    The correlation r between the entries above the diagonal of two matrices, each made of one half of the images,
    becomes 2r / (1 + |r|): that between two matrices of all images each, if the variance of their noise fell as the
    number of images grows. Large noise falls faster, and the formula then says too little. 1 is a matrix without
    noise; below about 0.8, take more images.

    Args:
        all_products: One `(4, 4, n, n)` per matrix.
        estimator: As in [`cosines`].

    Returns:
        A number in [-1, 1]. NaN if it cannot be told: fewer than three timesteps, entries that are all alike, or, in
        one of the halves, gradients without a positive squared norm.
    """
    first, second = (
        torch.stack([cosines(products[half, half], estimator) for products in all_products]).mean(0)
        for half in (slice(None, 2), slice(2, None))
    )
    above = torch.ones_like(first, dtype=torch.bool).triu_(1)
    if above.sum() < 2:
        return float("nan")
    r = torch.corrcoef(torch.stack([first[above], second[above]]))[0, 1]
    return float(2 * r / (1 + r.abs()))
