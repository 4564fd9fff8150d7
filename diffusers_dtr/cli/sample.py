"""`diffusers-dtr sample`: a grid of images from a pipeline."""

from __future__ import annotations

import argparse
import inspect
import math
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from ..config_types import built_from_file
from ..pipelines.class_labels import classes_by_name, labels_of_images
from ..pipelines.model_index import component_class_name, pipeline_class_name
from ..pipelines.pipeline_dtr import DTRPipeline
from ..ranges import COUNT, FINITE, NON_NEGATIVE, SEED
from ..run_record import LORA_FILE, PIPELINE_INDEX
from ..visualization import image_grid
from .options import new_output
from .sources import Source


# Arguments of the pipeline
_PASSED_ON = ("guidance_scale", "guidance_interval", "height", "width", "num_inference_steps", "max_batch_size")
_DTYPES = ("float32", "float16", "bfloat16")

DESCRIPTION = """\
The n-th image of a label is drawn from the seed plus n: asking for more labels or images keeps the others,
up to rounding, and the images of a column begin with the same noise."""
EXAMPLES = """\
  diffusers-dtr sample ./demo/pipeline --labels 3 7 --num_images 8 --guidance_scale 1.5 --output digits.png
  diffusers-dtr sample owner/model --labels "golden retriever" --scheduler DPMSolverMultistepScheduler \\
    --num_inference_steps 20 --dtype float16"""


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """Parse the name of a scheduler's class for argparse."""
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise argparse.ArgumentTypeError(f"must be a scheduler of diffusers, such as DDIMScheduler, got {name!r}")
    return found


def device(name: str) -> torch.device:
    """Parse the name of an available device for argparse."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"must be a device of this machine, such as cpu, got {name!r}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add = parser.add_argument
    add("pipeline", metavar="PIPELINE", help="Folder of a pipeline, or its repository on the Hub.")
    labels = "Classes, one row of the grid each: names that the pipeline knows, or else numbers. None by default."
    add("--labels", nargs="+", action="extend", metavar="LABEL", help=labels)
    default = "Default: %(default)s."
    add("--num_images", type=COUNT, default=4, help=f"Images per label, or in all without labels. {default}")
    guidance = f"Classifier-free guidance, off at 1 or below. {default}"
    add("--guidance_scale", type=NON_NEGATIVE, default=1.0, help=guidance)
    interval = "Guide at these timesteps and those between them only. Everywhere by default."
    add("--guidance_interval", type=FINITE, nargs=2, metavar=("LOW", "HIGH"), help=interval)
    add("--height", type=COUNT, help="Height of the images in pixels. The model's by default.")
    add("--width", type=COUNT, help="Width of the images in pixels. The model's by default.")
    add("--num_inference_steps", type=COUNT, default=50, help=f"Denoising steps. {default}")
    scheduler = "Scheduler of diffusers, made with the config of the pipeline's own, which is used by default."
    add("--scheduler", type=scheduler_class, metavar="CLASS", help=scheduler)
    add("--seed", type=SEED, default=0, help=f"Seed. {default}")
    add("--max_batch_size", type=COUNT, default=16, help=f"Images computed at once, which takes memory. {default}")
    add("--device", type=device, help="Where to compute, such as cuda:1. An accelerator, if there is one.")
    add("--dtype", choices=_DTYPES, default="float32", help=f"Precision. {default}")
    add("--output", default="samples.png", help=f"PNG to write; it must not exist. {default}")


def run(args: argparse.Namespace) -> None:
    """Write the grid."""
    try:
        _write_grid(args)
    except ValueError as error:
        # The pipeline's argument has another name than the flag.
        raise ValueError(str(error).replace("`class_labels`", "`--labels`")) from error


def _write_grid(args: argparse.Namespace) -> None:
    source = Source(args.pipeline, args.revision, args.token)
    labels = _labels(args, _checked_index(source, args.pipeline), source)
    with new_output(args.output, suffix=".png") as path:
        pipeline = DTRPipeline.from_pretrained(
            args.pipeline, revision=args.revision, token=args.token, dtype=getattr(torch, args.dtype)
        )
        if args.scheduler is not None:
            with built_from_file(f"A {args.scheduler.__name__}"):
                pipeline.scheduler = args.scheduler.from_config(pipeline.scheduler.config)
        seeds = range(args.seed, args.seed + args.num_images)
        if labels is None:
            wanted, columns = {"num_images": len(seeds)}, math.ceil(math.sqrt(len(seeds)))
        else:
            wanted, columns = {"class_labels": [label for label in labels for _ in seeds]}, len(seeds)
            seeds = [*seeds] * len(labels)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        pipeline.to(args.device or accelerator or torch.device("cpu"))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipeline(**wanted, **{name: getattr(args, name) for name in _PASSED_ON}, generator=generators).images
        image_grid(images, columns, args.labels).save(path)
    print(args.output)


def _checked_index(source: Source, name: str) -> dict[str, Any]:
    """The `model_index.json` of a pipeline that can be sampled here; for others, the error says what serves them."""
    index = source.read_json(PIPELINE_INDEX, {"_class_name": str | list[str], "id2label": dict[str, str] | None})
    if index is None:
        adapters = source.header(LORA_FILE) is not None
        what = (
            "LoRA adapters: load them into their pipeline in Python, with `load_lora_weights`, as their card shows"
            if adapters
            else f"no pipeline, which has a {PIPELINE_INDEX}: `diffusers-dtr inspect` says what it is"
        )
        raise ValueError(f"{name!r} holds {what}.")
    known = inspect.signature(DTRPipeline.__init__).parameters
    if any(not name.startswith("_") and name not in known for name in index):
        kind = pipeline_class_name(index)
        raise ValueError(
            f"{name!r} must be a class-conditional or unconditional pipeline, such as a DTRPipeline, DiTPipeline or "
            f"DDPMPipeline, got a {kind}. Sample it in Python: "
            f"`import diffusers_dtr, diffusers; pipe = diffusers.{kind}.from_pretrained({name!r})`."
        )
    return index


def _labels(args: argparse.Namespace, index: dict[str, Any], source: Source) -> list[int] | None:
    """The requested classes, checked before anything large is loaded."""
    if args.labels is None:
        return None
    component = "unet" if component_class_name(index, "transformer") is None else "transformer"
    types = {"num_embeds_ada_norm": int | None, "num_class_embeds": int | None}
    config = source.read_json(f"{component}/config.json", types) or {}
    number = config.get("num_embeds_ada_norm" if component == "transformer" else "num_class_embeds")
    if number is None:
        raise ValueError(f"`--labels` must be left out: {args.pipeline!r} is unconditional.")
    classes = classes_by_name(index.get("id2label"))
    # Names first: a pipeline may call its class 0 "1".
    labels = [int(label) if label.isdecimal() and label not in classes else label for label in args.labels]
    return labels_of_images(labels, None, classes=classes, num_classes=number, null_class=None)[1]
