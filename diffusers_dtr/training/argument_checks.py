"""Flags that do not fit each other are refused while they are parsed, before any work is done."""

from __future__ import annotations

import argparse
import math
from importlib.util import find_spec

from ..objective.gradient_balancing import GRADIENT_BALANCINGS
from .arguments import TRACKERS
from .optimizer import POLYNOMIAL_END, check_warm_ups


_EMA_FLAGS = ("ema_max_decay", "ema_inv_gamma", "ema_power", "offload_ema")
_HUB_FLAGS = ("hub_revision", "hub_create_pr", "hub_strategy")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop with a message about arguments that do not fit each other.

    Args:
        parser: Reports the error and exits.
        args: What was parsed.
    """
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("exactly one of --dataset_name and --train_data_dir must be given")
    if args.validation_split is not None and args.dataset_name is None:
        parser.error(
            "--validation_split is a split of --dataset_name; with --train_data_dir use --validation_data_dir"
        )
    if args.validation_split is not None and args.validation_data_dir is not None:
        parser.error("at most one of --validation_split and --validation_data_dir can be given")
    if args.cache_latents and args.vae_name_or_path is None and args.pretrained_model_name_or_path is None:
        parser.error("--cache_latents needs --vae_name_or_path, or a pretrained pipeline that has an autoencoder")
    if args.cache_latents and not args.center_crop:
        parser.error("--cache_latents needs --center_crop: a random crop would be encoded anew every time")
    if args.max_train_steps is not None:
        try:
            check_warm_ups(args)
        except ValueError as error:
            parser.error(str(error))
    if args.lr_scheduler == "constant" and args.lr_warmup_steps > 0:
        parser.error("--lr_warmup_steps has no effect on --lr_scheduler constant: use constant_with_warmup")
    for flag, schedule in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
        if getattr(args, flag) is not None and args.lr_scheduler != schedule:
            parser.error(f"--{flag} has an effect on --lr_scheduler {schedule} only")
    lowest = POLYNOMIAL_END / (args.train_batch_size if args.scale_lr else 1)
    if args.lr_scheduler == "polynomial" and args.learning_rate <= lowest:
        parser.error(f"--learning_rate must be above {lowest:g}, where --lr_scheduler polynomial ends")
    for flag in _EMA_FLAGS:
        if not args.use_ema and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} has an effect with --use_ema only")
    if args.tracker_project_name is not None and args.report_to == "none":
        parser.error("--tracker_project_name has no effect on --report_to none")
    if args.validation_epochs is not None and args.validation_steps is not None:
        parser.error("at most one of --validation_steps and --validation_epochs can be given")
    if args.input_perturbation and args.learn_sigma:
        parser.error(
            "--input_perturbation does not go with --learn_sigma: the bound of the variance is of the noise that was "
            "added"
        )
    if args.report_to in TRACKERS and find_spec(args.report_to) is None:
        parser.error(f"--report_to {args.report_to} needs the package {args.report_to}, which is not installed")
    if args.hub_create_pr and (args.hub_revision is not None or args.hub_strategy == "checkpoint"):
        parser.error("--hub_create_pr is for the result alone: neither --hub_revision nor --hub_strategy goes with it")
    hub_flags = [name for name in _HUB_FLAGS if getattr(args, name) not in (None, False, "end")]
    if hub_flags and not args.push_to_hub:
        parser.error(f"--{hub_flags[0]} has an effect with --push_to_hub only")
    if args.report_to == "wandb" and args.hub_token is not None:
        parser.error("--report_to wandb uploads the command line, and --hub_token with it: use `hf auth login`")
    if args.snr_gamma is not None and args.loss_weighting not in ("min_snr", "soft_min_snr"):
        parser.error(
            f"--snr_gamma has no effect on --loss_weighting {args.loss_weighting}: use min_snr or soft_min_snr"
        )
    if args.balancing_update_every is not None and args.balancing not in GRADIENT_BALANCINGS:
        parser.error(
            f"--balancing_update_every has no effect on --balancing {args.balancing}: it is for "
            f"{', '.join(GRADIENT_BALANCINGS)}"
        )
    if args.balancing in GRADIENT_BALANCINGS and find_spec("torchjd") is None:
        parser.error(f'--balancing {args.balancing} needs torchjd: pip install "diffusers-dtr[balancing]"')
    if (args.cluster_cost == "affinity") != (args.affinity_path is not None):
        parser.error("--cluster_cost affinity and --affinity_path need each other")
    if args.timestep_sampling != "logit_normal" and (args.logit_mean, args.logit_std) != (None, None):
        parser.error("--logit_mean and --logit_std have an effect on --timestep_sampling logit_normal only")
    if args.train_cluster is not None and args.train_cluster >= args.num_clusters:
        parser.error(f"--train_cluster must be below --num_clusters {args.num_clusters}, got {args.train_cluster}")
    if args.train_cluster is not None and (args.balancing != "uniform" or args.timestep_sampling is not None):
        parser.error("--train_cluster leaves nothing to balance: no --balancing or --timestep_sampling goes with it")
    timestep_range = args.routing_timestep_range
    if timestep_range is not None and not timestep_range[0] < timestep_range[1]:
        parser.error(
            f"--routing_timestep_range must be T_MIN < T_MAX, got {timestep_range[0]} and {timestep_range[1]}"
        )


def set_max_train_steps(args: argparse.Namespace, num_images: int, images_per_step: int) -> None:
    """Count the steps of the epochs where the flags do not say how many steps a run has.

    Args:
        args: Parsed flags. `max_train_steps` is a number afterwards.
        num_images: Images of an epoch.
        images_per_step: Images of all processes and forward calls of an optimizer step.

    Raises:
        ValueError: If a warm-up would not end before the run.
    """
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * num_images / images_per_step)
    check_warm_ups(args)
