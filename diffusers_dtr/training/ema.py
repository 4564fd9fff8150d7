"""Using and reading the average of a model's weights (diffusers' EMAModel)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel

from .config import EMAConfig


def build_ema(config: EMAConfig, model: ModelMixin, device: torch.device) -> EMAModel:
    """The average of a model's weights that the flags ask for."""
    ema = EMAModel(
        model.parameters(),
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        foreach=True,
        model_cls=type(model),
        model_config=model.config,
    )
    ema.to("cpu" if config.offload_ema else device)
    return ema


def step_average(ema: EMAModel, model: ModelMixin, offload: bool) -> None:
    """Update an average; an offloaded one is computed on the model's device and returns to the CPU."""
    if offload:
        ema.to(model.device)
    ema.step(model.parameters())
    if offload:
        # Not `non_blocking`: a checkpoint may read it next.
        ema.to("cpu")


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


def load_average(ema: EMAModel, model: ModelMixin, weights: dict[str, torch.Tensor], optimization_step: int) -> None:
    """Go on with an average from a checkpoint, with the decay that the average itself was made with."""
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    if any(shapes.get(name) != parameter.shape for name, parameter in model.named_parameters()):
        raise ValueError("The averaged weights of the checkpoint must be of this model, got those of another.")
    for shadow, name in zip(ema.shadow_params, names, strict=True):
        shadow.copy_(weights[name])
    ema.optimization_step = optimization_step
