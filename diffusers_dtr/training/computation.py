"""How a denoiser computes: by which processes and kernel of attention, in which layout, of which quantised weights."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from diffusers import BitsAndBytesConfig, ModelMixin, TorchAoConfig, attention_backend
from diffusers.models.attention_dispatch import dispatch_attention_fn

from .config import RunConfig


def check_processes() -> None:
    """Refuse processes that were launched together, but each of which accelerate takes for the only one."""
    launched, known = int(os.environ.get("WORLD_SIZE", 1)), PartialState().num_processes
    if "LOCAL_RANK" in os.environ and launched != known:
        raise ValueError(
            f"{launched} processes were launched, but accelerate knows of {known}. Without a GPU set "
            "ACCELERATE_USE_CPU=true."
        )


def check_attention_backend(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a kernel that is not installed, does not run here, or has no gradient: before a model is loaded."""
    query = torch.zeros(1, 16, 1, 64, device=device, dtype=dtype, requires_grad=True)
    try:
        with attention_backend(name):
            dispatch_attention_fn(query, query, query).sum().backward()
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"`--attention_backend` must be one that trains in {dtype} on {device.type}, got {name}: {error}"
        ) from error


def set_up_computation(model: ModelMixin, run: RunConfig) -> None:
    """Give a model the layout and the kernel that the flags ask for; a `ValueError` if it has no use for them."""
    if run.channels_last:
        if max(parameter.ndim for parameter in model.parameters()) != 4:
            raise ValueError(f"`--channels_last` is for 2-D convolutions, which a {type(model).__name__} has not.")
        model.to(memory_format=torch.channels_last)
    if run.attention_backend is not None:
        # Outside of this block, what diffusers calls active is for all other models as before.
        with attention_backend(run.attention_backend):
            model.set_attention_backend(run.attention_backend)
        processors = [getattr(module, "processor", None) for module in model.modules()]
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            kind = type(model).__name__
            raise ValueError(f"`--attention_backend` must be left out: a {kind} computes attention by torch alone.")


def quantization(name: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of `from_pretrained` for quantised weights that compute in `dtype`."""
    if name is None:
        return {}
    if name == "bnb_4bit":
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}  # as QLoRA, arXiv 2305.14314
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four)}
    if name == "bnb_8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    from torchao.quantization import Int8WeightOnlyConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
