"""What measure_negative_transfer.py has measured so far: a JSON file, and tables and a picture of the gaps in it."""

import json
from itertools import pairwise

import torch

from diffusers_dtr.analysis import confidence_interval, negative_transfer_gap
from diffusers_dtr.visualization import plot_cluster_gaps


METRICS = {"loss": "gap of the held-out loss in %", "frechet_distance": "gap of the Fréchet distance"}


class Report:
    """Begins with what the file holds already, and saves whatever is added."""

    def __init__(self, path, settings):
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {"settings": settings, "entries": []}
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
        runs = [json.loads(path.read_text()) for path in records if path.exists()]
        keys = ("command", "seconds", "versions", "hardware")
        training = [{key: run[key] for key in keys} for run in runs]
        self.content |= {"command": command, "clusters": list(clusters.boundaries), "training": training}

    def finish(self, seeds, names):
        """Save the gaps over these seeds, in the file and as a picture beside it."""
        self.content["gaps"] = {
            metric: {name: self._gaps(seeds, name, metric) for name in names} for metric in self._metrics()
        }
        self._save()
        self._draw(names)

    def tables(self, names):
        """The gaps as Markdown."""
        edges = self.content["clusters"]
        columns = [f"timesteps {start} to {end - 1}" for start, end in pairwise(edges)]
        lines = []
        for metric in self._metrics():
            lines += [f"\n{METRICS[metric]}, after the joint model's own value, with its 95 % interval over seeds\n"]
            lines += [f"| joint model | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
            for name in names:
                gaps = self.content["gaps"][metric][name]
                cells = [_cell(*numbers, metric) for numbers in zip(*gaps.values(), strict=True)]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _metrics(self):
        return [metric for metric in METRICS if metric in self.content["entries"][0]]

    def _gaps(self, seeds, joint, metric):
        """By cluster. Losses differ by orders of magnitude, and their gaps are relative, in per cent."""
        entries = [entry for entry in self.content["entries"] if entry["joint"] == joint and entry["seed"] in seeds]
        own, specialist = (torch.tensor([entry[metric][key] for entry in entries]) for key in ("joint", "specialist"))
        relative = metric == "loss"
        gaps = negative_transfer_gap(specialist, own, relative=relative) * (100 if relative else 1)
        mean, low, high = confidence_interval(gaps)
        own = own.mean(0).expand(len(mean))
        return {"joint": own.tolist(), "mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}

    def _draw(self, names):
        from matplotlib import pyplot

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
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)


def _cell(own, mean, low, high, metric):
    unit, digits = (" %", 1) if metric == "loss" else ("", 2)
    return f"{own:.4g}: {mean:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}]"
