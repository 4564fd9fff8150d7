"""Make this library known to diffusers: the one module that touches diffusers' private tables.

diffusers records a component under its top-level package only if that package is a key of `LOADABLE_CLASSES`, refuses
to load any other from the Hub, and looks pipeline classes up among its own names. What it knows of a model's LoRA
scales it looks up by the name of the model's class, and what its caches know of a block by the block's class, so that
subclasses would lose both, the first in silence. There is no public way in.
"""

from __future__ import annotations

from dataclasses import replace

import diffusers
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from torch import nn


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


def register_lora_scales(model_class: type[diffusers.ModelMixin], plain_class: type[diffusers.ModelMixin]) -> None:
    """Let diffusers treat a routed model's LoRA scales as those of the class that it routes."""
    scales = _SET_ADAPTER_SCALE_FN_MAPPING.get(plain_class.__name__)
    if scales is not None:
        _SET_ADAPTER_SCALE_FN_MAPPING[model_class.__name__] = scales


def block_metadata(block_class: type[nn.Module]) -> TransformerBlockMetadata | None:
    """What diffusers knows of a block, if it is one of those that its caches know."""
    try:
        return TransformerBlockRegistry.get(block_class)
    except ValueError:
        return None


def register_block(block_class: type[nn.Module], metadata: TransformerBlockMetadata | None) -> None:
    """Let diffusers' caches treat a routed block as the class that it routes."""
    if metadata is not None:
        TransformerBlockRegistry.register(block_class, replace(metadata))
