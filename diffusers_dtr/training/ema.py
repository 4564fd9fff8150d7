"""Using and reading the average of a model's weights (diffusers' EMAModel)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel


_STATE = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")


@contextmanager
def averaged_weights(ema: EMAModel | None, model: torch.nn.Module) -> Iterator[None]:
    """Give the model its averaged weights for a while; without an average it keeps its own.

    Args:
        ema: The average, or None.
        model: The model that it averages.
    """
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


def load_ema_state(path: str | Path, model_class: type[ModelMixin]) -> dict:
    """Read what `EMAModel.save_pretrained` wrote, as `EMAModel.load_state_dict` takes it.

    Args:
        path: Its folder.
        model_class: Class of the averaged model.

    Returns:
        The averaging's settings and its `shadow_params`, in the order of the model's parameters.
    """
    model = model_class.from_pretrained(path)
    config = json.loads((Path(path) / "config.json").read_text())
    shadow_params = [parameter.detach() for parameter in model.parameters()]
    return {**{name: config[name] for name in _STATE}, "shadow_params": shadow_params}
