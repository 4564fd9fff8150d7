"""Using and reading the average of a model's weights (diffusers' EMAModel)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel


_STATE = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")


def build_ema(args: argparse.Namespace, model: ModelMixin, device: torch.device) -> EMAModel:
    """The average of a model's weights that the flags ask for.

    Args:
        args: Parsed flags of [`~diffusers_dtr.training.arguments.add_optimization_arguments`].
        model: All of whose weights are averaged.
        device: Where the average lies.
    """
    ema = EMAModel(
        model.parameters(),
        decay=args.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        foreach=True,
        model_cls=type(model),
        model_config=model.config,
    )
    ema.to(device)
    return ema


@contextmanager
def averaged_weights(ema: EMAModel | None, model: ModelMixin) -> Iterator[None]:
    """Give a model its averaged weights for a while; without an average it keeps its own.

    Args:
        ema: The average, or None.
        model: The model whose weights it averages.
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
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    shadow_params = [parameter.detach() for parameter in model.parameters()]
    return {**{name: config[name] for name in _STATE}, "shadow_params": shadow_params}
