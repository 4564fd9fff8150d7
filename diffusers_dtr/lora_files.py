"""LoRA files of routed adapters: written, and loaded with the routing that they say."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import delete_adapter_layers, recurse_remove_peft_layers
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from torch import nn

from .models.adapters import adapter_routing, check_adapter_name, route_adapter, unroute_adapter
from .models.lora_header import WARNING_LAYER, file_routing, mark_routed, read_lora
from .models.route import check_is_model, route, unroute
from .models.routed_model import RoutedModelMixin
from .run_record import LORA_FILE


logger = logging.getLogger(__name__)


def adapter_state(model: ModelMixin, adapter_name: str = "default") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a model's adapter, and its config, without which its scale would be lost."""
    from peft import get_peft_model_state_dict  # an extra: `diffusers-dtr[training]`

    check_is_model(model)
    check_adapter_name(model, adapter_name)
    config = model.peft_config[adapter_name].to_dict()
    # The order of a set differs between runs.
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return get_peft_model_state_dict(model, adapter_name=adapter_name), config


def save_unrouted_lora(model: ModelMixin, folder: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Write what `model.save_lora_adapter` writes, without its warning of a cast that it does not make."""
    layers, config = adapter_state(model, adapter_name)
    path = Path(folder, LORA_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    save_file(layers, path, metadata)
    return path


def save_routed_lora(model: ModelMixin, folder: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Save a model's adapter with its routing, if it has one, as `model.save_lora_adapter` does; returns the file."""
    path, routing = save_unrouted_lora(model, folder, adapter_name), adapter_routing(model, adapter_name)
    if routing is not None:
        mark_routed(path, {"": routing})
    return path


def load_routed_lora(
    target: DiffusionPipeline | ModelMixin,
    source: str | os.PathLike,
    adapter_name: str = "default",
    weight_name: str = LORA_FILE,
    **kwargs: Any,
) -> None:
    """Load a LoRA file and route its adapters as it says; a file that says nothing is loaded as it is.

    Args:
        target: A pipeline, or a denoiser for a file of `save_lora_adapter`. One whose class in diffusers takes no
            adapters, as PixArt's, becomes one of its routed class, unrouted.
        source: A file, a folder, or a repository on the Hub.
        adapter_name: The name that the adapter gets.
        weight_name: Name of the file in the folder or repository.
        **kwargs: `revision`, `token`, `cache_dir`, ... of [`~huggingface_hub.hf_hub_download`].

    Raises:
        ValueError: If `target` has no such model or takes no adapters, or a routing that does not exist is named.
            After any error nothing is loaded.
    """
    if not isinstance(adapter_name, str):
        raise ValueError(f"`adapter_name` must be a name, got {adapter_name!r}.")
    source = Path(source) if os.path.exists(source) else Path(hf_hub_download(str(source), weight_name, **kwargs))
    path = source / weight_name if source.is_dir() else source
    routing = file_routing(path)
    if not routing:
        logger.warning(f"{path} does not say that its adapters are routed: they are loaded as plain ones.")
    is_pipeline = isinstance(target, DiffusionPipeline)
    if is_pipeline and not hasattr(target, "load_lora_weights"):
        raise ValueError(
            f"`target` must be the denoiser, such as `pipe.transformer`: a {type(target).__name__} takes no adapters."
        )
    models = {prefix: getattr(target, prefix, None) if is_pipeline else target for prefix in routing}
    for prefix, model in models.items():
        if not isinstance(model, ModelMixin) or is_pipeline != bool(prefix):
            place = f"the `{prefix}` of a pipeline" if prefix else "a denoiser"
            raise ValueError(f"`source` has routed adapters for {place}, but `target` is a `{type(target).__name__}`.")
    with _taken_off_on_failure(target, adapter_name), tempfile.TemporaryDirectory() as folder:
        # diffusers reads the scale of the adapters from the file alone, so that it has to be one.
        tensors, header = read_lora(path)
        tensors = {name: tensor for name, tensor in tensors.items() if WARNING_LAYER not in name}
        save_file(tensors, Path(folder, LORA_FILE), header)
        where = {"weight_name": LORA_FILE, "adapter_name": adapter_name}
        if is_pipeline:
            target.load_lora_weights(folder, **where)
        else:
            if not isinstance(target, PeftAdapterMixin):
                # As its routed class, the model takes adapters.
                route(target, routing_type="none")
            target.load_lora_adapter(folder, **where, prefix=None)
        for prefix, model in models.items():
            route_adapter(model, adapter_name, **routing[prefix])


@contextmanager
def _taken_off_on_failure(target: DiffusionPipeline | nn.Module, adapter_name: str) -> Iterator[None]:
    """Take an adapter off every model that did not have it, if it cannot be loaded and routed."""
    takes_adapters = isinstance(target, (DiffusionPipeline, PeftAdapterMixin))
    parts = target.components.values() if isinstance(target, DiffusionPipeline) else [target]
    before = {part: list(getattr(part, "peft_config", ())) for part in parts if isinstance(part, nn.Module)}
    try:
        yield
    except BaseException:
        for part, names in before.items():
            if adapter_name not in names and hasattr(part, "peft_config"):
                _take_off(part, adapter_name, is_last=not names)
        if not takes_adapters and isinstance(target, RoutedModelMixin):
            unroute(target)
        raise


def _take_off(part: nn.Module, adapter_name: str, is_last: bool) -> None:
    if adapter_name in vars(part).get("routed_adapters", {}):
        unroute_adapter(part, adapter_name)
    if not is_last:
        delete_adapter_layers(part, adapter_name)
        part.peft_config.pop(adapter_name, None)
    elif isinstance(part, PeftAdapterMixin):
        part.unload_lora()
    else:  # a text encoder
        recurse_remove_peft_layers(part)
        del part.peft_config
