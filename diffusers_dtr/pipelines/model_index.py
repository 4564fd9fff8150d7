"""What a `model_index.json` may name: it is downloaded, and diffusers imports the libraries that it names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import diffusers
from diffusers import ConfigMixin, DiffusionPipeline

from ..config_types import COMMON_TYPES, built_from_file, check_types, constructor_types, read_object, shortened


# Whose classes the components of our pipelines are.
LIBRARIES = ("diffusers", "diffusers_dtr", "transformers")


def check_model_index(index: dict[str, Any], folder: Path, pipeline_class: type[DiffusionPipeline]) -> None:
    """Refuse unknown components, code from other libraries or paths, and configs of wrong types."""
    known = constructor_types(pipeline_class)
    values = {name: hint for name, hint in known.items() if not _is_component(hint)}
    check_types({**values, "id2label": dict[str, str] | None}, index, "`model_index.json`")
    # A custom pipeline's `_class_name` has the form of a component; other such names are diffusers' own notes.
    if not isinstance(index.get("_class_name", ""), str):
        _check_class("_class_name", index["_class_name"], folder)
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if name not in known:
            raise ValueError(
                f"`model_index.json` must name what {pipeline_class.__name__} has ({', '.join(known)}), got {name!r}."
            )
        if name not in values and value != [None, None]:
            _check_class(name, value, folder / name)
            _check_config(name, value, folder)


def _is_component(hint: Any) -> bool:
    return any(isinstance(part, type) and hasattr(part, "from_pretrained") for part in (hint, *get_args(hint)))


def _check_config(name: str, value: list[str], folder: Path) -> None:
    """Check the config of a component of diffusers; our own classes check themselves."""
    found = getattr(diffusers, value[1], None) if value[0] == "diffusers" else None
    if not (isinstance(found, type) and issubclass(found, ConfigMixin) and found.config_name):
        return
    path = folder / name / found.config_name
    if path.is_file():
        read_object(path, f"{name}/{path.name}", constructor_types(found))


def _check_pair(name: str, value: Any) -> None:
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)):
        raise ValueError(f"`model_index.json` must give `{name}` as [library, class], got {shortened(value)}.")


def _check_class(name: str, value: Any, folder: Path) -> None:
    _check_pair(name, value)
    are_names = all(part.isidentifier() for part in value)  # a path could lead out of the folder
    if not are_names or not (value[0] in LIBRARIES or (folder / f"{value[0]}.py").is_file()):
        raise ValueError(
            f"`model_index.json` must name a class of {', '.join(LIBRARIES)} for `{name}`, got {shortened(value)}: "
            "nothing of it was imported."
        )


def load_model_index(name_or_path: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """The `model_index.json` of any pipeline of diffusers, in a folder or on the Hub."""
    with built_from_file("A pipeline"):
        index = DiffusionPipeline.load_config(name_or_path, **options)
    if not isinstance(index, dict):
        raise ValueError(f"`model_index.json` must hold a JSON object, got {type(index).__name__}.")
    check_types({**COMMON_TYPES, "id2label": dict[str, str] | None}, index, "`model_index.json`")
    return index


def component_class_name(index: dict[str, Any], name: str) -> str | None:
    """The class of a pipeline's component, or None if it has none of that name."""
    value = index.get(name) or [None, None]
    if value == [None, None]:
        return None
    _check_pair(name, value)
    return value[1]


def pipeline_class_name(index: dict[str, Any]) -> str | None:
    """The class of a pipeline; one that ships its code records it behind the code's file."""
    name = index.get("_class_name")
    return name[-1] if isinstance(name, list) and name else name or None
