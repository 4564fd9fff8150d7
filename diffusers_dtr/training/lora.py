"""LoRA (arXiv 2106.09685) on a denoiser: adapters alone are trained, saved and resumed."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.training_utils import cast_training_params
from safetensors.torch import load_file

from ..lora_files import adapter_state, save_routed_lora, save_unrouted_lora
from ..models.adapters import adapter_routing, route_adapter
from ..models.lora_header import mark_routed
from ..run_record import LORA_FILE
from .config import LoraConfig, RoutingConfig


_ADAPTER = "default"


def add_lora(model: ModelMixin, config: LoraConfig, routing: RoutingConfig, layers: tuple[str, ...]) -> None:
    """Freeze a denoiser and add adapters in float32, which begin at doing nothing, to `layers` or `--lora_layers`."""
    import peft  # an extra: `diffusers-dtr[training]`

    names = [name for name, _ in model.named_modules()]
    # peft says nothing if it finds some of them.
    given = config.lora_layers or ()
    missing = [layer for layer in given if not any(f".{name}".endswith(f".{layer}") for name in names)]
    if missing:
        raise ValueError(f"`--lora_layers` must be names of the denoiser's layers or their ends, got {missing}.")
    model.requires_grad_(False)
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.lora_alpha is None else config.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=list(config.lora_layers or layers),
    )
    try:
        model.add_adapter(adapter, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ValueError(f"`--lora_layers` must be layers that take adapters: {error}") from error
    cast_training_params(model, torch.float32)
    if config.route_lora:
        route_adapter(model, _ADAPTER, **routing.given)


def has_lora(model: ModelMixin) -> bool:
    """Whether adapters are what is trained of a model."""
    return bool(getattr(model, "peft_config", None))


def save_adapter(model: ModelMixin, folder: str | Path) -> None:
    """Save a model's adapters alone, for `model.load_lora_adapter(folder, weight_name=LORA_FILE, prefix=None)`."""
    save_unrouted_lora(model, folder, _ADAPTER)


def load_adapter(model: ModelMixin, folder: str | Path) -> None:
    """Give a model's adapters the weights that [`save_adapter`] wrote."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved, own = load_file(Path(folder) / LORA_FILE), get_peft_model_state_dict(model, adapter_name=_ADAPTER)
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (saved, own)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"`rank` and `lora_layers` must be what they were: {folder} has adapters of other shapes.")
    set_peft_model_state_dict(model, saved, adapter_name=_ADAPTER)


def save_lora(pipeline: DiffusionPipeline, model_name: str, folder: str | Path) -> None:
    """Save adapters as their pipeline loads them, or else their denoiser, and the scheduler."""
    model = getattr(pipeline, model_name)
    pipeline.scheduler.save_pretrained(Path(folder) / "scheduler")
    if not hasattr(pipeline, "save_lora_weights"):
        save_routed_lora(model, folder, _ADAPTER)
        return
    layers, config = adapter_state(model, _ADAPTER)
    pipeline.save_lora_weights(
        folder,
        weight_name=LORA_FILE,
        **{f"{model_name}_lora_layers": layers, f"{model_name}_lora_adapter_metadata": config},
    )
    routing = adapter_routing(model, _ADAPTER)
    if routing is not None:
        mark_routed(Path(folder, LORA_FILE), {model_name: routing})
