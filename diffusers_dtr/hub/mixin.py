"""Pushing and loading of models and pipelines beyond diffusers' own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard, ModelCardData

from ..config_types import COMMON_TYPES, built_from_file, check_types
from .pushing import check_destination, check_token, push_folder


class HubMixin:
    """Pushes in one commit, and checks tokens and configs; to be named before diffusers' class."""

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> dict | tuple:
        """Load a config as diffusers does, and refuse an invalid `token` or a config other than a JSON object."""
        check_token(kwargs.get("token"))
        with built_from_file(f"The config of a {cls.__name__}"):
            loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if not isinstance(config, dict):
            raise ValueError(f"`{cls.config_name}` must hold a JSON object, got {type(config).__name__}.")
        check_types(COMMON_TYPES, config, f"`{cls.config_name}`")
        return loaded

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        max_shard_size: int | str = "10GB",
        **save_options: Any,
    ) -> CommitInfo:
        """Save to the Hub as diffusers does, in one commit, as [`~diffusers_dtr.hub.push_folder`] makes it.

        A new repository gets a card; the card of an old one stays as it is.

        Args:
            repo_id: Repository, which is made if need be; without a `/` in the user's namespace.
            commit_message: Commit message. Default "Upload" and the name of the class.
            private: Whether a new repository is private. None for what its owner has as default.
            token: Token, or None for the one that is logged in.
            create_pr: Whether to open a pull request instead of committing to a branch.
            safe_serialization: Whether to save weights as safetensors.
            variant: Variant of the weights, such as "fp16".
            subfolder: Folder of the repository. Default its root.
            revision: Branch, made from `main` if there is none of that name. Default `main`.
            max_shard_size: Weights larger than this, in bytes or as "5GB", are split over several files.
            **save_options: What else `save_pretrained` takes.

        Raises:
            ValueError: For a `revision` with `create_pr`, or an invalid `token`.
        """
        # Wrong arguments are refused before anything is saved.
        check_destination(token, revision, create_pr)
        weights = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **weights, **save_options)
            if not subfolder:
                self._card().save(Path(folder, "README.md"))
            return push_folder(
                folder,
                repo_id,
                commit_message or f"Upload {type(self).__name__}",
                token=token,
                private=private,
                revision=revision,
                create_pr=create_pr,
                path_in_repo=subfolder or "",
                keep=["README.md"],
            )

    def _upload_folder(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> CommitInfo:
        """The push at the end of diffusers' `save_pretrained(..., push_to_hub=True)`."""
        message = commit_message or f"Upload {type(self).__name__}"
        where = {"token": token, "create_pr": create_pr, "path_in_repo": subfolder or ""}
        return push_folder(working_dir, repo_id, message, **where)

    def _card(self) -> ModelCard:
        name = type(self).__name__
        metadata = ModelCardData(library_name="diffusers", tags=["diffusers", "diffusers-dtr"])
        return ModelCard(
            f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\nA `{name}` of "
            "[diffusers-dtr](https://arxiv.org/abs/2310.07138): `pip install diffusers-dtr`, then\n\n```py\n"
            f"from diffusers_dtr import {name}\n```\n"
        )
