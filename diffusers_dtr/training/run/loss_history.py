"""The loss of every cluster over a run, kept across resumptions and drawn as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ...atomic_files import replace_text
from ...extras import require
from ...run_record import HISTORY_FILE, LOSSES_PICTURE
from .loss_monitor import ObservedLosses


class LossHistory:
    """Losses by step, one JSON object per line in the run's folder.

    Args:
        output_dir: The run's folder.
        global_step: Optimizer steps already done. What an interrupted run wrote of later ones is left out.

    Raises:
        ImportError: Without matplotlib, before there is anything to lose.
    """

    def __init__(self, output_dir: str | Path, global_step: int = 0):
        require("matplotlib", "training", "Pictures")
        self.path = Path(output_dir) / HISTORY_FILE
        self.entries: list[dict] = []
        if global_step > 0 and self.path.exists():
            # A run that was killed may have left a line unfinished; it is of a step beyond the checkpoint.
            lines = self.path.read_text(encoding="utf-8").splitlines()
            entries = [json.loads(line) for line in lines if line.endswith("}")]
            self.entries = [entry for entry in entries if entry["step"] <= global_step]
        self._rewrite = True

    def append(self, step: int, losses: ObservedLosses, cluster_weights: list[float]) -> None:
        """Add what was read at a step.

        Args:
            step: Optimizer steps done.
            losses: The losses since the reading before.
            cluster_weights: The balancing's weights at this step.
        """
        # JSON has no NaN: a cluster that had no samples has no loss.
        per_cluster = [None if math.isnan(loss) else loss for loss in losses.per_cluster]
        self.entries.append({"step": step, "loss": losses.mean, "clusters": per_cluster, "weights": cluster_weights})
        new = self.entries if self._rewrite else self.entries[-1:]
        text = "".join(json.dumps(entry) + "\n" for entry in new)
        if self._rewrite:
            replace_text(self.path, text)
            self._rewrite = False
        else:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)

    def save_picture(self) -> Path:
        """Draw the loss of every cluster over the steps, beside the history.

        Returns:
            The picture's path.
        """
        from matplotlib.figure import Figure

        from ...visualization import plot_cluster_losses

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        plot_cluster_losses(self.entries, ax=figure.add_subplot())
        path = self.path.with_name(LOSSES_PICTURE)
        figure.savefig(path, dpi=120)
        return path
