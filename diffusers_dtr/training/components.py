"""The parts of a pipeline that a run is given: its autoencoder and its noise schedule."""

from __future__ import annotations

import argparse
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from .arguments import noise_config


_FLOW_SCHEDULER = FlowMatchEulerDiscreteScheduler.__name__


def pretrained_options(args: argparse.Namespace) -> dict[str, Any]:
    """Where and which files of `--pretrained_model_name_or_path` to load, as `from_pretrained` takes it.

    Args:
        args: Parsed flags of [`~diffusers_dtr.training.arguments.add_pretrained_arguments`].
    """
    return {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}


def load_vae(args: argparse.Namespace) -> AutoencoderKL | None:
    """The autoencoder of `--vae_name_or_path`, or else of the pretrained pipeline, frozen; None if there is neither.

    Args:
        args: Parsed flags.
    """
    if args.vae_name_or_path is not None:
        vae = AutoencoderKL.from_pretrained(args.vae_name_or_path, cache_dir=args.cache_dir)
    elif _pretrained_component(args, "vae") is not None:
        options = pretrained_options(args)
        vae = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae", **options)
    else:
        return None
    return vae.requires_grad_(False).eval()


def load_noise_scheduler(args: argparse.Namespace) -> SchedulerMixin:
    """The scheduler to train with: a DDPMScheduler, or flow matching's where the pretrained pipeline has that.

    Args:
        args: Parsed flags. Those of the noise schedule replace what the pretrained pipeline has.

    Raises:
        ValueError: If a flag of a DDPMScheduler is given to a flow matching pipeline.
    """
    config = noise_config(args)
    if args.pretrained_model_name_or_path is None:
        return DDPMScheduler(**config)
    flow = _pretrained_component(args, "scheduler") == _FLOW_SCHEDULER
    if flow and config:
        raise ValueError(f"`{'`, `'.join(config)}` must be left out: the pretrained pipeline has flow matching.")
    scheduler_class = FlowMatchEulerDiscreteScheduler if flow else DDPMScheduler
    # Schedulers have no variants.
    options = pretrained_options(args) | {"variant": None}
    return scheduler_class.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler", **options, **config
    )


def _pretrained_component(args: argparse.Namespace, name: str) -> str | None:
    """Class of a component of the pretrained pipeline."""
    if args.pretrained_model_name_or_path is None:
        return None
    options = {"revision": args.revision, "cache_dir": args.cache_dir}
    index = DiffusionPipeline.load_config(args.pretrained_model_name_or_path, **options)
    return index.get(name, [None, None])[1]
