"""What stops a run before its end: signals, after which it finishes its step, and numbers that are not finite."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from ..objective.balancing import num_processes


_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Launchers pass a Ctrl-C on to processes that the terminal has told already.
_SAME_CTRL_C = 1.0


class Interruption:
    """While it is entered, SIGINT, SIGTERM and SIGHUP are remembered rather than obeyed; a second Ctrl-C is obeyed.

    Signals that were ignored, as `nohup` has it for SIGHUP, stay ignored. Outside the main thread nothing is changed.
    Of several processes that train together, all must make one at the same time.
    """

    def __init__(self):
        self._received: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, object] = {}
        # On the CPU: nothing here waits for what a GPU still has to do.
        self._group = dist.new_group(backend="gloo") if num_processes() > 1 else None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def received(self) -> int | None:
        """The signal that any process has received, or None; all of them must call this at the same step."""
        if self._group is None:
            return self._received
        received = torch.tensor(self._received or 0)
        dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group)
        return int(received) or None

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = signum, now
            again = "; Ctrl-C again stops at once" if signum == signal.SIGINT else ""
            # Not by logging, which may be in the middle of a line
            os.write(2, f"\n{signal.Signals(signum).name}: finishing this step, then saving{again}\n".encode())
        elif signum == signal.SIGINT and now - self._received_at > _SAME_CTRL_C:
            raise KeyboardInterrupt


def not_finite(what: str, step: int, last_checkpoint: Path | None) -> FloatingPointError:
    """The error that stops a diverged run and says where to go on; `what` is such as "The loss was"."""
    resume = "There is no checkpoint before it; start again"
    if last_checkpoint is not None:
        resume = f"The last good checkpoint is {last_checkpoint}; go on from it with `--resume_from_checkpoint`"
    return FloatingPointError(
        f"{what} not finite at step {step}. {resume}, with a lower `--learning_rate`, a smaller `--max_grad_norm`, or "
        "another `--mixed_precision`."
    )


def ignore_signals(*_: object) -> None:
    """Let a worker that loads data end with its run, and not with signals that the whole process group gets."""
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
