"""Metrics of two sets of features: of samples, and of the images that they should be like."""

from __future__ import annotations

import warnings

import torch
from torch import nn


NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
INCEPTION_SPLITS = 10
MOST_FOR_PRECISION = 10_000


class _Features(nn.Identity):
    """What torchmetrics takes for a network: features are computed once, for all metrics.

    They are those of all processes, so metrics are told not to gather them again (`sync_on_compute`).
    """

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features


def set_metrics(samples, reference, logits=None, seed=0):
    """All metrics by name.

    Args:
        samples: Features of samples, `(n, d)`.
        reference: Features of images, `(m, d)`.
        logits: `(n, classes)` of the samples, for the Inception score; None without it.
        seed: Seed of the subsets and splits.

    Returns:
        `frechet_distance`, `kid`, `kid_std`, `precision`, `recall`, `inception_score`, `inception_score_std` (None
        without logits), and the `settings` of these.

    Raises:
        ValueError: For fewer than four samples or images.
    """
    samples, reference = samples.double(), reference.double()
    if min(len(samples), len(reference)) <= NEIGHBOURS:
        raise ValueError(
            f"At least {NEIGHBOURS + 1} samples and images are needed, got {len(samples)}, {len(reference)}."
        )
    if min(len(samples), len(reference)) <= samples.shape[1]:
        warnings.warn(
            f"The Fréchet distance of {len(samples)} and {len(reference)} images by {samples.shape[1]} features is "
            "mostly that of the few images: take more.",
            stacklevel=2,
        )
    most = min(len(samples), len(reference), MOST_FOR_PRECISION)
    precision, recall = precision_and_recall(_some(samples, most, seed), _some(reference, most, seed + 1))
    subset_size = min(KID_SUBSET_SIZE, len(samples), len(reference))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric .* will save all extracted features")
        torch.manual_seed(seed)
        kid, kid_std = _kid(samples, reference, subset_size)
        torch.manual_seed(seed)
        score, score_std = (None, None) if logits is None else _inception_score(logits.double())
    return {
        "frechet_distance": frechet_distance(samples, reference),
        "kid": kid,
        "kid_std": kid_std,
        "precision": precision,
        "recall": recall,
        "inception_score": score,
        "inception_score_std": score_std,
        "settings": {
            "samples": len(samples),
            "reference_images": len(reference),
            "features": samples.shape[1],
            "kid_subsets": KID_SUBSETS,
            "kid_subset_size": subset_size,
            "precision_recall_images": most,
            "precision_recall_neighbours": NEIGHBOURS,
            "inception_splits": INCEPTION_SPLITS,
        },
    }


def frechet_distance(samples, reference):
    """Fréchet distance of Gaussians; with Inception's features it is FID (arXiv 1706.08500)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Features(samples.shape[1]), sync_on_compute=False)
    metric.update(reference, real=True)
    metric.update(samples, real=False)
    return metric.compute().item()


def _kid(samples, reference, subset_size):
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(_Features(samples.shape[1]), KID_SUBSETS, subset_size, sync_on_compute=False)
    metric.update(reference, real=True)
    metric.update(samples, real=False)
    return [value.item() for value in metric.compute()]


def _inception_score(logits):
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(_Features(logits.shape[1]), INCEPTION_SPLITS, sync_on_compute=False)
    metric.update(logits)
    return [value.item() for value in metric.compute()]


def precision_and_recall(samples, reference):
    """Shares of samples within the reference's manifold, and the reverse (arXiv 1904.06991, Section 2)."""
    return _share_inside(samples, reference), _share_inside(reference, samples)


def _share_inside(points, manifold):
    """Share of points within the distance of a point of the manifold to its third nearest neighbour."""
    # The nearest of all is the point itself
    radii = [_distances(part, manifold).kthvalue(NEIGHBOURS + 1).values for part in manifold.split(1000)]
    radii = torch.cat(radii)
    inside = [(_distances(part, manifold) <= radii).any(1) for part in points.split(1000)]
    return torch.cat(inside).double().mean().item()


def _distances(points, others):
    return torch.cdist(points, others)


def _some(features, count, seed):
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return features[order[:count]]
