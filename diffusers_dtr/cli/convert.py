"""`diffusers-dtr convert`: between checkpoints of the original DiT, DTR and ANT code and pipelines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDPMScheduler

from ..config_types import built_from_file, read_object
from ..conversion import convert_original_dit, original_dit_state_dict
from ..conversion.checkpoint_file import CHECKPOINT_WEIGHTS, read_original_checkpoint
from ..conversion.masks import MASK_BUFFER
from ..conversion.run_settings import OriginalRun, original_run
from ..models.dit import DTRTransformer2DModel
from ..models.dit_block import PER_BLOCK_CLASS_NAMES
from ..pipelines.pipeline_dtr import DTRPipeline
from ..ranges import COUNT, Range
from ..routing import ALPHA_RANGE, BETA_RANGE
from ..run_record import PIPELINE_INDEX, publishable
from .options import new_output
from .sources import Source


DESCRIPTION = """\
SOURCE is a file of the authors' code (.pt or .safetensors), which becomes a pipeline, or a pipeline with a
DiT, in a folder or on the Hub, which becomes a routed one or, with --to_original, a state dict of the
authors' code. Nothing in a file is executed: one that asks for it is refused. Nothing is overwritten."""
EXAMPLES = """\
  diffusers-dtr convert 0400000.pt dit-l-dtr
  diffusers-dtr convert DiT-XL-2-256x256.pt dit-xl --vae_name_or_path path/to/vae --labels names.json
  diffusers-dtr convert facebook/DiT-XL-2-256 dit-xl-routed --routing_beta 0.8
  diffusers-dtr convert dit-l-dtr back.pt --to_original"""

_VAE = "stabilityai/sd-vae-ft-ema"
# Of all autoencoders that the authors use.
_VAE_FACTOR = 8
_IMAGENET_PIPELINE = "facebook/DiT-XL-2-256"
_IMAGENET_CLASSES = 1000

_FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
_HALF_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}

_ROUTING = ("routing_alpha", "routing_beta")
_HUB = ("revision", "token")
_FILE_FLAGS = (
    *("weights", "num_attention_heads", "class_dropout_prob", "noise_schedule", "num_train_timesteps"),
    *("vae_name_or_path", "no_vae", "labels", "no_labels", *_ROUTING, "token"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="Checkpoint file, or a pipeline's folder or repository.")
    add("output", metavar="OUTPUT", help="Folder of the new pipeline, or the .pt file to write.")
    add("--to_original", action="store_true", help="Write a state dict under the names of the authors' code.")

    group = parser.add_argument_group("what a checkpoint file may not say")
    add = group.add_argument
    weights = "Which weights of a training checkpoint: averaged, or as trained. Default: ema."
    add("--weights", choices=CHECKPOINT_WEIGHTS, help=weights)
    heads = "Attention heads. Default: those of the published model of the same depth and width."
    add("--num_attention_heads", type=COUNT, help=heads)
    add(
        "--class_dropout_prob",
        type=Range("[0, 1)"),
        help="Probability of dropping labels in training; at 0 all rows of the label table are classes. "
        "Default: 0.1, or 0 for a table of one row.",
    )
    add(
        "--noise_schedule",
        choices=("linear", "squaredcos_cap_v2"),
        help="Noise schedule that the model was trained on. Default: that which the file says or its code always has; "
        "linear for a state dict alone, without masks, as DiT's are published. It must be given for other files.",
    )
    timesteps = "Timesteps that it was trained on. Default: as many as the masks have, or the file says, or 1000."
    add("--num_train_timesteps", type=COUNT, help=timesteps)
    add = group.add_mutually_exclusive_group().add_argument
    vae = "Autoencoder in whose latent space the model works; it is copied into the pipeline."
    add("--vae_name_or_path", help=f"{vae} Default: that which the file says, or {_VAE}.")
    add("--no_vae", action="store_true", help="The model works on pixels.")
    add = group.add_mutually_exclusive_group().add_argument
    add(
        "--labels",
        help='Names of the classes: a JSON file {"0": "name", ...}, or a pipeline that has them (folder or '
        f"repository). Default: those of {_IMAGENET_PIPELINE} for {_IMAGENET_CLASSES} classes, else none.",
    )
    add("--no_labels", action="store_true", help="Leave the classes without names.")

    kept = "Read from the masks of DTR's checkpoints, and kept of routed pipelines; other models are unrouted."
    add = parser.add_argument_group("routing", kept).add_argument
    add("--routing_alpha", type=ALPHA_RANGE, help="How late the channel window slides.")
    add("--routing_beta", type=BETA_RANGE, help="Share of active channels; 1 is unrouted.")


def run(args: argparse.Namespace) -> None:
    """Convert."""
    is_file = Path(args.source).is_file()
    if Path(args.source).suffix in _FILE_SUFFIXES and not is_file:
        raise ValueError(f"There is no file {args.source!r}.")
    if args.to_original and is_file:
        raise ValueError("`--to_original` takes a pipeline, in a folder or on the Hub, got a file.")
    _check_flags(args, is_file)
    with new_output(args.output, suffix=".pt" if args.to_original else "") as path:
        if is_file:
            _save(_from_file(args), path)
        elif args.to_original:
            _save_original(original_dit_state_dict(_load_transformer(args)), path)
        else:
            parts = {"transformer": _load_transformer(args), "revision": args.revision, "token": args.token}
            _save(DTRPipeline.from_pretrained(args.source, **parts), path)
    print(args.output)


def _save_original(state_dict: dict[str, torch.Tensor], path: Path) -> None:
    try:
        torch.save(state_dict, path)
    except RuntimeError as error:  # so torch says that a disk is full
        raise OSError(f"{path.name} cannot be written whole: is the disk full? {error}") from error


def _check_flags(args: argparse.Namespace, is_file: bool) -> None:
    """Refuse flags that have no effect for this kind of source."""
    routing = () if args.to_original else _ROUTING
    used, source = (_FILE_FLAGS, "a file") if is_file else ((*routing, *_HUB), "a pipeline")
    source = "--to_original" if args.to_original else source
    given = [name for name in (*_FILE_FLAGS, "revision") if getattr(args, name) not in (None, False)]
    useless = [f"`--{name}`" for name in given if name not in used]
    if useless:
        raise ValueError(f"{', '.join(useless)} would have no effect for {source}, and must be left out.")


def _save(pipeline: DTRPipeline, path: Path) -> None:
    """Save a pipeline without this machine's paths, which diffusers keeps in its configs."""
    for part in (pipeline, *pipeline.components.values()):
        if isinstance(part, ConfigMixin) and part.config.get("_name_or_path") is not None:
            part.register_to_config(_name_or_path=publishable(part.config["_name_or_path"], "_name_or_path"))
    pipeline.save_pretrained(path)


# ---- from a checkpoint of the authors' code


def _from_file(args: argparse.Namespace) -> DTRPipeline:
    checkpoint = read_original_checkpoint(args.source, args.weights)
    run = original_run(checkpoint.settings or {})
    config = {name: getattr(args, name) for name in _ROUTING if getattr(args, name) is not None}
    is_masked = any(name.endswith(f".{MASK_BUFFER}") for name in checkpoint.state_dict)
    schedule = _noise_schedule(args, checkpoint.settings is None and not is_masked, run)
    timesteps = args.num_train_timesteps or (None if is_masked else run.num_train_timesteps)
    if timesteps is not None:
        config["routing_timestep_range"] = (0, timesteps - 1)
    if "pos_embed" not in checkpoint.state_dict and run.image_size is not None:
        config["sample_size"] = run.image_size // (1 if args.no_vae else _VAE_FACTOR)
    with built_from_file("A DTRTransformer2DModel"):
        transformer = convert_original_dit(
            checkpoint.state_dict, args.num_attention_heads, class_dropout_prob=args.class_dropout_prob, **config
        )
    return DTRPipeline(
        scheduler=_scheduler(transformer, schedule, latents=not args.no_vae),
        transformer=transformer,
        id2label=_labels(args, transformer.config.num_embeds_ada_norm),
        vae=None if args.no_vae else _vae(args, run.vae or _VAE, transformer.config.in_channels),
    )


def _noise_schedule(args: argparse.Namespace, is_published: bool, run: OriginalRun) -> str:
    """The given or known schedule; one that is not given is printed."""
    schedule, reason = run.noise_schedule, run.reason
    if schedule is None and is_published:
        schedule, reason = "linear", "the default of DiT's code, whose published files are such state dicts"
    if args.noise_schedule is not None:
        if run.noise_schedule not in (None, args.noise_schedule):
            print(f"Noise schedule: {args.noise_schedule}, but the file says {run.noise_schedule}.", file=sys.stderr)
        return args.noise_schedule
    if schedule is None:
        raise ValueError(
            "`--noise_schedule` must be given, because the file does not say with which it was trained: "
            "squaredcos_cap_v2 for ANT's scripts and DTR's default, linear for DTR's example and for DiT."
        )
    print(f"Noise schedule: {schedule} ({reason}).", file=sys.stderr)
    return schedule


def _scheduler(transformer: DTRTransformer2DModel, beta_schedule: str, latents: bool) -> DDPMScheduler:
    num_train_timesteps = int(transformer.routing.timestep_range[1]) + 1
    learns_variance = transformer.config.out_channels == 2 * transformer.config.in_channels
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        # As the authors' code scales the linear schedule of DDPM to other numbers of timesteps.
        beta_start=0.1 / num_train_timesteps,
        beta_end=20 / num_train_timesteps,
        beta_schedule=beta_schedule,
        variance_type="learned_range" if learns_variance else "fixed_large",
        clip_sample=not latents,
        # Their fewer steps are evenly spaced from the first timestep to the last.
        timestep_spacing="linspace",
    )


@contextmanager
def _instead(what: str, flags: str) -> Iterator[None]:
    """An error that names the flags to use instead, if something cannot be loaded."""
    try:
        with built_from_file(what):
            yield
    except OSError as error:
        raise ValueError(f"{what} could not be loaded ({type(error).__name__}). Give {flags}.") from error


def _vae(args: argparse.Namespace, default: str, in_channels: int) -> AutoencoderKL:
    name = args.vae_name_or_path or default
    flags = "`--vae_name_or_path` its folder or repository, or `--no_vae` for a model of pixels"
    with _instead(f"The autoencoder {name}", flags):
        channels = AutoencoderKL.load_config(name, token=args.token).get("latent_channels")
        if channels != in_channels:
            raise ValueError(
                f"`--vae_name_or_path` must be an autoencoder with {in_channels} latent channels, as the model has, "
                f"but {name} has {channels}. For a model of pixels give `--no_vae`."
            )
        return AutoencoderKL.from_pretrained(name, token=args.token)


def _labels(args: argparse.Namespace, num_classes: int) -> dict[str, str] | None:
    if args.no_labels or (args.labels is None and num_classes != _IMAGENET_CLASSES):
        return None
    name = args.labels or _IMAGENET_PIPELINE
    if Path(name).is_file():
        labels = read_object(Path(name), f"--labels {name}")
    else:
        flags = "`--labels` a JSON file or a pipeline that has them, or `--no_labels`"
        with _instead(f"The names of the classes in {name}", flags):
            labels = (Source(name, token=args.token).read_json(PIPELINE_INDEX) or {}).get("id2label")
        if labels is None:
            raise ValueError(f"`--labels` must be a pipeline with names of classes (`id2label`), but {name} has none.")
    known = {str(label) for label in range(num_classes)}
    names = labels.values() if isinstance(labels, dict) and labels.keys() <= known else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f'`--labels` must be names of classes below {num_classes}, as {{"0": "name", "1": "other"}}.')
    return labels


# ---- from a pipeline


def _load_transformer(args: argparse.Namespace) -> DTRTransformer2DModel:
    """A pipeline's denoiser in its saved precision, with the requested routing."""
    source = Source(args.source, args.revision, args.token)
    config = source.read_json("transformer/config.json") or {}
    name = config.get("_class_name")
    if name not in ("DTRTransformer2DModel", *PER_BLOCK_CLASS_NAMES):
        raise ValueError(
            f"{args.source!r} must be a checkpoint file, or a pipeline whose `transformer` is a DiT of diffusers or "
            f"ours, got {'none' if name is None else name}. Other denoisers are routed in Python: "
            "`pipe.transformer = diffusers_dtr.route(pipe.transformer)`, or `pipe.unet`."
        )
    routing = {"routing_beta": 1.0} if name in PER_BLOCK_CLASS_NAMES else {}
    routing |= {flag: getattr(args, flag) for flag in _ROUTING if getattr(args, flag) is not None}
    model = DTRTransformer2DModel.from_pretrained(
        args.source, subfolder="transformer", revision=args.revision, token=args.token, **routing
    )
    saved = [*source.parameter_counts("transformer/")]
    # Loaded as float32, which holds half precision exactly.
    return model.to(_HALF_DTYPES[saved[0]]) if len(saved) == 1 and saved[0] in _HALF_DTYPES else model
