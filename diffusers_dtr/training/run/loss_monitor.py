"""Follow the loss of every cluster without waiting for the device at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ...objective.clustered_loss import ClusteredLossOutput
from ..interruption import not_finite


@dataclass(frozen=True)
class ObservedLosses:
    """Mean losses, before balancing, over some steps and all processes.

    Attributes:
        mean: Over all samples.
        per_cluster: Over the samples of each cluster; NaN for a cluster that had none.
    """

    mean: float
    per_cluster: tuple[float, ...]


class LossMonitor:
    """Averages losses on the device and reads them now and then; notices one that is not finite.

    Args:
        accelerator: Averages over its processes.
        num_clusters: k.
    """

    def __init__(self, accelerator: Accelerator, num_clusters: int):
        self.accelerator = accelerator
        # Sum and number of the samples' losses in each cluster.
        self._totals = torch.zeros(2, num_clusters, device=accelerator.device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=accelerator.device)

    def update(self, out: ClusteredLossOutput, step: int) -> None:
        """Take in the losses of one forward call.

        Args:
            out: What the clustered loss returned.
            step: The optimizer step that it belongs to.
        """
        self._totals += torch.stack([out.per_cluster.float() * out.counts, out.counts.float()])
        is_first_bad = ~out.loss.detach().isfinite() & (self._first_bad < 0)
        self._first_bad = torch.where(is_first_bad, step, self._first_bad)

    def read(self, last_checkpoint: object = None) -> ObservedLosses:
        """The mean losses since the last reading, over all processes; all of them must call this.

        Args:
            last_checkpoint: What to name as the place to go on from.

        Returns:
            The losses.

        Raises:
            FloatingPointError: If a loss since the start was not finite; it names the step and `last_checkpoint`.
        """
        bad = self.accelerator.gather(self._first_bad.reshape(1))
        bad = bad[bad >= 0].tolist()
        if bad:
            raise not_finite("The loss was", min(bad), last_checkpoint)
        sums, counts = self.accelerator.reduce(self._totals.clone(), "sum").double().cpu()
        self._totals.zero_()
        return ObservedLosses((sums.sum() / counts.sum()).item(), tuple((sums / counts).tolist()))
