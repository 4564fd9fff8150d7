"""Make this library known to diffusers: the one module that touches diffusers' private tables.

diffusers records a component under its top-level package only if that package is a key of `LOADABLE_CLASSES`, refuses
to load any other from the Hub, and looks pipeline classes up among its own names. What it knows of a model's LoRA
scales it looks up by the name of the model's class, and what its caches know of a block by the block's class, so that
subclasses would lose both, the first in silence. And it prefers code that lies beside a component to the library that
the component names, however much the library is installed. There is no public way in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import diffusers
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from diffusers.pipelines import pipeline_loading_utils
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .self_contained import CODE_FILE, LIBRARY_NAME


def register_library() -> None:
    """Let diffusers save and load this library's models as `["diffusers_dtr", class name]`."""
    LOADABLE_CLASSES.setdefault(LIBRARY_NAME, {"ModelMixin": ["save_pretrained", "from_pretrained"]})


def register_instead_of_code() -> None:
    """Let diffusers take this library's classes from here where a repository has their code too.

    Such repositories need no `trust_remote_code` then, and their code is not run. For other code nothing changes.
    """
    load = pipeline_loading_utils.get_class_from_dynamic_module
    if not isinstance(load, _InstalledFirst):
        pipeline_loading_utils.get_class_from_dynamic_module = _InstalledFirst(load)


@dataclass(frozen=True)
class _InstalledFirst:
    """diffusers' loader of classes from code, but for those that this library has."""

    load: Callable[..., type]

    def __call__(self, folder_or_repo: Any, module_file: str, *args: Any, **kwargs: Any) -> type:
        name = kwargs.get("class_name")
        # A class may be newer than this installation.
        installed = getattr(import_module(LIBRARY_NAME), name, None) if module_file == CODE_FILE and name else None
        return self.load(folder_or_repo, module_file, *args, **kwargs) if installed is None else installed


def register_pipeline(pipeline_class: type[diffusers.DiffusionPipeline]) -> None:
    """Let `DiffusionPipeline.from_pretrained` find a pipeline class by the name in `model_index.json`.

    Raises:
        RuntimeError: If diffusers has another class of that name.
    """
    name = pipeline_class.__name__
    if getattr(diffusers, name, pipeline_class) is not pipeline_class:
        raise RuntimeError(f"diffusers {diffusers.__version__} has a `{name}` of its own; ours would hide it.")
    setattr(diffusers, name, pipeline_class)


def register_routed_model(model_class: type[diffusers.ModelMixin]) -> None:
    """Let diffusers treat a routed model's LoRA scales, and its blocks in caches, as those of the class it routes.

    Args:
        model_class: Has the diffusers class that it routes as `plain_class` and, if blocks have routed classes, these
            as `routed_blocks`.
    """
    scales = _SET_ADAPTER_SCALE_FN_MAPPING
    scales[model_class.__name__] = scales[model_class.plain_class.__name__]
    for block_class in getattr(model_class, "routed_blocks", ()):
        TransformerBlockRegistry.register(block_class, replace(TransformerBlockRegistry.get(block_class.__base__)))
