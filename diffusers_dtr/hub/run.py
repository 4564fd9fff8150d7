"""Share the result of a training run on the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import create_repo

from ..run_folder import (
    CHECKPOINT_PREFIX,
    LATENTS,
    PARTIAL_PIPELINE,
    PREVIOUS_PIPELINE,
    PUSH_SNAPSHOTS,
    RUN_LOCK,
    TEXT_EMBEDDINGS,
)
from .commit import FolderCommit, check_token, retry


# What a run leaves in its folder that is of no use to others, or not complete. A `*` matches `/` too.
_PRIVATE_PATTERNS = (
    f"{CHECKPOINT_PREFIX}*/*",
    f"{PARTIAL_PIPELINE}/*",
    f"{PREVIOUS_PIPELINE}/*",
    f"{PUSH_SNAPSHOTS}/*",
    f"{RUN_LOCK}*",
    f"{LATENTS}*/*",
    f"{TEXT_EMBEDDINGS}*/*",
    "*.partial",
)


def default_repo(output_dir: str | Path) -> str:
    """The name of a run's repository where none is given: that of its folder.

    Args:
        output_dir: The run's folder.

    Returns:
        A name without a namespace, which is the user's.
    """
    return Path(output_dir).resolve().name


def create_run_repo(
    output_dir: str | Path, repo_id: str | None, token: str | None, private: bool | None = None
) -> str:
    """Make sure that a run's repository is there: before training, because a wrong token should not show after it.

    Args:
        output_dir: The run's folder.
        repo_id: Repository; by default one named after the folder, in the user's namespace.
        token: Token, or None for the one that is logged in.
        private: Whether a new repository is private. None for what its owner has as default.

    Returns:
        The repository's full name.

    Raises:
        ValueError: For a `token` that is none.
    """
    name = repo_id or default_repo(output_dir)
    return create_repo(name, exist_ok=True, private=private, token=check_token(token)).repo_id


def push_run(
    output_dir: str | Path,
    repo_id: str | None,
    token: str | None,
    private: bool | None,
    message: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a run's pipeline, card, samples and logs, but not its checkpoints, in one commit.

    What fails for a reason that may pass is tried again for about half a minute.

    Args:
        output_dir: The run's folder. Its files replace those of the same name in the repository, the card too.
        repo_id: Repository; by default one named after the folder, in the user's namespace.
        token: Token, or None for the one that is logged in.
        private: Whether a new repository is private. None for what its owner has as default.
        message: Commit message.
        revision: Branch, made from `main` if there is none of that name. Default `main`.
        create_pr: Whether to open a pull request instead of committing to a branch.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: For a `revision` with `create_pr`, or a `token` that is none.
    """
    commit = FolderCommit(
        output_dir,
        repo_id or default_repo(output_dir),
        message,
        token=token,
        private=private,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=_PRIVATE_PATTERNS,
    )
    made = retry(commit.attempt, f"Pushing to {commit.repo_id}")
    return made.pr_url or made.commit_url
