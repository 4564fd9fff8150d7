"""Pictures of finished cells."""

import base64
import io

import torch
from matplotlib import pyplot
from PIL import Image
from study_statistics import difference


METRICS = {"frechet_distance": "Fréchet distance", "loss": "held-out loss"}


def draw_quality(results, task, arms, path):
    """Metrics against training steps, in bands of one standard deviation over the seeds that all arms have."""
    seeds = sorted(set.intersection(*(set(results[task, arm]) for arm in arms)))
    figure, axes = pyplot.subplots(1, len(METRICS), figsize=(10, 3.6), layout="constrained")
    for ax, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for arm in arms:
            runs = [results[task, arm][seed] for seed in seeds]
            steps = [point["step"] for point in runs[0]["points"]]
            values = torch.tensor([[point[metric] for point in run["points"]] for run in runs])
            mean, spread = values.mean(0), values.std(0, correction=min(1, len(runs) - 1))
            (line,) = ax.plot(steps, mean, marker=".", label=arm)
            ax.fill_between(steps, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
        ax.set(xlabel="training steps", ylabel=label, yscale="log")
    axes[0].legend(title=f"seeds {', '.join(map(str, seeds))}")
    _save(figure, path)


def draw_differences(results, task, pairs, path):
    """Paired differences at the end of the runs, with their intervals; to the left is better.

    The axis is linear for most of them, and logarithmic beyond, where one far away would hide the others.
    """
    figure, axes = pyplot.subplots(
        1, len(METRICS), figsize=(10, 1 + 0.3 * len(pairs)), sharey=True, layout="constrained"
    )
    for ax, (metric, label) in zip(axes, METRICS.items(), strict=True):
        intervals = [difference(results, task, *pair, metric).interval() for pair in pairs]
        for row, (mean, low, high) in enumerate(intervals):
            ax.plot([low, high], [row, row], color="tab:blue")
            ax.plot(mean, row, "o", color="tab:blue")
        ax.axvline(0, color="grey", linewidth=0.8)
        furthest = torch.tensor(intervals, dtype=torch.float64).abs().amax(1)
        if furthest.max() > 10 * furthest.median():
            ax.set_xscale("symlog", linthresh=furthest.quantile(0.75).item(), linscale=2)
        ax.set(xlabel=f"difference of the {label}", yticks=range(len(pairs)))
        ax.set_yticklabels([f"{arm} against {reference}" for arm, reference in pairs])
    axes[0].invert_yaxis()
    figure.suptitle("Left of 0: better than what it is compared with", fontsize="medium")
    _save(figure, path)


def draw_samples(results, task, arms, seed, path):
    """Rows of samples from the same noise, one for each arm."""
    figure, axes = pyplot.subplots(len(arms), figsize=(7, 0.75 * len(arms)), squeeze=False, layout="constrained")
    for ax, arm in zip(axes[:, 0], arms, strict=True):
        row = Image.open(io.BytesIO(base64.b64decode(results[task, arm][seed]["samples"])))
        ax.imshow(row, cmap="grey", interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(arm, rotation=0, ha="right", va="center")
    _save(figure, path)


def _save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
