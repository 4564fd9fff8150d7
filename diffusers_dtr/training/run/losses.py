"""The loss of every cluster over a run: averaged on the device, read now and then, written down and drawn."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ...atomic_files import naming, replace_text
from ...extras import require
from ...objective.clustered_loss import ClusteredLossOutput
from ...run_record import HISTORY_FILE, LOSSES_PICTURE
from ..interruption import not_finite


@dataclass(frozen=True)
class MeanLosses:
    """Mean losses, before balancing, over all processes.

    Attributes:
        mean: Over all samples.
        per_cluster: Over the samples of each cluster; NaN for a cluster that had none.
    """

    mean: float
    per_cluster: tuple[float, ...]

    @classmethod
    def of(cls, totals: torch.Tensor) -> MeanLosses:
        """From the sums and the numbers of the samples' losses in each cluster, `(2, clusters)`."""
        sums, counts = totals.double().cpu()
        return cls((sums.sum() / counts.sum()).item(), tuple((sums / counts).tolist()))

    def values(self, name: str, part: str) -> dict[str, float]:
        """As trackers take them: `name`, and `name/part_<number>` of every cluster."""
        return {name: self.mean, **{f"{name}/{part}_{number}": loss for number, loss in enumerate(self.per_cluster)}}


class LossMonitor:
    """Averages losses on the device and reads them now and then; notices one that is not finite."""

    def __init__(self, accelerator: Accelerator, num_clusters: int):
        self.accelerator = accelerator
        self._totals = torch.zeros(2, num_clusters, device=accelerator.device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=accelerator.device)

    def update(self, out: ClusteredLossOutput, step: int) -> None:
        """Take in the losses of one forward call."""
        self._totals += torch.stack([out.per_cluster.float() * out.counts, out.counts.float()])
        is_first_bad = ~out.loss.detach().isfinite() & (self._first_bad < 0)
        self._first_bad = torch.where(is_first_bad, step, self._first_bad)

    def read(self, last_checkpoint: Path | None = None) -> MeanLosses:
        """The mean losses since the last reading, over all processes; all of them must call this."""
        bad = self.accelerator.gather(self._first_bad.reshape(1))
        bad = bad[bad >= 0].tolist()
        if bad:
            raise not_finite("The loss was", min(bad), last_checkpoint)
        losses = MeanLosses.of(self.accelerator.reduce(self._totals.clone(), "sum"))
        self._totals.zero_()
        return losses


class LossHistory:
    """Losses by step, one JSON object per line; what an interrupted run wrote of later steps is dropped."""

    def __init__(self, output_dir: str | Path, global_step: int = 0):
        require("matplotlib", "training", "Pictures")
        self.path = Path(output_dir) / HISTORY_FILE
        self.entries: list[dict] = []
        if global_step > 0 and self.path.exists():
            # A run that was killed may have left a line unfinished; it is of a step beyond the checkpoint.
            lines = self.path.read_text(encoding="utf-8").splitlines()
            entries = [json.loads(line) for line in lines if line.endswith("}")]
            self.entries = [entry for entry in entries if entry["step"] <= global_step]
        self._is_new = True

    def append(self, step: int, losses: MeanLosses, cluster_weights: list[float]) -> None:
        """Add what was read at a step."""
        # JSON has no NaN: a cluster that had no samples has no loss.
        per_cluster = [None if math.isnan(loss) else loss for loss in losses.per_cluster]
        self.entries.append({"step": step, "loss": losses.mean, "clusters": per_cluster, "weights": cluster_weights})
        if self._is_new:
            replace_text(self.path, "".join(map(_line, self.entries)))
            self._is_new = False
        else:
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(_line(self.entries[-1]))

    def save_picture(self) -> Path:
        """Draw the loss of every cluster over the steps, beside the history."""
        from matplotlib.figure import Figure

        from ...visualization import plot_cluster_losses

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        plot_cluster_losses(self.entries, ax=figure.add_subplot())
        path = self.path.with_name(LOSSES_PICTURE)
        figure.savefig(path, dpi=120)
        return path


def _line(entry: dict) -> str:
    return json.dumps(entry) + "\n"
