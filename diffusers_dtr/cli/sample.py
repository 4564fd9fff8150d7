"""`diffusers-dtr sample`: a grid of images from a pipeline."""

from __future__ import annotations

import argparse
import math

import diffusers
import torch
from diffusers import SchedulerMixin

from ..pipelines.pipeline_dtr import DTRPipeline
from ..ranges import COUNT, NON_NEGATIVE, SEED
from ..training.validation import save_sample_grid
from .options import add_hub_arguments, new_parser
from .outputs import new_output


_DTYPES = ("float32", "float16", "bfloat16")

_EXAMPLE = """\
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
    """Parse the name of a device that is there for argparse."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"must be a device of this machine, such as cpu, got {name!r}") from error


def add_parser(subparsers) -> None:
    """Add the command's parser."""
    parser = new_parser(
        subparsers,
        "sample",
        "Draw a grid of images from a class-conditional or unconditional pipeline.",
        "The n-th image of a label is drawn from the seed plus n: asking for more labels or images keeps the others,\n"
        "up to rounding, and the images of a column begin with the same noise.",
        _EXAMPLE,
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="Folder of a pipeline, or its repository on the Hub.")
    parser.add_argument(
        "--labels",
        nargs="+",
        action="extend",
        metavar="LABEL",
        help="Classes, one row of the grid each: names that the pipeline knows, or numbers. None by default.",
    )
    parser.add_argument(
        "--num_images",
        type=COUNT,
        default=4,
        help="Images per label, or in all where there are no labels. Default: %(default)s.",
    )
    parser.add_argument(
        "--guidance_scale",
        type=NON_NEGATIVE,
        default=1.0,
        help="Classifier-free guidance, off at 1 or below. Default: %(default)s.",
    )
    parser.add_argument("--num_inference_steps", type=COUNT, default=50, help="Denoising steps. Default: %(default)s.")
    parser.add_argument(
        "--scheduler",
        type=scheduler_class,
        metavar="CLASS",
        help="Scheduler of diffusers, made with the config of the pipeline's own, which is used by default.",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="Seed. Default: %(default)s.")
    parser.add_argument(
        "--max_batch_size",
        type=COUNT,
        default=16,
        help="Compute at most this many images at once, to save memory. Default: %(default)s.",
    )
    parser.add_argument(
        "--device", type=device, help="Where to compute, such as cuda:1. An accelerator, if there is one."
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="Precision. Default: %(default)s.",
    )
    parser.add_argument(
        "--output", default="samples.png", help="PNG to write; it must not exist. Default: %(default)s."
    )
    add_hub_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the grid."""
    with new_output(args.output, suffix=".png") as path:
        pipeline = DTRPipeline.from_pretrained(
            args.pipeline, revision=args.revision, token=args.token, torch_dtype=getattr(torch, args.dtype)
        )
        if args.scheduler is not None:
            pipeline.scheduler = args.scheduler.from_config(pipeline.scheduler.config)
        seeds = range(args.seed, args.seed + args.num_images)
        if args.labels is None:
            wanted, columns = {"num_images": len(seeds)}, math.ceil(math.sqrt(len(seeds)))
        else:
            labels = [_label(pipeline, text) for text in args.labels]
            wanted, columns = {"class_labels": [label for label in labels for _ in seeds]}, len(seeds)
            seeds = [*seeds] * len(labels)
        pipeline.to(args.device or _default_device())
        images = pipeline(
            **wanted,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            max_batch_size=args.max_batch_size,
        ).images
        save_sample_grid(images, columns, path)
    print(args.output)


def _label(pipeline: DTRPipeline, text: str) -> int | str:
    # Names first: a pipeline may call its class 0 "1".
    return int(text) if text.isdecimal() and text not in pipeline.labels else text


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
