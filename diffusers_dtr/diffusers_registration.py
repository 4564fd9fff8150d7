"""Make this library known to diffusers' loading code: the one module that touches diffusers' private table.

diffusers records a component under its top-level package only if that package is a key of `LOADABLE_CLASSES`, refuses
to load any other from the Hub, and looks pipeline classes up among its own names. There is no public way in.
"""

from __future__ import annotations

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES


LIBRARY_NAME = __name__.partition(".")[0]


def register_library() -> None:
    """Let diffusers save and load this library's models as `["diffusers_dtr", class name]`."""
    LOADABLE_CLASSES.setdefault(LIBRARY_NAME, {"ModelMixin": ["save_pretrained", "from_pretrained"]})


def register_pipeline(pipeline_class: type[diffusers.DiffusionPipeline]) -> None:
    """Let `DiffusionPipeline.from_pretrained` find a pipeline class by the name in `model_index.json`.

    Raises:
        RuntimeError: If diffusers has another class of that name.
    """
    name = pipeline_class.__name__
    if getattr(diffusers, name, pipeline_class) is not pipeline_class:
        raise RuntimeError(f"diffusers {diffusers.__version__} has a `{name}` of its own; ours would hide it.")
    setattr(diffusers, name, pipeline_class)
