"""Pictures of masks, clusters, losses and affinities, and grids of images.

Every `plot_` function draws on `ax`, the matplotlib Axes given, or on those of a new figure, and returns them. Without
matplotlib it raises an ImportError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .analysis import TaskAffinity, noise_distance_correlation, noise_distances
from .extras import require
from .noise_levels import NoiseLevels
from .objective.clusters import TimestepClusters
from .routing import DEFAULT_TIMESTEP_RANGE, check_routing, routing_mask


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = [
    "draw_routing_masks",
    "plot_affinity_by_noise_distance",
    "plot_cluster_boundaries",
    "plot_cluster_gaps",
    "plot_cluster_losses",
    "plot_routing_masks",
    "plot_task_affinity",
]


def plot_routing_masks(
    num_channels: int,
    *,
    alpha: float = 4.0,
    beta: float = 0.8,
    timestep_range: Sequence[float] = DEFAULT_TIMESTEP_RANGE,
    ax: Axes | None = None,
) -> Axes:
    """Plot which of a block's channels are active at which timestep; arguments and errors as of [`routing_mask`]."""
    check_routing(timestep_range=timestep_range)
    timesteps = torch.linspace(*map(float, timestep_range), 500, dtype=torch.float64)
    masks = routing_mask(timesteps, num_channels, alpha=alpha, beta=beta, timestep_range=timestep_range)
    ax = _axes(ax)
    extent = (timestep_range[0], timestep_range[1], 0, num_channels)
    ax.imshow(masks.T.numpy(), aspect="auto", origin="lower", extent=extent, cmap="Blues", interpolation="nearest")
    ax.set(xlabel="timestep", ylabel="channel (active ones dark)")
    return ax


def draw_routing_masks(widths: Sequence[int], **routing: Any) -> Figure:
    """Figure of a model's masks: one [`plot_routing_masks`] for each width of its blocks, side by side."""
    require("matplotlib", "training", "Pictures")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 5 * len(widths), 3), layout="constrained")
    for ax, width in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        plot_routing_masks(width, **routing, ax=ax)
    return figure


def plot_cluster_losses(history: Sequence[dict], ax: Axes | None = None) -> Axes:
    """Plot the loss of every cluster over training.

    Args:
        history: Entries with `step` and `clusters`, the loss of each cluster or None where it had no samples; the
            lines of a run's `loss_history.jsonl`. A ValueError if there are none.
        ax: Axes to draw on.
    """
    if not history:
        raise ValueError("`history` must have at least one entry, got none.")
    ax = _axes(ax)
    num_clusters = len(history[0]["clusters"])
    for cluster in range(num_clusters):
        # Left out rather than NaN: a line has no point between two gaps.
        seen = [entry for entry in history if entry["clusters"][cluster] is not None]
        steps, losses = [entry["step"] for entry in seen], [entry["clusters"][cluster] for entry in seen]
        style = {"color": _color(cluster, num_clusters), "marker": "." if len(history) < 30 else None}
        ax.plot(steps, losses, **style, label=f"cluster {cluster}")
    ax.set(xlabel="step", ylabel="loss before balancing", yscale="log")
    ax.legend(title="from clean to noisy", fontsize="small", ncols=2)
    return ax


def plot_task_affinity(affinity: TaskAffinity, ax: Axes | None = None) -> Axes:
    """Plot the task affinity of all pairs of training timesteps, which stand at the left and below, log SNR above."""
    ax = _axes(ax)
    full = affinity.full_matrix().numpy()
    # Colours are the same in every picture of this kind; noise can lead beyond them.
    image = ax.imshow(full, origin="lower", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="task affinity (cosine of the gradients)", shrink=0.8)
    grid = affinity.training_timesteps
    numbers = torch.linspace(0, len(grid) - 1, 5).round().long().unique()
    labels = [f"{timestep:.4g}" for timestep in grid[numbers].tolist()]
    ax.set_xticks(numbers.tolist(), labels)
    ax.set_yticks(numbers.tolist(), labels)
    ax.set(xlabel="timestep", ylabel="timestep")
    above = ax.secondary_xaxis("top")
    finite = affinity.log_snr.isfinite()
    marks = torch.linspace(0, int(finite.sum()) - 1, 5).round().long().unique()
    places = torch.searchsorted(grid, affinity.timesteps[finite][marks])
    above.set_xticks(places.tolist(), [f"{value:.1f}" for value in affinity.log_snr[finite][marks].tolist()])
    above.set_xlabel("log SNR")
    return ax


def plot_affinity_by_noise_distance(affinity: TaskAffinity, ax: Axes | None = None) -> Axes:
    """Plot the task affinity of pairs of timesteps against their distance in log SNR, with a running median.

    The title is their [`~diffusers_dtr.analysis.noise_distance_correlation`], whose errors are raised.
    """
    correlation = noise_distance_correlation(affinity)
    ax = _axes(ax)
    distances, affinities = noise_distances(affinity)
    order = distances.argsort()
    distances, affinities = distances[order], affinities[order]
    # More dots than this are one blot, and a large file.
    shown = torch.linspace(0, len(distances) - 1, min(len(distances), 5000)).long()
    ax.scatter(
        distances[shown], affinities[shown], s=4, color="C0", alpha=0.25, linewidths=0, label="pair of timesteps"
    )
    parts = list(zip(distances.tensor_split(20), affinities.tensor_split(20), strict=True))
    medians = [(float(near.median()), float(values.median())) for near, values in parts if len(near)]
    ax.plot(*zip(*medians, strict=True), color="C1", marker="o", markersize=3, label="median of a twentieth of them")
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.set(xlabel="distance in log SNR", ylabel="task affinity")
    ax.set_title(f"Spearman rank correlation {correlation:.2f}", fontsize="medium")
    ax.legend(fontsize="small")
    return ax


def plot_cluster_boundaries(
    clusterings: Mapping[str, TimestepClusters], levels: NoiseLevels, ax: Axes | None = None
) -> Axes:
    """Plot clusterings over log SNR, from clean to noisy: one row of bars for each.

    Every cluster is a bar, with its first timestep on it where there is room.

    Args:
        clusterings: By name, at least one; a ValueError for one of other timesteps than those of `levels`.
        levels: Noise levels of the scheduler. Those of infinite log SNR have no place on the axis.
        ax: Axes to draw on.
    """
    if not clusterings:
        raise ValueError("`clusterings` must have at least one clustering, got none.")
    log_snr = levels.log_snr(levels.timesteps)
    for name, clusters in clusterings.items():
        if clusters.num_train_timesteps != len(log_snr):
            raise ValueError(
                f"`clusterings` must be of the {len(log_snr)} timesteps of `levels`, got {name!r} of "
                f"{clusters.num_train_timesteps}."
            )
    finite = log_snr[log_snr.isfinite()]
    # Halfway between neighbouring timesteps, as clusters divide the timesteps themselves.
    edges = torch.cat([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]]).clamp(finite[-1], finite[0])
    ax = _axes(ax)
    for row, clusters in enumerate(clusterings.values()):
        for number, (start, stop) in enumerate(pairwise(clusters.boundaries)):
            left, right = float(edges[start]), float(edges[stop])
            color = _color(number, len(clusters))
            ax.barh(row, right - left, left=left, height=0.8, color=color, edgecolor="white", linewidth=1)
            # Narrow bars have no room for it.
            if left - right > 0.04 * float(finite[0] - finite[-1]):
                first = f" {float(levels.timesteps[start]):.4g}"
                ink = "white" if number < 0.6 * len(clusters) else "black"
                ax.text(left, row, first, va="center", fontsize="x-small", color=ink)
    ax.set_yticks(range(len(clusterings)), list(clusterings))
    ax.set(xlim=(float(finite[0]), float(finite[-1])), xlabel="log SNR (bars begin at the timestep written on them)")
    ax.invert_yaxis()
    return ax


def plot_cluster_gaps(gaps: Mapping[str, tuple[Tensor, Tensor, Tensor]], ax: Axes | None = None) -> Axes:
    """Plot a value per cluster with its interval, for several models side by side, such as negative transfer gaps.

    Args:
        gaps: For each model name: mean, lower and upper end of the interval, `(k,)` each, of one k (a ValueError
            otherwise).
        ax: Axes to draw on.
    """
    sizes = {len(values) for triple in gaps.values() for values in triple}
    if len(sizes) != 1:
        raise ValueError(f"`gaps` must have the same number of clusters for at least one model, got {sorted(sizes)}.")
    ax = _axes(ax)
    (num_clusters,) = sizes
    width = 0.8 / len(gaps)
    for number, (name, (mean, low, high)) in enumerate(gaps.items()):
        places = torch.arange(num_clusters, dtype=torch.float64) + (number - (len(gaps) - 1) / 2) * width
        mean, low, high = (torch.as_tensor(values, dtype=torch.float64) for values in (mean, low, high))
        whiskers = {"yerr": torch.stack([mean - low, high - mean]).numpy(), "ecolor": "0.2", "capsize": 2}
        ax.bar(places.numpy(), mean.numpy(), width, color=f"C{number % 10}", label=name, **whiskers)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set(xticks=range(num_clusters), xlabel="cluster, from clean to noisy", ylabel="gap")
    ax.legend(fontsize="small")
    return ax


def _axes(ax: Axes | None) -> Axes:
    """The Axes that are given, or those of a new figure."""
    if ax is None:
        require("matplotlib", "training", "Pictures")
        from matplotlib import pyplot

        ax = pyplot.subplots(layout="constrained")[1]
    return ax


def _color(cluster: int, num_clusters: int):
    from matplotlib import colormaps

    return colormaps["viridis"](cluster / max(num_clusters - 1, 1) * 0.95)


def spaced_grid(path: Path, side: int | None) -> Image.Image:
    """A file's grid of images of `side` pixels, as [`image_grid`] shows them; any other picture as it is."""
    with Image.open(path) as file:
        grid = file.convert("RGB")
    if side is None or side < 1 or grid.width % side or grid.height % side:
        return grid
    corners = [(left, top) for top in range(0, grid.height, side) for left in range(0, grid.width, side)]
    images = [grid.crop((left, top, left + side, top + side)) for left, top in corners]
    return image_grid(images, columns=grid.width // side)


def image_grid(images: Sequence[Image.Image], columns: int, row_names: Sequence[str] | None = None) -> Image.Image:
    """Images of equal size, row by row with gaps between them, enlarged to about 400 pixels if small, not smoothed."""
    gap, about = 6, 400
    width, height = images[0].size
    columns = min(columns, len(images))
    scale = max(1, round(about / (columns * width)))
    width, height = width * scale, height * scale
    font = ImageFont.load_default(size=14)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in row_names or ()]
    margin = math.ceil(max((font.getlength(name) for name in names), default=0)) + (gap if names else 0)
    rows = math.ceil(len(images) / columns)
    picture = Image.new("RGB", (margin + columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        picture.paste(enlarged, (margin + column * (width + gap), row * (height + gap)))
    for row, name in enumerate(names):
        middle = (0, row * (height + gap) + height / 2)
        ImageDraw.Draw(picture).text(middle, name, fill="black", font=font, anchor="lm")
    return picture


def copy_drawing(source: Path, target: Path) -> None:
    """Copy a drawing with a palette of 64 colours, which halves its file."""
    with Image.open(source) as drawing:
        drawing.convert("RGB").quantize(64).save(target, optimize=True)
