"""What a run pushes to the Hub: checkpoints while training goes on, which they never hold up, and its result."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from ...hub import check_token, create_run_repo, default_repo, describe, push_folder, push_run, retry
from ...model_card.card import build_model_card, fetch_card, save_model_card
from ...run_record import PUSH_SNAPSHOTS
from ..config import HubConfig
from .folder import save_record


logger = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "last-checkpoint"


class BackgroundPush:
    """Keeps the latest checkpoint of a run on the Hub, in `last-checkpoint/`, one commit each, by a thread of its own.

    Until they are pushed, checkpoints are kept in `.push` as hard links, so that they may be renamed or deleted
    meanwhile. A push that fails for a reason that may pass is tried again until it succeeds or is superseded. Nothing
    is raised: what fails is logged. The thread is a daemon, unlike those of the client's `run_as_future`, which has no
    time limits: an upload that hangs would keep the process from ending.

    Attributes:
        report: What became of the checkpoint of every step: "pushed", "superseded", or why it could not be pushed.
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
        self.report: dict[int, str] = {}
        self._repo_id = repo_id or default_repo(output_dir)
        self._options = {"token": check_token(token), "private": private, "revision": revision}
        self._snapshots = self.output_dir / PUSH_SNAPSHOTS
        shutil.rmtree(self._snapshots, ignore_errors=True)  # left by a run that was killed
        self._changed = threading.Condition()
        self._waiting: tuple[int, Path] | None = None
        self._current: int | None = None
        self._deadline = math.inf
        self._thread = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
        self._thread.start()

    def push_checkpoint(self, path: str | Path, step: int) -> None:
        """Push the complete checkpoint of a step soon; its folder may be renamed or deleted afterwards."""
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
        if overtaken:
            self.report[overtaken[0]] = "superseded"
            shutil.rmtree(overtaken[1], ignore_errors=True)

    def finish(self, timeout: float = 600.0) -> dict[int, str]:
        """Wait for at most `timeout` seconds for what is still to be pushed, and say what was not."""
        with self._changed:
            self._deadline = time.monotonic() + timeout
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            current, waiting, self._waiting = self._current, self._waiting, None
        for step in filter(None, [current, waiting and waiting[0]]):
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
            shutil.rmtree(snapshot, ignore_errors=True)

    def _push(self, step: int, snapshot: Path) -> None:
        where = {"path_in_repo": CHECKPOINT_FOLDER, "mirror": True, "attempts": None, "pause": self._pause}
        try:
            push_folder(snapshot, self._repo_id, f"Checkpoint of step {step}", **self._options, **where)
        except Exception as error:  # whatever it is, training goes on, and so do the pushes after this one
            if self._waiting is None:
                self._fail(step, describe(error))
            else:
                self.report[step] = "superseded"
        else:
            self.report[step] = "pushed"

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

    def _fail(self, step: int, reason: str) -> None:
        self.report[step] = reason
        folder = self.output_dir.name
        logger.warning("The checkpoint of step %d was not pushed; it is complete in %s. %s", step, folder, reason)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has hard links; a copy takes longer
        shutil.copyfile(source, target)


def start_background_push(config: HubConfig, output_dir: Path) -> BackgroundPush | None:
    """What pushes checkpoints while training goes on, or None where they are not to be pushed."""
    if not config.push_to_hub or config.hub_strategy != "checkpoint":
        return None
    return BackgroundPush(output_dir, *_repository(config), revision=config.hub_revision)


def rehearse_sharing(config: HubConfig, output_dir: Path, record: dict[str, Any]) -> None:
    """Write a card of what is known of a run at its start, and read what the Hub has: what fails, fails before it."""
    with tempfile.TemporaryDirectory() as folder:
        save_record(record, folder)
        build_model_card(folder, repo_id=config.hub_model_id)
    if config.push_to_hub:
        _published_card(config, output_dir)


def push_result(config: HubConfig, output_dir: Path, background_push: BackgroundPush | None) -> None:
    """Push a finished run, with a card that keeps what was edited on the Hub."""
    if background_push is not None:
        logger.info(f"Checkpoints on the Hub: {background_push.finish()}")
    repo_id, published = _published_card(config, output_dir)
    save_model_card(output_dir, repo_id=repo_id, published=published)
    where = {"revision": config.hub_revision, "create_pr": config.hub_create_pr}
    url = push_run(output_dir, repo_id, config.hub_token, config.hub_private_repo, "End of training", **where)
    logger.info(f"Pushed to {url}")


def _published_card(config: HubConfig, output_dir: Path) -> tuple[str, str | None]:
    """The name of a run's repository, and its card as it may have been edited there."""
    where = {"token": config.hub_token, "revision": config.hub_revision}
    repo_id = retry(lambda: create_run_repo(output_dir, *_repository(config)), "Looking for the repository")
    return repo_id, retry(lambda: fetch_card(repo_id, **where), "Reading the model card")


def _repository(config: HubConfig) -> tuple[str | None, str | None, bool | None]:
    return config.hub_model_id, config.hub_token, config.hub_private_repo
