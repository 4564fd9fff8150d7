"""What measure_negative_transfer.py has measured so far: a JSON file, and tables and a picture of the gaps in it."""

import json
from itertools import pairwise

import scipy  # noqa: F401 - the end needs it: missing, it shows before anything is measured
import torch
from matplotlib import pyplot

from diffusers_dtr.analysis import confidence_interval, negative_transfer_gap
from diffusers_dtr.visualization import plot_cluster_gaps


METRICS = {"loss": "gap of the held-out loss in %", "frechet_distance": "gap of the Fréchet distance"}


class Report:
    """A report file: read if it exists, and saved after every entry."""

    def __init__(self, path, settings):
        self.path = path
        begun = {"settings": settings, "entries": []}
        self.content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else begun
        if self.content["settings"] != settings:
            raise ValueError(f"`--output` must be a file of its own for every setting: {path} has other settings.")

    def has(self, seed, joint):
        """Whether a joint model of a seed has been measured."""
        return any((entry["seed"], entry["joint"]) == (seed, joint) for entry in self.content["entries"])

    def add(self, entry):
        """Save the metrics of one joint model of one seed."""
        self.content["entries"].append(entry)
        self._save()

    def describe(self, command, clusters, records):
        """Say what was run. A joint model that was there already may have no record."""
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in records if path.exists()]
        keys = ("command", "seconds", "versions", "hardware")
        training = [{key: run[key] for key in keys} for run in runs]
        self.content |= {"command": command, "clusters": list(clusters.boundaries), "training": training}

    def finish(self, seeds, names):
        """Save the gaps over these seeds, in the file and as a picture beside it."""
        gaps, differences = {}, {}
        for metric in self._metrics():
            values = {name: self._values(seeds, name, metric) for name in names}
            gaps[metric] = {name: _summary(gap) | {"joint": own.tolist()} for name, (own, gap) in values.items()}
            (_, reference), *others = values.values()
            pairs = zip(names[1:], others, strict=True)
            differences[metric] = {name: _summary(gap - reference) for name, (_, gap) in pairs}
        self.content |= {"gaps": gaps, "differences": differences}
        self._save()
        self._draw(names)

    def tables(self, names):
        """The gaps as Markdown."""
        edges = self.content["clusters"]
        header = ["joint model", *(f"timesteps {start} to {end - 1}" for start, end in pairwise(edges))]
        lines = []
        for metric in self._metrics():
            lines += [f"\n{METRICS[metric]}, after the joint model's own value, with its 95 % interval over seeds\n"]
            lines += [_row(header), _row(["---"] * len(header))]
            lines += [_row([name, *_cells(gaps, metric)]) for name, gaps in self.content["gaps"][metric].items()]
            if differences := self.content["differences"][metric]:
                lines += [f"\nthe same, less that of {names[0]} with the same seed\n"]
                lines += [_row(header), _row(["---"] * len(header))]
                lines += [_row([name, *_cells(difference, metric)]) for name, difference in differences.items()]
        return "\n".join(lines)

    def _metrics(self):
        return [metric for metric in METRICS if metric in self.content["entries"][0]]

    def _values(self, seeds, joint, metric):
        """The joint model's own metric by cluster, and the gaps of every seed.

        Losses differ by orders of magnitude, and their gaps are relative, in per cent.
        """
        entries = {entry["seed"]: entry[metric] for entry in self.content["entries"] if entry["joint"] == joint}
        own, specialist = (torch.tensor([entries[seed][key] for seed in seeds]) for key in ("joint", "specialist"))
        relative = metric == "loss"
        gaps = negative_transfer_gap(specialist, own, relative=relative) * (100 if relative else 1)
        return own.mean(0).expand(gaps.shape[1]), gaps

    def _draw(self, names):
        gaps = self.content["gaps"]
        size = (5 * len(gaps), 3.2)
        figure, axes = pyplot.subplots(1, len(gaps), figsize=size, squeeze=False, layout="constrained")
        for ax, metric in zip(axes[0], gaps, strict=True):
            ends = {name: [gaps[metric][name][end] for end in ("mean", "low", "high")] for name in names}
            plot_cluster_gaps(ends, ax=ax)
            ax.set_ylabel(METRICS[metric])
        figure.savefig(self.path.with_suffix(".png"), dpi=80)
        pyplot.close(figure)

    def _save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)  # an interruption leaves the old file or the new one


def _summary(values):
    return {key: ends.tolist() for key, ends in zip(("mean", "low", "high"), confidence_interval(values), strict=True)}


def _row(cells):
    return f"| {' | '.join(cells)} |"


def _cells(summary, metric):
    unit, digits = (" %", 1) if metric == "loss" else ("", 2)
    intervals = zip(summary["mean"], summary["low"], summary["high"], strict=True)
    cells = [f"{mean:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}]" for mean, low, high in intervals]
    own = summary.get("joint")
    return cells if own is None else [f"{value:.4g}: {cell}" for value, cell in zip(own, cells, strict=True)]
