"""Make this library known to diffusers: the one module that touches diffusers' private tables.

diffusers records a component under its top-level package only if that package is a key of `LOADABLE_CLASSES`, refuses
to load any other from the Hub, and looks pipeline classes up among its own names. What it knows of a model's LoRA
scales it looks up by the name of the model's class, and what its caches know of a block by the block's class, so that
subclasses would lose both, the first in silence. There is no public way in.
"""

from __future__ import annotations

from dataclasses import replace

import diffusers
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES


def register_library() -> None:
    """Let diffusers save and load this library's models as `["diffusers_dtr", class name]`."""
    LOADABLE_CLASSES.setdefault("diffusers_dtr", {"ModelMixin": ["save_pretrained", "from_pretrained"]})


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
