"""What a run is told of `--pretrained_model_name_or_path` before anything of it is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin, SchedulerMixin

from ..models.routed_model import RoutedModelMixin
from ..pipelines.model_index import component_class_name, load_model_index, pipeline_class_name
from .config import ModelConfig


# Pipelines on the Hub have it where diffusers had one class for all of its transformers.
_FORMER_NAMES = {"DiTTransformer2DModel": "Transformer2DModel"}


def pretrained_options(config: ModelConfig) -> dict[str, Any]:
    """Which files to load, as `from_pretrained` takes it; refuses a variant that a folder has no weights of."""
    folder = Path(config.pretrained_model_name_or_path or "")
    if config.variant is not None and folder.is_dir() and not any(folder.rglob(f"*.{config.variant}[.-]*")):
        raise ValueError(f"`--variant` must be one that {folder} has weights of, or left out, got {config.variant!r}.")
    return {"revision": config.revision, "variant": config.variant, "cache_dir": config.cache_dir}


def _index(config: ModelConfig) -> dict[str, Any]:
    name = config.pretrained_model_name_or_path
    return {} if name is None else load_model_index(name, revision=config.revision, cache_dir=config.cache_dir)


def pretrained_pipeline_class(config: ModelConfig) -> str | None:
    """Name of the pipeline's class."""
    return pipeline_class_name(_index(config))


def pretrained_component(config: ModelConfig, name: str) -> str | None:
    """Class of a component, or None if there is none."""
    return component_class_name(_index(config), name)


def pretrained_class_names(config: ModelConfig) -> dict[int, str] | None:
    """Names of the classes by their numbers, or None if there are none."""
    names = _index(config).get("id2label") or {}
    if not all(key.isdecimal() for key in names):
        raise ValueError(f"`id2label` of {config.pretrained_model_name_or_path} must be names of classes by number.")
    return {int(label): name for label, name in names.items()} or None


def pretrained_denoiser(config: ModelConfig, model_classes: Mapping[str, type[RoutedModelMixin]]) -> str:
    """What the pipeline calls its denoiser."""
    found = {name: pretrained_component(config, name) for name in model_classes}
    for name, model_class in model_classes.items():
        plain = model_class.plain_class.__name__
        if found[name] in {model_class.__name__, plain, _FORMER_NAMES.get(plain, plain)}:
            return name
    allowed = " or ".join(f"a `{name}` of {cls.plain_class.__name__}" for name, cls in model_classes.items())
    raise ValueError(
        f"`pretrained_model_name_or_path` must be a pipeline with {allowed}, plain or routed, got "
        f"{config.pretrained_model_name_or_path} with {found}."
    )


def pretrained_config(config: ModelConfig, name: str, model_class: type[ModelMixin]) -> dict[str, Any]:
    """The saved config of a component."""
    options = {"revision": config.revision, "cache_dir": config.cache_dir}
    return model_class.load_config(config.pretrained_model_name_or_path, subfolder=name, **options)


def pretrained_scheduler(config: ModelConfig) -> SchedulerMixin | None:
    """The pipeline's scheduler, or None without a pipeline."""
    if config.pretrained_model_name_or_path is None:
        return None
    name = pretrained_component(config, "scheduler")
    scheduler_class = getattr(diffusers, str(name), None)
    if not (inspect.isclass(scheduler_class) and issubclass(scheduler_class, SchedulerMixin)):
        raise ValueError(
            "`pretrained_model_name_or_path` must be a pipeline with a scheduler of diffusers, got "
            f"{config.pretrained_model_name_or_path} with {name}."
        )
    return scheduler_class.from_pretrained(
        config.pretrained_model_name_or_path, subfolder="scheduler", **pretrained_options(config)
    )
