"""The Fréchet distance between two sets of features, as Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(features: Tensor, other: Tensor) -> float:
    r"""Squared Fréchet distance of two Gaussians with the means and covariances of two sets of features.

    $$d^2 = \|\mu_1 - \mu_2\|^2 + \mathrm{tr}\left(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2}\right)$$

    (Dowson and Landau 1982). With Inception features it is called FID (Heusel et al., arXiv 1706.08500, Eq. 6). It is
    computed in float64, with unbiased covariances, from symmetric square roots: the trace of the root is the sum of
    the singular values of $\Sigma_1^{1/2} \Sigma_2^{1/2}$, which no feature of zero variance upsets. It is >= 0 up to
    rounding. Finite sets are farther apart than their distributions: compare distances of equally many features only.

    Args:
        features: `(n, d)`, of any real type.
        other: `(m, d)`.

    Raises:
        ValueError: If the shapes do not fit each other, a set has no more features than each of them has numbers, so
            that its covariance is singular whatever its distribution, or a number is not finite.
    """
    for name, values in (("features", features), ("other", other)):
        if values.ndim != 2 or values.shape[1] == 0 or values.shape[0] <= values.shape[1]:
            raise ValueError(
                f"`{name}` must have the shape (n, d) with n > d > 0, got {tuple(values.shape)}: take more samples, "
                "or fewer numbers per sample."
            )
        if not values.isfinite().all():
            raise ValueError(f"`{name}` must be finite, got {int((~values.isfinite()).sum())} numbers that are not.")
    if features.shape[1] != other.shape[1]:
        raise ValueError(
            f"`other` must have features of as many numbers as `features`, {features.shape[1]}, got {other.shape[1]}."
        )
    (mean, root), (other_mean, other_root) = (_mean_and_root(values.double()) for values in (features, other))
    traces = root.square().sum() + other_root.square().sum()
    distance = (mean - other_mean).square().sum() + traces - 2 * torch.linalg.svdvals(root @ other_root).sum()
    return distance.item()


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(d,)`, and symmetric square root `(d, d)` of the covariance."""
    values, vectors = torch.linalg.eigh(torch.atleast_2d(features.T.cov()))
    # Rounding leaves zero eigenvalues on either side of zero.
    return features.mean(0), (vectors * values.clamp(min=0).sqrt()) @ vectors.T
