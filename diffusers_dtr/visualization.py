"""Pictures for understanding. Every function takes and returns a matplotlib Axes, as notebooks like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .routing import DEFAULT_TIMESTEP_RANGE, check_routing, routing_mask


if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_routing_masks(
    num_channels: int,
    *,
    alpha: float = 4.0,
    beta: float = 0.8,
    timestep_range: Sequence[float] = DEFAULT_TIMESTEP_RANGE,
    ax: Axes | None = None,
) -> Axes:
    """Which channels are active at which timestep.

    Args:
        num_channels: Width of the blocks.
        alpha: As in [`routing_mask`].
        beta: As in [`routing_mask`].
        timestep_range: As in [`routing_mask`].
        ax: Axes to draw on; those of a new figure by default.

    Returns:
        The Axes.

    Raises:
        ImportError: Without matplotlib.
        ValueError: As [`routing_mask`].
    """
    check_routing(timestep_range=timestep_range)
    timesteps = torch.linspace(*map(float, timestep_range), 500, dtype=torch.float64)
    masks = routing_mask(timesteps, num_channels, alpha=alpha, beta=beta, timestep_range=timestep_range)
    ax = _axes(ax)
    extent = (timestep_range[0], timestep_range[1], 0, num_channels)
    ax.imshow(masks.T.numpy(), aspect="auto", origin="lower", extent=extent, cmap="Blues", interpolation="nearest")
    ax.set_xlabel("timestep")
    ax.set_ylabel("channel (active ones dark)")
    return ax


def plot_cluster_losses(history: Sequence[dict], ax: Axes | None = None) -> Axes:
    """The loss of every cluster over training.

    Args:
        history: Entries with `step` and `clusters`, the loss of each cluster or None where it had no samples; the
            lines of a run's `loss_history.jsonl`.
        ax: Axes to draw on; those of a new figure by default.

    Returns:
        The Axes.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If the history is empty.
    """
    if not history:
        raise ValueError("`history` must have at least one entry, got none.")
    ax = _axes(ax)
    num_clusters = len(history[0]["clusters"])
    for cluster in range(num_clusters):
        # Left out rather than NaN: a line has no point between two gaps.
        seen = [entry for entry in history if entry["clusters"][cluster] is not None]
        ax.plot(
            [entry["step"] for entry in seen],
            [entry["clusters"][cluster] for entry in seen],
            color=_color(cluster, num_clusters),
            marker="." if len(history) < 30 else None,
            label=f"cluster {cluster}",
        )
    ax.set_xlabel("step")
    ax.set_ylabel("loss before balancing")
    ax.set_yscale("log")
    ax.legend(title="from clean to noisy", fontsize="small", ncols=2)
    return ax


def _color(cluster: int, num_clusters: int):
    from matplotlib import colormaps

    return colormaps["viridis"](cluster / max(num_clusters - 1, 1) * 0.95)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'diffusers-dtr[training]'.") from error
    return pyplot.subplots(layout="constrained")[1]
