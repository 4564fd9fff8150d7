"""What a saved config alone tells of a routed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import accelerate

import diffusers_dtr

from .family import RoutedModelMixin


def model_without_weights(config: Mapping[str, Any]) -> RoutedModelMixin | None:
    """The model that a config describes, built in no time and memory.

    Args:
        config: Content of a saved model's `config.json`.

    Returns:
        The model, whose weights are on the meta device, or None if its class is not a routed one of this package.

    Raises:
        ValueError: If the config describes no model.
    """
    # Only names that are public here: the config may be anybody's.
    name = config.get("_class_name")
    model_class = getattr(diffusers_dtr, name) if name in diffusers_dtr.__all__ else None
    if not (isinstance(model_class, type) and issubclass(model_class, RoutedModelMixin)):
        return None
    with accelerate.init_empty_weights():
        return model_class.from_config(config)
