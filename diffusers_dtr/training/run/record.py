"""What a run was: its settings, versions, hardware and results, for the record that is saved with the pipeline.

Whatever is written here may be published: it has no token, and no path of the machine that it was made on.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

from ...models.routed_model import RoutedModelMixin
from ...run_record import public_command, publishable
from ..config import TrainingConfig


_PACKAGES = ("diffusers-dtr", "torch", "diffusers", "transformers", "accelerate", "datasets")


def tracker_config(config: TrainingConfig) -> dict[str, int | float | str]:
    """The arguments of a run as trackers take them: numbers and strings only, as [`publishable`] leaves them."""
    arguments = publishable(config.options)
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in arguments.items()}


def describe_model(model: RoutedModelMixin) -> dict[str, Any]:
    """What a record says of the denoiser; all that is known of it where adapters alone are saved."""
    names = ("num_attention_heads", "attention_head_dim", "block_out_channels", "num_layers", "sample_size")
    adapters = [routing.config for routing in vars(model).get("routed_adapters", {}).values()]
    return {
        "class": type(model).__name__,
        "num_parameters": model.num_parameters(),
        "num_trained_parameters": model.num_parameters(only_trainable=True),
        "routed_widths": list(model.routed_widths),
        "config": {key: value for key, value in model.config.items() if key.startswith("routing_") or key in names},
        **({"adapter_routing": adapters[0]} if adapters else {}),
    }


def run_record(
    config: TrainingConfig, argv: Sequence[str], accelerator: Accelerator, seconds: float, **results
) -> dict[str, Any]:
    """Describe a finished run."""
    launcher = ["accelerate", "launch"]
    if accelerator.num_processes > 1:
        launcher += ["--num_processes", str(accelerator.num_processes)]
    # Of accelerate's configuration, which whoever types the command again may not have
    if accelerator.mixed_precision != "no" and not _is_typed("--mixed_precision", argv):
        launcher += ["--mixed_precision", accelerator.mixed_precision]
    if accelerator.gradient_accumulation_steps > 1 and not _is_typed("--gradient_accumulation_steps", argv):
        argv = [*argv, "--gradient_accumulation_steps", str(accelerator.gradient_accumulation_steps)]
    # A notebook or an interactive session has no command.
    is_script = argv[0].endswith(".py") and os.path.basename(argv[0]) != "ipykernel_launcher.py"
    return {
        "command": public_command(argv, launcher) if is_script else "",
        "arguments": publishable(config.options),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "hardware": _hardware(accelerator.device),
        "num_processes": accelerator.num_processes,
        "engine": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "seconds": round(seconds, 1),
        **publishable(results),
    }


def _is_typed(flag: str, argv: Sequence[str]) -> bool:
    return any(argument.partition("=")[0].replace("-", "_") == flag.replace("-", "_") for argument in argv)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    return f"{processor} CPU, {os.cpu_count()} cores" if device.type == "cpu" else f"{processor}, {device.type}"
