"""torchjd's weightings as functions of a Gramian, by name or as they are, and what they remember between calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..extras import require


if TYPE_CHECKING:
    from torchjd.aggregation import WeightedAggregator, Weighting


# The names by which [`GradientBalancer`] knows aggregators of torchjd, and torchjd's names for them.
GRADIENT_BALANCINGS = {
    "aligned_mtl": "AlignedMTL",
    "imtl_g": "IMTLG",
    "mgda": "MGDA",
    "nash_mtl": "NashMTL",
    "pcgrad": "PCGrad",
}

# Attributes in which torchjd's stateful weightings remember earlier calls: neither their `state_dict` nor any other
# public access covers them. The name of NashMTL's weighting is not exported.
MEMORY = {
    "CRMOGMWeighting": ("_lambda",),
    "GradVacWeighting": ("_phi_t",),
    "PCDWeighting": ("_sq_norm_ema", "_n_steps"),
    "_NashMTLWeighting": ("prvs_alpha",),
}


def gramian_weighting(weighting: str | Weighting | WeightedAggregator, num_clusters: int) -> Weighting:
    """The torchjd weighting from a `(k, k)` Gramian to `(k,)` weights, by its name or from an instance."""
    require("torchjd", "balancing", "Gradient balancings")
    from torchjd import aggregation

    if isinstance(weighting, str):
        if weighting not in GRADIENT_BALANCINGS:
            raise ValueError(
                f"`weighting` must be one of {', '.join(GRADIENT_BALANCINGS)}, or an instance of a torchjd weighting, "
                f"got {weighting!r}."
            )
        arguments = (num_clusters,) if weighting == "nash_mtl" else ()
        try:
            weighting = getattr(aggregation, GRADIENT_BALANCINGS[weighting])(*arguments)
        except ImportError as error:
            raise ImportError(
                f'`weighting="{weighting}"` needs an extra of torchjd: pip install "diffusers-dtr[balancing]".'
            ) from error
    if isinstance(weighting, aggregation.GramianWeightedAggregator):
        weighting = weighting.gramian_weighting
    elif isinstance(weighting, aggregation.WeightedAggregator):
        # Its weighting wants the gradients, but any matrix with their Gramian leads to the same weights.
        weighting = weighting.weighting << _square_root
    if not isinstance(weighting, aggregation.Weighting):
        raise TypeError(
            "`weighting` must be a name, or a weighting or weighted aggregator of torchjd.aggregation, "
            f"got {type(weighting).__name__}."
        )
    for part in stateful_parts(weighting):
        if type(part).__name__ not in MEMORY:
            raise TypeError(
                "`weighting` must be a function of the Gramian, without state that cannot be saved, got "
                f"{type(part).__name__}."
            )
    return weighting


def _square_root(gramian: Tensor) -> Tensor:
    """A `(k, k)` matrix whose rows have this Gramian."""
    eigenvalues, eigenvectors = torch.linalg.eigh(gramian)
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()


def stateful_parts(weighting: nn.Module) -> list[nn.Module]:
    """The parts of a weighting that remember earlier calls."""
    from torchjd import Stateful

    return [part for part in weighting.modules() if isinstance(part, Stateful)]
