"""What a run is told of `--pretrained_model_name_or_path` before anything of it is loaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from ..models.routed_model import RoutedModelMixin
from ..pipelines.model_index import component_class_name, load_model_index, pipeline_class_name


# Pipelines on the Hub have it where diffusers had one class for all of its transformers.
_FORMER_NAMES = {"DiTTransformer2DModel": "Transformer2DModel"}


def pretrained_options(args: argparse.Namespace) -> dict[str, Any]:
    """Where and which files of `--pretrained_model_name_or_path` to load, as `from_pretrained` takes it.

    Args:
        args: Parsed flags of [`~diffusers_dtr.training.arguments.add_pretrained_arguments`].

    Raises:
        ValueError: If a folder has no weights of the variant.
    """
    folder = Path(args.pretrained_model_name_or_path or "")
    if args.variant is not None and folder.is_dir() and not any(folder.rglob(f"*.{args.variant}[.-]*")):
        raise ValueError(
            f"`--variant` must be one that {folder} has weights of, or be left out, got {args.variant!r}."
        )
    return {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}


def pretrained_pipeline_class(
    name_or_path: str | os.PathLike, *, revision: str | None = None, cache_dir: str | os.PathLike | None = None
) -> str | None:
    """Name of a saved pipeline's class, without loading the pipeline.

    Args:
        name_or_path: Folder, or id on the Hub.
        revision: Of the repository.
        cache_dir: Where downloads are kept.
    """
    return pipeline_class_name(load_model_index(name_or_path, revision=revision, cache_dir=cache_dir))


def pretrained_component(args: argparse.Namespace, name: str) -> str | None:
    """Class of a component of `--pretrained_model_name_or_path`, or None if there is none.

    Args:
        args: Parsed flags.
        name: The component's name in the pipeline.
    """
    if args.pretrained_model_name_or_path is None:
        return None
    options = {"revision": args.revision, "cache_dir": args.cache_dir}
    return component_class_name(load_model_index(args.pretrained_model_name_or_path, **options), name)


def pretrained_class_names(args: argparse.Namespace) -> dict[int, str] | None:
    """Names of the classes of `--pretrained_model_name_or_path`, or None if it has none.

    Args:
        args: Parsed flags.

    Raises:
        ValueError: If what the pipeline has are not names by number.
    """
    if args.pretrained_model_name_or_path is None:
        return None
    options = {"revision": args.revision, "cache_dir": args.cache_dir}
    names = load_model_index(args.pretrained_model_name_or_path, **options).get("id2label")
    if not names:
        return None
    if not all(key.isdecimal() for key in names):
        raise ValueError(
            f"`id2label` of {args.pretrained_model_name_or_path} must hold names of classes by their numbers."
        )
    return {int(label): name for label, name in names.items()}


def pretrained_denoiser(args: argparse.Namespace, model_classes: Mapping[str, type[RoutedModelMixin]]) -> str:
    """What `--pretrained_model_name_or_path` calls its denoiser.

    Args:
        args: Parsed flags.
        model_classes: The names that it may have, and the class that each is loaded as.

    Raises:
        ValueError: If there is no denoiser of these names and classes, or of those that they route.
    """
    found = {name: pretrained_component(args, name) for name in model_classes}
    for name, model_class in model_classes.items():
        plain = model_class.plain_class.__name__
        if found[name] in {model_class.__name__, plain, _FORMER_NAMES.get(plain, plain)}:
            return name
    allowed = " or ".join(f"a `{name}` of {cls.plain_class.__name__}" for name, cls in model_classes.items())
    raise ValueError(
        f"`pretrained_model_name_or_path` must be a pipeline with {allowed}, plain or routed, got "
        f"{args.pretrained_model_name_or_path} with {found}."
    )


def pretrained_config(args: argparse.Namespace, name: str, model_class: type[ModelMixin]) -> dict[str, Any]:
    """The saved config of a component of `--pretrained_model_name_or_path`.

    Args:
        args: Parsed flags.
        name: The component's name in the pipeline.
        model_class: The class that it is going to be loaded as.
    """
    options = {"revision": args.revision, "cache_dir": args.cache_dir}
    return model_class.load_config(args.pretrained_model_name_or_path, subfolder=name, **options)
