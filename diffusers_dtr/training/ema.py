"""The average of a model's weights (diffusers' EMAModel)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel

from .config import EMAConfig


def build_ema(config: EMAConfig, model: ModelMixin, device: torch.device) -> EMAModel:
    """The average that the flags ask for; an offloaded one stays on the CPU between steps."""
    ema = EMAModel(
        model.parameters(),
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        foreach=True,
    )
    ema.to("cpu" if config.offload_ema else device)
    return ema


def step_average(ema: EMAModel, model: ModelMixin) -> None:
    """Update an average on the model's device, wherever it is kept."""
    kept_on = ema.shadow_params[0].device
    ema.to(model.device)
    ema.step(model.parameters())
    ema.to(kept_on)  # not `non_blocking`: a checkpoint may read it next


@contextmanager
def averaged_weights(ema: EMAModel | None, model: ModelMixin) -> Iterator[None]:
    """Give a model its averaged weights for a while; without an average it keeps its own."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())
