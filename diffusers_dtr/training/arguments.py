"""The command-line flags that all training scripts share, under the names that diffusers' example scripts use."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config_types import parse_object, read_object
from ..objective.balancing import BALANCINGS
from ..objective.clustering import COSTS
from ..objective.gradient_balancing import GRADIENT_BALANCINGS
from ..objective.weighting import WEIGHTINGS
from ..ranges import COUNT, FINITE, NON_NEGATIVE, POSITIVE, SEED, SHARE, WHOLE, Range
from ..routing import ALPHA_RANGE, BETA_RANGE, ROUTING_TYPES, SEED_RANGE
from .images import INTERPOLATION_MODES


# Those of diffusers' `get_scheduler` that the flags say enough for.
_LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
TIMESTEP_SAMPLINGS = ("uniform", "clusters", "loss", "variance", "logit_normal")
TRACKERS = ("tensorboard", "wandb", "trackio")


def json_config(text: str) -> dict:
    """Parse a JSON object, or the path of a file that holds one, for argparse."""
    try:
        config = parse_object(text, "text") if text.lstrip().startswith("{") else read_object(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object or a file that holds one: {error}") from error
    return {key: value for key, value in config.items() if not key.startswith("_")}


def add_pretrained_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say which files of `--pretrained_model_name_or_path` to load.

    Args:
        group: The script's group of its model.
    """
    group.add_argument("--revision", help="Revision of the pretrained pipeline's repository.")
    group.add_argument("--variant", help="Variant of the pretrained pipeline's weights, such as fp16.")


def add_data_arguments(parser: argparse.ArgumentParser, labels: bool = True) -> None:
    """Add the flags of the images and their preparation.

    Args:
        parser: The script's parser.
        labels: Whether images have class labels.
    """
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset_name", help="Dataset on the Hub, or a local folder that 🤗 datasets can load.")
    add("--dataset_config_name", help="Configuration of the dataset, if it has several.")
    add(
        "--train_data_dir",
        help="Folder of images: a folder per class if there are classes, a metadata.jsonl if there are captions.",
    )
    add("--train_split", default="train", help="Split of --dataset_name to train on.")
    add("--validation_split", help="Split of --dataset_name for the held-out loss.")
    add("--validation_data_dir", help="Folder of images for the held-out loss, laid out as --train_data_dir.")
    add("--cache_dir", help="Where downloaded datasets and models are kept.")
    add("--image_column", default="image", help="Column with the images.")
    if labels:
        add("--label_column", default="label", help="Column with the class labels.")
    add(
        "--resolution",
        type=COUNT,
        help="Side of the training images in pixels. Default that of the model (its `sample_size`), or 32.",
    )
    add(
        "--image_interpolation_mode",
        choices=INTERPOLATION_MODES,
        default="bilinear",
        help="How images are resized. Default %(default)s.",
    )
    add("--max_train_samples", type=COUNT, help="Train on so many images, drawn with the seed. Default all.")
    add("--center_crop", action="store_true", help="Crop the middle rather than a random part.")
    add("--random_flip", action="store_true", help="Mirror half of the images.")
    add(
        "--unreadable_images",
        choices=("error", "skip"),
        default="error",
        help="What to do about an image that cannot be decoded: stop, or take the next one and report it.",
    )
    add("--dataloader_num_workers", type=WHOLE, default=0, help="Processes that load images.")
    add("--vae_name_or_path", help="Autoencoder in whose latent space the model works. Pixels without it.")
    add("--cache_latents", action="store_true", help="Encode all images once, before training.")


def add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the training loop, its optimizer and the average of its weights."""
    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--seed", type=SEED, default=0, help="Seed of everything random in the run.")
    add("--train_batch_size", type=COUNT, default=16, help="Images per process and forward call.")
    add("--num_train_epochs", type=COUNT, default=100, help="Used if --max_train_steps is not given.")
    add("--max_train_steps", type=COUNT, help="Number of optimizer steps.")
    add(
        "--gradient_accumulation_steps",
        type=COUNT,
        help="Forward calls per optimizer step. Default what accelerate is configured with, or else 1.",
    )
    add("--gradient_checkpointing", action="store_true", help="Save memory by computing activations twice.")
    add("--learning_rate", type=NON_NEGATIVE, default=1e-4, help="Peak learning rate.")
    add(
        "--scale_lr",
        action="store_true",
        help="Multiply the learning rate by the images of a step: processes, accumulation and batch size.",
    )
    add("--lr_scheduler", choices=_LR_SCHEDULERS, default="constant", help="Course of the learning rate.")
    add("--lr_warmup_steps", type=WHOLE, default=0, help="Steps over which the learning rate rises.")
    add("--lr_num_cycles", type=COUNT, help="Cycles of cosine_with_restarts. Default 1.")
    add("--lr_power", type=POSITIVE, help="Power of polynomial. Default 1.")
    add("--adam_beta1", type=Range("[0, 1)"), default=0.9)
    add("--adam_beta2", type=Range("[0, 1)"), default=0.999)
    add("--adam_weight_decay", type=NON_NEGATIVE, default=0.0)
    add("--adam_epsilon", type=POSITIVE, default=1e-8)
    add(
        "--max_grad_norm",
        type=NON_NEGATIVE,
        default=1.0,
        help="Gradients are scaled down to this norm. 0: not at all.",
    )
    add("--use_ema", action="store_true", help="Average the weights, and save and sample the average.")
    add("--ema_max_decay", type=SHARE, default=0.9999, help="Largest decay of the average.")
    add("--ema_inv_gamma", type=POSITIVE, default=1.0, help="Inverse gamma of the decay's warm-up.")
    add("--ema_power", type=POSITIVE, default=0.75, help="Power of the decay's warm-up.")
    add("--offload_ema", action="store_true", help="Keep the average in the CPU's memory between steps.")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="Defaults to accelerate's configuration.")
    add("--allow_tf32", action="store_true", help="Let Ampere and newer GPUs multiply matrices in TF32.")
    add("--compile", action="store_true", help="Compile the model with torch.compile.")


def add_noise_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the noise schedule, which is a pretrained pipeline's unless given."""
    group = parser.add_argument_group("noise schedule")
    add = group.add_argument
    add(
        "--noise_schedule",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
        help="`beta_schedule` of the DDPMScheduler. Default linear.",
    )
    add(
        "--num_train_timesteps",
        type=COUNT,
        help="Number of timesteps T. Default 1000. The betas of other schedules than squaredcos_cap_v2 are scaled by "
        "the old number over the new one, so that the noisiest timestep stays as noisy.",
    )
    add("--prediction_type", choices=("epsilon", "sample", "v_prediction"), help="Default epsilon.")
    add("--learn_sigma", action="store_true", help="Learn the variance too, by the variational bound.")


def add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of weighting by noise level, clusters of timesteps and their balancing."""
    group = parser.add_argument_group("loss, clusters and balancing")
    add = group.add_argument
    add(
        "--loss_weighting",
        choices=WEIGHTINGS,
        default="constant",
        help="How squared errors are weighted by noise level; logit_normal is for flow matching alone.",
    )
    add(
        "--noise_offset",
        type=NON_NEGATIVE,
        default=0.0,
        help="Scale of what is added to the noise of a whole channel, for darker and brighter images.",
    )
    add(
        "--input_perturbation",
        type=NON_NEGATIVE,
        default=0.0,
        help="Scale of noise that the denoiser's input has and its target has not; 0.1 is recommended.",
    )
    add("--snr_gamma", type=POSITIVE, help="γ of min_snr and soft_min_snr. Default 5.")
    add("--num_clusters", type=COUNT, default=8, help="Number of clusters of timesteps.")
    add(
        "--cluster_cost",
        choices=(*COSTS, "affinity"),
        default="snr",
        help="What clusters minimise; the task affinity of --affinity_path they maximise.",
    )
    add("--affinity_path", help="File of compute_task_affinity.py, for --cluster_cost affinity.")
    add(
        "--balancing",
        choices=(*BALANCINGS, *GRADIENT_BALANCINGS),
        default="uniform",
        help="How clusters are weighed against each other.",
    )
    add(
        "--balancing_update_every",
        type=COUNT,
        help="Optimizer steps for which gradient balancing uses the same weights. Default 1.",
    )
    add(
        "--timestep_sampling",
        choices=TIMESTEP_SAMPLINGS,
        help="How timesteps are drawn: uniformly (the default without balancing), equally many in every cluster (the "
        "default with it), following the clusters' loss or its variance, with the loss corrected for it, or by the "
        "logit-normal distribution of Stable Diffusion 3, for flow matching.",
    )
    add(
        "--logit_mean",
        type=FINITE,
        help="Location of logit_normal; above 0 favours noisy timesteps, as in the paper of Stable Diffusion 3. "
        "Default 0.",
    )
    add("--logit_std", type=POSITIVE, help="Scale of logit_normal, > 0. Default 1.")
    add(
        "--train_cluster",
        type=WHOLE,
        help="Train on the timesteps of this one cluster alone, to measure what training on all costs it.",
    )


def add_routing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of Denoising Task Routing; what is not given is the pretrained model's, or the default."""
    group = parser.add_argument_group("denoising task routing")
    add = group.add_argument
    add("--routing_alpha", type=ALPHA_RANGE, help="How late the channel window slides, > 0. Default 4.")
    add("--routing_beta", type=BETA_RANGE, help="Share of active channels, in (0, 1]; 1 is unrouted. Default 0.8.")
    add("--routing_type", choices=ROUTING_TYPES, help="Default dtr.")
    add("--routing_seed", type=SEED_RANGE, help="Seed of random routing.")
    add(
        "--routing_timestep_range",
        type=FINITE,
        nargs=2,
        metavar=("T_MIN", "T_MAX"),
        help="Timesteps at which the channel window stands at the first and last channels. Default all of the noise "
        "schedule.",
    )
    add(
        "--routing_warmup_steps",
        type=WHOLE,
        default=0,
        help="Steps over which the share falls from 1, the unrouted model, to its target.",
    )


def add_run_arguments(parser: argparse.ArgumentParser, guidance: bool = True) -> None:
    """Add the flags of outputs: checkpoints, validation, tracking and the Hub.

    Args:
        parser: The script's parser.
        guidance: Whether samples can be guided.
    """
    group = parser.add_argument_group("outputs")
    add = group.add_argument
    add("--output_dir", required=True, help="Folder of checkpoints, samples and the final pipeline.")
    add("--checkpointing_steps", type=COUNT, default=500, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=COUNT, help="How many checkpoints to keep.")
    add("--resume_from_checkpoint", help="A checkpoint's folder, or `latest`.")
    add(
        "--allow_changed_settings",
        action="store_true",
        help="Resume although flags that define the objective or the data differ from the checkpoint's.",
    )
    add("--validation_steps", type=COUNT, help="Steps between sample grids. None without it.")
    add("--validation_epochs", type=COUNT, help="The same in epochs.")
    add("--num_validation_images", type=COUNT, default=16, help="Images of a grid.")
    add("--max_held_out_images", type=COUNT, default=1024, help="How many images the held-out loss is of.")
    if guidance:
        add(
            "--validation_guidance_scale",
            type=NON_NEGATIVE,
            default=1.0,
            help="Guidance of a grid's images; 1: none.",
        )
    add("--validation_num_inference_steps", type=COUNT, default=50)
    add("--logging_steps", type=COUNT, default=10, help="Steps between readings of the loss.")
    add("--logging_dir", default="logs", help="Folder of the tracker's files inside the output folder.")
    add("--report_to", choices=(*TRACKERS, "none"), default="tensorboard", help="Where losses and samples go.")
    add("--tracker_project_name", help="The tracker's project. Default the name of the script.")
    add("--push_to_hub", action="store_true", help="Upload the result with its card, samples and logs.")
    add("--hub_model_id", help="Repository to push to. Defaults to the name of the output folder.")
    add("--hub_token", help="Token to push with. Defaults to the one of `hf auth login`.")
    add(
        "--hub_private_repo",
        action="store_true",
        default=None,
        help="Make the repository private. Without it, as its owner has new ones.",
    )
    add("--hub_revision", help="Branch to push to, made if there is none of that name. Default main.")
    add("--hub_create_pr", action="store_true", help="Push the result as a pull request.")
    add(
        "--hub_strategy",
        choices=("end", "checkpoint"),
        default="end",
        help="When to push: at the end, or the latest checkpoint too while training goes on, in the background.",
    )


def routing_flags(args: argparse.Namespace) -> dict:
    """The model config values that the routing flags set.

    Args:
        args: What was parsed.

    Returns:
        Those of `routing_alpha`, `routing_beta`, `routing_type`, `routing_seed` and `routing_timestep_range` that were
        given.
    """
    names = ("routing_alpha", "routing_beta", "routing_type", "routing_seed", "routing_timestep_range")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
