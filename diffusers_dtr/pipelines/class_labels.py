"""Labels for the denoiser from class numbers or names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import SupportsIndex

import torch
from diffusers import DiffusionPipeline


def classes_by_name(id2label: Mapping[str, str] | None) -> dict[str, list[int]]:
    """The classes that each name or synonym stands for, in alphabetical order."""
    classes: dict[str, list[int]] = {}
    for key, names in (id2label or {}).items():
        for name in dict.fromkeys([names, *(part.strip() for part in names.split(","))]):
            classes.setdefault(name, []).append(int(key))
    return dict(sorted(classes.items()))


def names_of_classes(pipeline: DiffusionPipeline) -> dict[int | str, str] | None:
    """The class names of a pipeline with `id2label`, or with `labels` as a `DiTPipeline`; or None."""
    if pipeline.config.get("id2label") is not None:
        return dict(pipeline.config["id2label"])
    names: dict[int, list[str]] = {}
    for name, label in (getattr(pipeline, "labels", None) or {}).items():
        names.setdefault(label, []).append(name)
    return {label: ", ".join(names[label]) for label in sorted(names)} or None


def class_named(name: str, classes: Mapping[str, list[int]]) -> int:
    """The class that a name stands for."""
    if name not in classes:
        known = ", ".join(list(classes)[:20]) or "none, because the pipeline has no `id2label`"
        number = f" A class's number is an int: {int(name)}, without quotes." if name.isdecimal() else ""
        raise ValueError(f"`class_labels` has no class named {name!r}. Known names: {known}.{number}")
    if len(classes[name]) > 1:
        raise ValueError(f"`class_labels`: {name!r} names the classes {classes[name]}; pass one of these numbers.")
    return classes[name][0]


def labels_of_images(
    class_labels: int | str | Sequence[int | str] | torch.Tensor | None,
    num_images: int | None,
    *,
    classes: Mapping[str, list[int]],
    num_classes: int | None,
    null_class: int | None,
) -> tuple[int, list[int] | None]:
    """The number of requested images, and their labels, or None for an unconditional denoiser."""
    if class_labels is None:
        count = 1 if num_images is None else num_images
        if null_class is None and (num_classes or 0) > 1:
            raise ValueError(
                f"`class_labels` must be given: the denoiser has {num_classes} classes and no null class."
            )
        label = 0 if null_class is None else null_class
        return count, None if num_classes is None else [label] * count
    if num_images is not None:
        raise ValueError(f"`num_images`={num_images} and `class_labels` cannot both be given: labels count images.")
    if num_classes is None:
        raise ValueError("`class_labels` must be None: the denoiser is unconditional. Use `num_images`.")
    if isinstance(class_labels, torch.Tensor):
        class_labels = class_labels.reshape(-1).tolist()
    elif isinstance(class_labels, (int, str)):
        class_labels = [class_labels]
    if not all(isinstance(label, (str, SupportsIndex)) for label in class_labels):
        raise TypeError(f"`class_labels` must be integers or names, got {class_labels!r}.")
    labels = [class_named(label, classes) if isinstance(label, str) else index(label) for label in class_labels]
    for label in labels:
        if label != null_class and not 0 <= label < num_classes:
            named = f" The class named {str(label)!r} is a string, in quotes." if str(label) in classes else ""
            raise ValueError(
                f"`class_labels` must be names of classes or numbers in [0, {num_classes - 1}], got {label}.{named}"
            )
    return len(labels), labels
