"""Loading and saving of pipelines as in diffusers, with checks of files and tokens."""

from __future__ import annotations

import os
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ..config_types import built_from_file
from ..hub import HubMixin, check_token
from ..models.routed_model import check_no_weights_missing
from .model_index import check_model_index


class CheckedPipelineMixin(HubMixin):
    """Checks tokens, indexes and configs; to be named before diffusers' class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load as diffusers does; refuse an invalid `token`, and files that do not make up a whole pipeline."""
        with built_from_file(f"A {cls.__name__}"):
            pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                check_no_weights_missing(component)
        return pipeline

    @classmethod
    @wraps(DiffusionPipeline.download.__func__)
    def download(cls, *args: Any, **kwargs: Any) -> str:  # noqa: D102
        check_token(kwargs.get("token"))
        return super().download(*args, **kwargs)

    @wraps(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        check_token(kwargs.get("token"))
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> dict | tuple:
        """Load `model_index.json`, and refuse one that names other components, libraries or paths."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        path = Path(pretrained_model_name_or_path)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        check_model_index(config, path.parent if path.is_file() else path, cls)
        return loaded
