"""What a run pushes to the Hub, where its flags say so: checkpoints on the way, the result at its end."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...hub.pushing import create_run_repo, push_run, retry
from ...model_card.card import build_model_card, fetch_card, save_model_card
from ..config import HubConfig
from .background_push import BackgroundPush
from .outputs import save_record


logger = logging.getLogger(__name__)


def start_background_push(config: HubConfig, output_dir: Path) -> BackgroundPush | None:
    """What pushes checkpoints while training goes on, or None where they are not to be pushed.

    Args:
        config: Where to push.
        output_dir: The run's folder.
    """
    if not config.push_to_hub or config.hub_strategy != "checkpoint":
        return None
    return BackgroundPush(
        output_dir, config.hub_model_id, config.hub_token, config.hub_private_repo, revision=config.hub_revision
    )


def published_card(config: HubConfig, output_dir: Path) -> tuple[str, str | None]:
    """The name of a run's repository, and its card as it may have been edited there.

    Args:
        config: Where to push.
        output_dir: The run's folder.
    """
    repo_id = retry(
        lambda: create_run_repo(output_dir, config.hub_model_id, config.hub_token, config.hub_private_repo),
        "Looking for the repository",
    )
    card = retry(
        lambda: fetch_card(repo_id, token=config.hub_token, revision=config.hub_revision), "Reading the model card"
    )
    return repo_id, card


def rehearse_sharing(config: HubConfig, output_dir: Path, record: dict[str, Any]) -> None:
    """Write a card of what is known of a run at its start, and read what the Hub has: what fails, fails before it.

    Args:
        config: Where to push.
        output_dir: The run's folder.
        record: Of a run without results.
    """
    with TemporaryDirectory() as folder:
        save_record(record, folder)
        build_model_card(folder, repo_id=config.hub_model_id)
    if config.push_to_hub:
        published_card(config, output_dir)


def push_result(config: HubConfig, output_dir: Path, background_push: BackgroundPush | None) -> None:
    """Push a finished run, with a card that keeps what was edited on the Hub.

    Args:
        config: Where to push.
        output_dir: The run's folder.
        background_push: What pushes its checkpoints, which is waited for, or None.
    """
    if background_push is not None:
        report = background_push.finish()
        logger.info(f"Checkpoints on the Hub: {report}")
    repo_id, published = published_card(config, output_dir)
    save_model_card(output_dir, repo_id=repo_id, published=published)
    url = push_run(
        output_dir,
        repo_id,
        config.hub_token,
        config.hub_private_repo,
        "End of training",
        revision=config.hub_revision,
        create_pr=config.hub_create_pr,
    )
    logger.info(f"Pushed to {url}")
