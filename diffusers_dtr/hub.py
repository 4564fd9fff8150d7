"""Share the result of a training run on the Hub."""

from __future__ import annotations

from pathlib import Path

from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo, upload_folder


# What a run leaves in its folder that is of no use to others.
_PRIVATE_PATTERNS = ("checkpoint-*/**", "checkpoint-*.partial/**", ".pipeline.*/**", "latents/**")


def save_model_card(output_dir: str | Path, description: str, tags: list[str], base_model: str | None = None) -> Path:
    """Write the model card of a run, unless its folder has one already.

    Args:
        output_dir: The run's folder.
        description: Markdown that says what the model is and how it was trained.
        tags: Tags for the Hub.
        base_model: Model that was fine-tuned, or None.

    Returns:
        The card's path.
    """
    path = Path(output_dir) / "README.md"
    if not path.exists():
        card = load_or_create_model_card(
            repo_id_or_path=str(output_dir),
            from_training=True,
            base_model=base_model,
            model_description=description,
            inference=True,
        )
        populate_model_card(card, tags=tags).save(path)
    return path


def push_run(output_dir: str | Path, repo_id: str | None, token: str | None, private: bool, message: str) -> str:
    """Upload a run's pipeline, card, samples and logs, but not its checkpoints.

    Args:
        output_dir: The run's folder.
        repo_id: Repository; by default one named after the folder, in the user's namespace.
        token: Token, or None for the one that is logged in.
        private: Whether a new repository is private.
        message: Commit message.

    Returns:
        The address of the commit.
    """
    output_dir = Path(output_dir)
    repo_id = create_repo(repo_id or output_dir.resolve().name, exist_ok=True, private=private, token=token).repo_id
    commit = upload_folder(
        repo_id=repo_id,
        folder_path=output_dir,
        ignore_patterns=list(_PRIVATE_PATTERNS),
        commit_message=message,
        token=token,
    )
    return commit.commit_url
