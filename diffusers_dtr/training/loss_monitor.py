"""Follow the loss without waiting for the device at every step."""

from __future__ import annotations

import torch
from accelerate import Accelerator


def not_finite(what: str, step: int, last_checkpoint: object) -> FloatingPointError:
    """The error that stops a diverged run, and says where to go on.

    Args:
        what: Subject and verb: "The loss was".
        step: The optimizer step at which it was seen.
        last_checkpoint: The place to go on from, or None.
    """
    resume = (
        f"The last good checkpoint is {last_checkpoint}; go on from it with `--resume_from_checkpoint`"
        if last_checkpoint is not None
        else "There is no checkpoint before it; start again"
    )
    return FloatingPointError(
        f"{what} not finite at step {step}. {resume}, with a lower `--learning_rate`, a smaller `--max_grad_norm`, or "
        "another `--mixed_precision`."
    )


class LossMonitor:
    """Averages losses on the device and reads them now and then; notices one that is not finite.

    Args:
        accelerator: Averages over its processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._sum = torch.zeros((), device=accelerator.device)
        self._count = 0
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=accelerator.device)

    def update(self, loss: torch.Tensor, step: int) -> None:
        """Take in the loss of one forward call.

        Args:
            loss: Scalar.
            step: The optimizer step that it belongs to.
        """
        loss = loss.detach().float()
        self._sum += loss
        self._count += 1
        is_first_bad = ~loss.isfinite() & (self._first_bad < 0)
        self._first_bad = torch.where(is_first_bad, step, self._first_bad)

    def read(self, last_checkpoint: object = None) -> float:
        """The mean loss since the last reading, over all processes; all of them must call this.

        Args:
            last_checkpoint: What to name as the place to go on from.

        Returns:
            The mean loss.

        Raises:
            FloatingPointError: If a loss since the start was not finite; it names the step and `last_checkpoint`.
        """
        total = self.accelerator.reduce(self._sum, "mean")
        bad = self.accelerator.gather(self._first_bad.reshape(1))
        bad = bad[bad >= 0].tolist()
        if bad:
            raise not_finite("The loss was", min(bad), last_checkpoint)
        mean = (total / max(self._count, 1)).item()
        self._sum.zero_()
        self._count = 0
        return mean
