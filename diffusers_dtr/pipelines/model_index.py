"""What a `model_index.json` may name: it is downloaded, and diffusers imports the libraries that it names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline


# Whose classes the components of our pipelines are.
LIBRARIES = ("diffusers", "diffusers_dtr", "transformers")


def check_model_index(index: dict[str, Any], folder: Path, pipeline_class: type[DiffusionPipeline]) -> None:
    """Refuse what is no component of the pipeline, or would be code from elsewhere.

    Args:
        index: Content of `model_index.json`.
        folder: Where it is. A component may name a module that lies in its own folder there, which diffusers loads
            only with `trust_remote_code=True`.
        pipeline_class: What is to be loaded.

    Raises:
        ValueError: If a component is unknown, or of another library or a path.
    """
    known = [*inspect.signature(pipeline_class.__init__).parameters][1:]
    for name, value in index.items():
        # A custom pipeline's `_class_name` has the form of a component; other such names are diffusers' own notes.
        if name != "_class_name" and name.startswith("_"):
            continue
        if name != "_class_name" and name not in known:
            raise ValueError(
                f"`model_index.json` must name what {pipeline_class.__name__} has ({', '.join(known)}), got {name!r}."
            )
        if isinstance(value, list) and value != [None, None]:
            _check_class(name, value, folder if name == "_class_name" else folder / name)


def _check_class(name: str, value: list, folder: Path) -> None:
    if not (len(value) == 2 and all(isinstance(part, str) and part.isidentifier() for part in value)):
        raise ValueError(f"`model_index.json` must give `{name}` as [library, class], got {value}: refused.")
    if value[0] not in LIBRARIES and not (folder / f"{value[0]}.py").is_file():
        raise ValueError(
            f"`model_index.json` must name a class of {', '.join(LIBRARIES)} for `{name}`, got {value}: nothing of it "
            "was imported."
        )


def pipeline_class_name(index: dict[str, Any]) -> str | None:
    """The class of a pipeline, which a pipeline that ships its code records with the code's file.

    Args:
        index: Content of a `model_index.json`.
    """
    name = index.get("_class_name")
    return name[-1] if isinstance(name, list) else name
