"""The header of LoRA files that says how their adapters are routed.

For those who load the file without routing, one more tensor is in it, of an adapter of a layer that no model has:
diffusers warns of that by the layer's name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..atomic_files import replacing
from ..config_types import check_types, parse_object
from ..routing import ChannelRouting
from .family import ROUTING_PARAMETERS


_HEADER_KEY = "diffusers_dtr_routing"
WARNING_LAYER = "this_lora_is_routed_load_it_with_diffusers_dtr.load_routed_lora"


def mark_routed(path: str | os.PathLike, routing: Mapping[str, Mapping[str, Any]]) -> None:
    """Write into a LoRA file how its adapters are routed, as a model's `save_lora_adapter` does itself.

    A pipeline's `save_lora_weights` is given tensors, which do not know how they were routed: mark its file.

    Args:
        path: A safetensors file that diffusers saved.
        routing: The [`adapter_routing`] of each adapted model, by the prefix that its weights have in the file,
            "transformer" or "unet", or "" for a file of `save_lora_adapter`.
    """
    tensors, header = read_lora(path)
    for prefix in routing:
        layer = ".".join(filter(None, (prefix, WARNING_LAYER)))
        tensors[f"{layer}.lora_A.weight"] = torch.zeros(1, 1)
    with replacing(path) as partial:
        save_file(tensors, partial, {**header, _HEADER_KEY: json.dumps(routing)})


def file_routing(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """How the adapters of a LoRA file are routed, as [`mark_routed`] was told, or an empty mapping.

    Raises:
        ValueError: If the file's header says something else, or it is not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return header_routing(file.metadata() or {}, path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be safetensors ({error}). Save it with `safe_serialization`.") from error


def header_routing(header: Mapping[str, str], path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """As [`file_routing`], of the metadata in a file's header."""
    routing = parse_object(header.get(_HEADER_KEY, "{}"), _HEADER_KEY)
    check_types(dict.fromkeys(routing, dict), routing, f"`{_HEADER_KEY}`")
    for values in routing.values():
        unknown = values.keys() - ROUTING_PARAMETERS.keys()
        if unknown:
            raise ValueError(f"`{_HEADER_KEY}` of {path} has {min(unknown)!r}, which no routing has.")
        ChannelRouting(*(values.get(name, parameter.default) for name, parameter in ROUTING_PARAMETERS.items()))
    return routing


def read_lora(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata() or {})
    return load_file(path), header
