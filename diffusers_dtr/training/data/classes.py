"""Which class is which: the classes of images, matched by name with those that a model knows already."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from unicodedata import normalize

import numpy as np

from ...models.dit import DTRTransformer2DModel
from ...pipelines.class_labels import classes_by_name
from ..config import ModelConfig
from ..pretrained import pretrained_class_names
from .training_images import TrainingImages, first_names


logger = logging.getLogger(__name__)


def match_classes(
    images: TrainingImages, id2label: Mapping[int | str, str] | None, num_classes: int, *, new_classes: bool = False
) -> tuple[TrainingImages, bool]:
    """Give labelled images the labels that a model has for classes of their names; names with commas are synonyms.

    Where only one of them has names, or none, and as many classes, the numbers are taken to agree: nothing tells.
    With `new_classes`, there may be classes that the model does not know. They get the labels from `num_classes`, the
    model's number of classes, on; if it knows none of them, those that they have.

    Returns:
        The images, and whether the model's classes are among theirs.

    Raises:
        ValueError: If a name may be one of several classes, or several names are one class, or for a class that the
            model does not know where there must not be any.
    """
    known = {
        int(label): normalize("NFC", name) for label, name in (id2label or {}).items() if int(label) < num_classes
    }
    names = images.id2label
    if not known or names is None:
        return _match_by_number(images, known, num_classes, new_classes)
    found = {label: label for label in names} if names == known else _known_labels(names, known)  # names may repeat
    new = {label: name for label, name in names.items() if label not in found}
    if new and not new_classes:
        raise ValueError(
            f"The classes of the images must be among {first_names(known.values())}, got {first_names(new.values())}."
        )
    if not found:
        logger.warning(
            f"None of the classes {first_names(names.values())} is known to the pretrained model "
            f"({first_names(known.values())}): all of them are new classes."
        )
        return images, False
    logger.info(f"Classes that the model knows by their names: {len(found)}.")
    if new:
        logger.warning(f"New classes, from label {num_classes} on: {first_names(new.values())}.")
    found |= {label: num_classes + place for place, label in enumerate(new)}
    labels = np.array([found[label] for label in range(images.num_classes)])[images.labels]
    names = known | {found[label]: name for label, name in new.items()}
    return replace(images, labels=labels, num_classes=num_classes + len(new), id2label=names), True


def match_pretrained_classes(
    config: ModelConfig, model: DTRTransformer2DModel, images: TrainingImages
) -> TrainingImages:
    """The images with the pretrained model's numbers for the classes whose names it knows."""
    names, num_classes = pretrained_class_names(config), model.config.num_embeds_ada_norm
    images, known = match_classes(images, names, num_classes or 0, new_classes=True)
    if not known or images.num_classes > num_classes:
        model.replace_classes(images.num_classes, keep=known)
    return images


def _match_by_number(
    images: TrainingImages, known: dict[int, str], num_classes: int, new_classes: bool
) -> tuple[TrainingImages, bool]:
    if images.num_classes == num_classes or (images.num_classes < num_classes and not new_classes):
        if known or images.id2label is not None:
            logger.warning("Only one of the model and the images names its classes: their numbers are taken to agree.")
        names = known or (images.id2label if images.num_classes == num_classes else None)
        return replace(images, num_classes=num_classes, id2label=names or None), True
    if not new_classes:
        raise ValueError(f"The images have {images.num_classes} classes, but the model knows {num_classes}.")
    logger.warning(
        f"The {images.num_classes} classes of the images are new ones: the pretrained model has {num_classes}, and "
        "only names of both would tell which are the same."
    )
    return images, False


def _known_labels(names: Mapping[int, str], known: Mapping[int, str]) -> dict[int, int]:
    """The model's label of each class that it knows."""
    by_name = classes_by_name(known)
    found: dict[int, int] = {}
    taken: dict[int, str] = {}
    for label, name in names.items():
        candidates = [other for other in by_name.get(name, []) if known[other] == name] or by_name.get(name)
        if candidates is None:
            candidates = sorted({other for part in name.split(",") for other in by_name.get(part.strip(), [])})
        if len(candidates) > 1:
            options = ", ".join(f"{other} ({known[other]})" for other in candidates)
            raise ValueError(f"The class {name!r} of the images may be each of the model's {options}: rename it.")
        for other in candidates:
            if other in taken:
                raise ValueError(
                    f"The classes {taken[other]}, {name} of the images are one class of the model, {known[other]}: "
                    "merge them."
                )
            found[label], taken[other] = other, name
    return found
