"""Ships the code of a saved pipeline's classes with it, so that it loads on machines that lack this package.

diffusers takes a component recorded as `["diffusers_dtr", class]` from `<component>/diffusers_dtr.py`, and a pipeline
recorded likewise from `diffusers_dtr.py`, if told to `trust_remote_code`. Where this package is installed these files
are never run: see `diffusers_registration`.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from .bundling import bundled_source
from .run_folder import PIPELINE_INDEX


LIBRARY_NAME = __name__.partition(".")[0]
CODE_FILE = f"{LIBRARY_NAME}.py"

# What these give a class is saving and publishing with this package.
_BASES_LEFT_OUT = ("HubMixin", "SelfContainedMixin")

_HEADER = '''"""`{name}` in one file, for machines that lack the package that it comes from.

Generated from the source of diffusers-dtr {version} (https://arxiv.org/abs/2310.07138), under the Apache License 2.0.
Do not edit it: saving the pipeline with its code writes it anew.

diffusers runs all files of this name in one module. In one process, load what was saved by one version of the package.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

'''


class SelfContainedMixin:
    """Saves a pipeline with its code if asked to; to be named before diffusers' class."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, include_code: bool = False, **kwargs: Any
    ) -> None:
        """Save to a folder, as diffusers does.

        Args:
            save_directory: Folder, which is made if need be.
            *args: What diffusers' `save_pretrained` takes, such as `variant`.
            include_code: Whether to add the code of this package's classes, see [`add_code`].
            **kwargs: As `args`.

        Raises:
            ValueError: For `include_code` with `push_to_hub`, which uploads before there is code to upload.
        """
        if include_code and kwargs.get("push_to_hub"):
            raise ValueError(
                "`include_code` and `push_to_hub` exclude each other in `save_pretrained`. Use "
                "`pipeline.push_to_hub(repo_id, include_code=True)`."
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        if include_code:
            add_code(save_directory)


def add_code(folder: str | os.PathLike) -> list[Path]:
    """Make a saved pipeline load where this package is not installed, for those who trust its code.

    There it takes `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`. Where the package is installed,
    everything loads as before. Works for every pipeline class that has components of this package, diffusers' own
    included. Done again, it brings the code up to date.

    Args:
        folder: What a pipeline's `save_pretrained` left. The code is added, and `model_index.json` is made to say of a
            pipeline class of ours that its code is there.

    Returns:
        The files of code.

    Raises:
        ValueError: If neither the pipeline nor a component is of this package, or one has a class that it lacks.
    """
    folder = Path(folder)
    index_path = folder / PIPELINE_INDEX
    index = json.loads(index_path.read_text(encoding="utf-8"))
    if hasattr(import_module(LIBRARY_NAME), str(index["_class_name"])):
        index["_class_name"] = [LIBRARY_NAME, index["_class_name"]]
    sources = {
        folder / ("" if name == "_class_name" else name) / CODE_FILE: self_contained_source(entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] == LIBRARY_NAME
    }
    if not sources:
        raise ValueError(f"`folder` must hold a pipeline with a component of {LIBRARY_NAME}, {folder} has none.")
    for path, source in sources.items():
        path.write_text(source, encoding="utf-8")
    index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return list(sources)


def self_contained_source(class_name: str) -> str:
    """A class of this package as a module that imports nothing of the package.

    Saving and publishing with this package are left out: what remains are diffusers' own.

    Args:
        class_name: One of the package's public names.

    Returns:
        Python source, the same for the same version.

    Raises:
        ValueError: If the package has no such class.
    """
    library = import_module(LIBRARY_NAME)
    found = getattr(library, class_name, None)
    if not isinstance(found, type):
        raise ValueError(f"`class_name` must be a class of {LIBRARY_NAME} {library.__version__}, got {class_name!r}.")
    header = _HEADER.format(name=class_name, version=library.__version__)
    return header + bundled_source(found.__module__, found.__name__, _BASES_LEFT_OUT)
