"""Push checkpoints while training goes on, without ever holding it up or ending it."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..run_folder import PUSH_SNAPSHOTS
from .commit import FolderCommit, check_token, describe, retry
from .run import default_repo


logger = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "last-checkpoint"


@dataclass
class PushReport:
    """What became of the checkpoints that were to be pushed, by their steps.

    Attributes:
        pushed: Those that are on the Hub, or were until a later one replaced them.
        superseded: Those that a later one overtook before they were pushed.
        failed: Those that could not be pushed, and why.
    """

    pushed: list[int] = field(default_factory=list)
    superseded: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


class BackgroundPush:
    """Keeps the latest checkpoint of a run on the Hub, in `last-checkpoint/`, by a thread of its own.

    Every push is one commit, which replaces the files of the checkpoint before. Where the network is slower than the
    training, only the latest of the waiting checkpoints is pushed; where it fails, the push is tried again, at longer
    and longer intervals, until it succeeds or a later checkpoint takes its place. All of this is logged as warnings
    and in `report`; nothing is raised.

    A checkpoint holds the states of optimizer and random generators as pickles, which the Hub marks as such. Resuming
    reads tensors and plain values of them, and runs no code.

    Args:
        output_dir: The run's folder. Until they are pushed, checkpoints are kept in `.push` inside it as hard links,
            so that they may be renamed or deleted meanwhile.
        repo_id: Repository; by default one named after the folder, in the user's namespace. It is made if need be.
        token: Token, or None for the one that is logged in.
        private: Whether a new repository is private. None for what its owner has as default.
        revision: Branch, made from `main` if there is none of that name. Default `main`.

    Attributes:
        report: What became of the checkpoints so far.

    Raises:
        ValueError: For a `token` that is none.
    """

    def __init__(
        self,
        output_dir: str | Path,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        *,
        revision: str | None = None,
    ):
        self.output_dir = Path(output_dir)
        self.report = PushReport()
        self._repo_id = repo_id or default_repo(output_dir)
        self._options = {"token": check_token(token), "private": private, "revision": revision}
        self._snapshots = self.output_dir / PUSH_SNAPSHOTS
        # Left by a run that did not end.
        shutil.rmtree(self._snapshots, ignore_errors=True)
        self._changed = threading.Condition()
        self._waiting: tuple[int, Path] | None = None
        self._current: int | None = None
        self._deadline = math.inf
        self._thread = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
        self._thread.start()

    def push_checkpoint(self, path: str | Path, step: int) -> None:
        """Push a complete checkpoint soon. Returns at once; the folder may be renamed or deleted from then on.

        Args:
            path: The checkpoint's folder.
            step: Its number of optimizer steps.
        """
        try:
            self._snapshots.mkdir(exist_ok=True)
            snapshot = Path(tempfile.mkdtemp(prefix=f"{step}-", dir=self._snapshots))
            shutil.copytree(path, snapshot, copy_function=_link, dirs_exist_ok=True)
        except OSError as error:
            self._fail(step, describe(error))
            return
        with self._changed:
            overtaken, self._waiting = self._waiting, (step, snapshot)
            self._changed.notify_all()
        if overtaken is not None:
            self._supersede(*overtaken)

    def finish(self, timeout: float = 600.0) -> PushReport:
        """Wait for what is still to be pushed, and say what was not.

        Args:
            timeout: Longest time to wait in seconds, >= 0. An upload that takes longer goes on as long as the process.

        Returns:
            The report. What is in `failed` is complete in the run's folder.
        """
        with self._changed:
            self._deadline = time.monotonic() + timeout
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            current, waiting, self._waiting = self._current, self._waiting, None
        unpushed = [] if current is None else [current]
        unpushed += [] if waiting is None else [waiting[0]]
        for step in unpushed:
            self._fail(step, f"not done within {timeout:g} s")
        if current is None:
            shutil.rmtree(self._snapshots, ignore_errors=True)
        return self.report

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._waiting is not None or self._finishing)
                if self._waiting is None or time.monotonic() > self._deadline:
                    return
                (step, snapshot), self._waiting = self._waiting, None
                self._current = step
            self._push(step, snapshot)

    def _push(self, step: int, snapshot: Path) -> None:
        title = f"Checkpoint of step {step}"
        try:
            commit = FolderCommit(
                snapshot, self._repo_id, title, **self._options, path_in_repo=CHECKPOINT_FOLDER, mirror=True
            )
            retry(commit.attempt, f"Pushing the checkpoint of step {step}", attempts=None, pause=self._pause)
        # Whatever it is, training goes on, and so do the pushes after this one.
        except Exception as error:
            if self._waiting is not None:
                self._supersede(step, snapshot)
                return
            self._fail(step, describe(error))
        else:
            self.report.pushed.append(step)
            logger.info("Pushed the checkpoint of step %d to %s", step, commit.repo_id)
        shutil.rmtree(snapshot, ignore_errors=True)

    def _pause(self, seconds: float) -> bool:
        """Wait to try again, unless there is a later checkpoint or no time; once more when the run is finishing."""
        with self._changed:
            was_finishing = self._finishing
            left = min(seconds, self._deadline - time.monotonic())
            self._changed.wait_for(lambda: self._waiting is not None or self._finishing != was_finishing, left)
            return self._waiting is None and time.monotonic() < self._deadline

    @property
    def _finishing(self) -> bool:
        return self._deadline < math.inf

    def _supersede(self, step: int, snapshot: Path) -> None:
        self.report.superseded.append(step)
        shutil.rmtree(snapshot, ignore_errors=True)

    def _fail(self, step: int, reason: str) -> None:
        self.report.failed[step] = reason
        logger.warning(
            "The checkpoint of step %d was not pushed; it is complete in %s. %s", step, self.output_dir.name, reason
        )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    # Not every file system has hard links, and then the time of a copy is the price.
    except OSError:
        shutil.copyfile(source, target)
