"""What a run was: its settings, versions, hardware and results, for the record that is saved with the pipeline."""

from __future__ import annotations

import argparse
import platform
import shlex
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator


_PACKAGES = ("diffusers-dtr", "torch", "diffusers", "transformers", "accelerate", "datasets")
_SECRETS = ("hub_token",)


def public_arguments(args: argparse.Namespace) -> dict:
    """The arguments of a run without those that must not be written anywhere."""
    return {name: value for name, value in vars(args).items() if name not in _SECRETS}


def tracker_config(args: argparse.Namespace) -> dict:
    """The arguments of a run as trackers take them: numbers and strings only."""
    arguments = public_arguments(args)
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in arguments.items()}


def run_record(args: argparse.Namespace, argv: list[str], accelerator: Accelerator, seconds: float, **results) -> dict:
    """Describe a finished run.

    Args:
        args: Its parsed arguments.
        argv: Its command line.
        accelerator: What it ran on.
        seconds: How long it took, the part before a resumption not counted.
        **results: JSON-serialisable results to add.

    Returns:
        A JSON-serialisable record.
    """
    hardware = platform.processor() or platform.machine()
    if accelerator.device.type == "cuda":
        hardware = torch.cuda.get_device_name(accelerator.device)
    return {
        "command": shlex.join(["accelerate", "launch", Path(argv[0]).name, *_without_secrets(argv[1:])]),
        "arguments": public_arguments(args),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "hardware": hardware,
        "num_processes": accelerator.num_processes,
        "seconds": round(seconds, 1),
        **results,
    }


def _without_secrets(arguments: list[str]) -> list[str]:
    kept = []
    flags = tuple(f"--{name}" for name in _SECRETS)
    skip = False
    for argument in arguments:
        if skip or argument.startswith(tuple(f"{flag}=" for flag in flags)):
            skip = False
        elif argument in flags:
            skip = True
        else:
            kept.append(argument)
    return kept
