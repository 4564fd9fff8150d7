"""Measure task affinity: how much a denoiser's gradients at different timesteps point the same way.

Run with `accelerate launch compute_task_affinity.py --help`; README.md beside this file has complete commands. All
processes share the work. An interrupted measurement goes on when the same command is run again.
"""

import argparse
import math
import platform
import re
import shutil
import sys
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from diffusers_dtr import DenoisingLoss, DTRPipeline, TaskAffinity, cluster_timesteps, training
from diffusers_dtr.analysis import Workspace, noise_distance_correlation
from diffusers_dtr.publishing import public_arguments, public_command


RESULT = "task_affinity.safetensors"
PICTURE = "task_affinity.png"
PACKAGES = ("diffusers-dtr", "torch", "diffusers")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained_model_name_or_path",
        nargs="+",
        required=True,
        metavar="PIPELINE",
        help="Folder or Hub id of a pipeline; affinity is averaged over several.",
    )
    add(
        "--checkpoints",
        type=int,
        nargs="+",
        metavar="STEP",
        help="Instead of the one pipeline's own weights, those of these checkpoints in its folder, not averaged.",
    )
    add("--parameters", metavar="REGEX", help="Only parameters in whose name this is found. Default all.")
    training.add_data_arguments(parser)
    add = parser.add_argument_group("affinity").add_argument
    add(
        "--num_images",
        type=int,
        default=64,
        help="Images that every gradient is averaged over: a multiple of 4. Those of --validation_split or "
        "--validation_data_dir if given, else training images.",
    )
    add("--train_batch_size", type=int, default=16, help="Images per forward call.")
    add("--num_timesteps", type=int, help="Measure so many, spread evenly, and interpolate. Default all.")
    add("--timesteps", type=float, nargs="+", help="Measure these, and interpolate.")
    add("--sketch_size", type=int, default=8192, help="Numbers that a gradient is projected to; 0 is exact affinity.")
    add(
        "--estimator",
        choices=("unbiased", "plain"),
        default="unbiased",
        help="unbiased leaves out what is due to the noise of finitely many images; plain is the paper's.",
    )
    add("--seed", type=int, default=0, help="Seed of noise, sketch, augmentation and latents.")
    add("--cluster", type=int, metavar="K", help="Print the K clusters that the affinity implies.")
    add("--output_dir", required=True, help=f"Folder of {RESULT} and {PICTURE}.")
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser, args):
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("exactly one of --dataset_name and --train_data_dir must be given")
    if args.num_timesteps is not None and args.timesteps is not None:
        parser.error("at most one of --num_timesteps and --timesteps can be given")
    if args.checkpoints is not None and len(args.pretrained_model_name_or_path) > 1:
        parser.error("--checkpoints are those of one --pretrained_model_name_or_path")
    if args.cache_latents or args.dataloader_num_workers:
        parser.error("--cache_latents and --dataloader_num_workers are of no use for the few images that are needed")
    if find_spec("matplotlib") is None:
        parser.error('the picture needs matplotlib: pip install "diffusers-dtr[training]"')
    if (Path(args.output_dir) / RESULT).exists():
        parser.error(f"--output_dir already holds {RESULT}: choose another folder, or remove it")


def load_denoisers(args, pipeline, device):
    """One denoiser at a time."""
    if args.checkpoints is None:
        for name in args.pretrained_model_name_or_path:
            yield DTRPipeline.from_pretrained(name, cache_dir=args.cache_dir).denoiser.to(device)
        return
    kind = "unet" if pipeline.transformer is None else "transformer"
    for step in args.checkpoints:
        folder = Path(args.pretrained_model_name_or_path[0]) / f"checkpoint-{step}"
        yield type(pipeline.denoiser).from_pretrained(folder, subfolder=kind).to(device)


def load_samples(args, pipeline, accelerator):
    """Clean samples, and what else the denoiser is called with: the same in all processes."""
    num_classes = pipeline.num_classes
    images = training.load_images(args, None if num_classes is None else args.label_column)
    if num_classes is not None and images.num_classes > num_classes:
        raise ValueError(f"The images have {images.num_classes} classes, but the model knows {num_classes}.")
    vae = pipeline.vae
    if args.vae_name_or_path is not None:
        vae = AutoencoderKL.from_pretrained(args.vae_name_or_path, cache_dir=args.cache_dir)
    if vae is not None:
        vae.to(accelerator.device)
    channels = pipeline.denoiser.config.in_channels if vae is None else vae.config.in_channels
    dataset = training.held_out_dataset(args, images, channels)
    if dataset is None:
        dataset = training.build_dataset(args, images, channels, vae, accelerator)
    clean, batch = training.held_out_samples(dataset, vae, args.num_images, args.train_batch_size, accelerator.device)
    return clean, {} if num_classes is None else {"class_labels": batch["labels"]}


def noise_like(clean, seed):
    return torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def measure(args, pipeline, accelerator, folder):
    clean, conditions = load_samples(args, pipeline, accelerator)
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    workspace = Workspace(
        folder,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        wait_for_everyone=accelerator.wait_for_everyone,
        progress=partial(tqdm, desc="timesteps", disable=not accelerator.is_main_process),
    )
    return TaskAffinity.measure(
        load_denoisers(args, pipeline, accelerator.device),
        DenoisingLoss(pipeline.scheduler),
        clean,
        noise_like(clean, args.seed),
        conditions,
        timesteps=args.timesteps if args.num_timesteps is None else args.num_timesteps,
        estimator=args.estimator,
        parameters=None if args.parameters is None else re.compile(args.parameters).search,
        sketch_size=args.sketch_size or None,
        seed=args.seed,
        batch_size=args.train_batch_size,
        workspace=workspace,
        settings={"scheduler": scheduler, "parameters": args.parameters},
    )


def draw(affinity, path):
    from matplotlib import pyplot

    from diffusers_dtr.visualization import plot_affinity_by_noise_distance, plot_task_affinity

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    plot_task_affinity(affinity, ax=axes[0])
    plot_affinity_by_noise_distance(affinity, ax=axes[1])
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def report(args, affinity, scheduler):
    unknown = "cannot be told: half of the images are too few at some timestep, take more"
    print(f"split-half reliability: {unknown if math.isnan(affinity.reliability) else f'{affinity.reliability:.3f}'}")
    print(f"rank correlation of affinity and distance in log SNR: {noise_distance_correlation(affinity):.3f}")
    if args.cluster is not None:
        for name, cost in {"affinity": affinity.full_matrix(), "snr": "snr", "timestep": "timestep"}.items():
            clusters = cluster_timesteps(scheduler, args.cluster, cost)
            print(f"{args.cluster} clusters by {name}: {', '.join(map(str, clusters.boundaries))}")


def main(args):
    accelerator = Accelerator(mixed_precision="no")
    output_dir = Path(args.output_dir)
    folder = output_dir / "measurement"
    pipeline = DTRPipeline.from_pretrained(args.pretrained_model_name_or_path[0], cache_dir=args.cache_dir)
    affinity = measure(args, pipeline, accelerator, folder)
    if accelerator.is_main_process:
        affinity = affinity.with_provenance(
            command=public_command(sys.argv),
            arguments=public_arguments(args),
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        )
        draw(affinity, output_dir / PICTURE)
        affinity.save(output_dir / RESULT)
        report(args, affinity, pipeline.scheduler)
        # What is needed no more, now that the result is there.
        shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
