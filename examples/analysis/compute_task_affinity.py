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
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import scipy  # noqa: F401 - the end needs it: missing, it shows before anything is measured
import torch
from accelerate import Accelerator
from diffusers import AutoModel, DiffusionPipeline
from matplotlib import pyplot
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from diffusers_dtr import DenoisingLoss, DTRPipeline, TaskAffinity, cluster_timesteps, training
from diffusers_dtr.analysis import Workspace, noise_distance_correlation
from diffusers_dtr.ranges import COUNT, FINITE, SEED, WHOLE, Range
from diffusers_dtr.run_record import public_command, publishable
from diffusers_dtr.training.config import LabelledDataConfig, ModelConfig, RunConfig, TextConfig
from diffusers_dtr.training.data import CaptionedDataset, held_out_samples, match_classes
from diffusers_dtr.training.families import TEXT_TO_IMAGE_FAMILIES, DenoiserFamily
from diffusers_dtr.user_errors import run_script
from diffusers_dtr.visualization import plot_affinity_by_noise_distance, plot_task_affinity


# Whose denoisers take and return latents as they are.
FAMILIES = {
    name: family for name, family in TEXT_TO_IMAGE_FAMILIES.items() if family.denoise is DenoiserFamily.denoise
}
RESULT = "task_affinity.safetensors"
PICTURE = "task_affinity.png"
PACKAGES = ("diffusers-dtr", "torch", "diffusers")


def parse_args(argv=None):
    parser = HfArgumentParser(
        LabelledDataConfig,
        usage="%(prog)s [options; --help lists them]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained_model_name_or_path",
        nargs="+",
        required=True,
        metavar="PIPELINE",
        help="Folder or Hub id of a class-conditional, unconditional or text-to-image pipeline; affinity is averaged "
        "over several of one kind.",
    )
    add(
        "--checkpoints",
        type=WHOLE,
        nargs="+",
        metavar="STEP",
        help="Instead of the one pipeline's own weights, those of these checkpoints in its folder, not averaged.",
    )
    add(
        "--parameters",
        type=regular_expression,
        metavar="REGEX",
        help="Only parameters in whose name this is found. Default all.",
    )
    add("--vae_name_or_path", help="Autoencoder in place of the pipeline's.")
    add("--cache_dir", help="Where downloaded datasets and models are kept.")
    add = parser.add_argument_group("captions, for text-to-image pipelines").add_argument
    add("--caption_column", default="text", help="Column with the captions, of which an image's first one is taken.")
    add("--max_sequence_length", type=COUNT, help="Tokens of a T5 encoder's prompt. Default the pipeline's.")
    add = parser.add_argument_group("affinity").add_argument
    add(
        "--num_images",
        type=COUNT,
        default=64,
        help="Images that every gradient is averaged over: a multiple of 4. Those of --validation_split or "
        "--validation_data_dir if given, else training images.",
    )
    add("--train_batch_size", type=COUNT, default=16, help="Images per forward call.")
    add("--num_timesteps", type=COUNT, help="Measure so many, spread evenly, and interpolate. Default all.")
    add("--timesteps", type=FINITE, nargs="+", help="Measure these, and interpolate.")
    add(
        "--sketch_size",
        type=Range("[0, 2^30]", int),
        default=8192,
        help="Numbers that a gradient is projected to; 0 is exact affinity.",
    )
    add(
        "--estimator",
        choices=("unbiased", "plain"),
        default="unbiased",
        help="unbiased leaves out what is due to the noise of finitely many images; plain is the paper's.",
    )
    add("--seed", type=SEED, default=0, help="Seed of noise, sketch, augmentation and latents.")
    add("--cluster", type=COUNT, metavar="K", help="Print the K clusters that the affinity implies.")
    add("--output_dir", required=True, help=f"Folder of {RESULT} and {PICTURE}.")
    try:
        data, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        args.data = data
    except ValueError as error:
        parser.error(str(error))
    check(parser, args)
    return args


def regular_expression(text):
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from error
    return text


def check(parser, args):
    if args.num_timesteps is not None and args.timesteps is not None:
        parser.error("at most one of --num_timesteps and --timesteps can be given")
    number = args.num_timesteps if args.timesteps is None else len(args.timesteps)
    if number is not None and number < 4:  # three are correlated with their noise levels, and one may be pure noise
        parser.error(f"--num_timesteps and --timesteps must be at least 4 timesteps, got {number}")
    if args.checkpoints is not None and len(args.pretrained_model_name_or_path) > 1:
        parser.error("--checkpoints are those of one --pretrained_model_name_or_path")
    data = args.data
    if data.cache_latents or data.latents_dir or data.streaming or data.dataloader_num_workers:
        unused = "--cache_latents, --latents_dir, --streaming and --dataloader_num_workers"
        parser.error(f"{unused} are of no use for the few images that are needed")
    if (Path(args.output_dir) / RESULT).exists():
        parser.error(f"--output_dir already holds {RESULT}: choose another folder, or remove it")


class Pipelines:
    """What is measured: pipelines of one kind, with what their kind needs.

    Attributes:
        family: That of text-to-image pipelines, or None if they are class-conditional or unconditional.
        first: The first pipeline, whose parts but for the denoiser serve all of them.
        denoiser: What pipelines of this kind call theirs.
        checkpoints: Folders to load denoisers from, or None for the pipelines' own.
    """

    def __init__(self, args):
        self.args = args
        self.family = self._common_family()
        if args.max_sequence_length is not None and not getattr(self.family, "max_sequence_length", False):
            raise ValueError("`--max_sequence_length` must be left out: these pipelines take none.")
        self.first = self._load(args.pretrained_model_name_or_path[0])
        if self.family is not None:
            self.prompt_options = self.family.prompt_options(self.first, args.max_sequence_length)
        parts = self.first.components
        self.denoiser = next(name for name in ("transformer", "unet") if parts.get(name) is not None)
        self.checkpoints = None if args.checkpoints is None else self._checkpoint_folders()

    def load_denoisers(self, device):
        """One denoiser at a time."""
        if self.checkpoints is not None:
            denoiser_class = type(getattr(self.first, self.denoiser))
            for folder in self.checkpoints:
                yield denoiser_class.from_pretrained(folder, subfolder=self.denoiser).to(device)
            return
        shared = {name: part for name, part in self.first.components.items() if name != self.denoiser}
        for name in self.args.pretrained_model_name_or_path:
            yield getattr(self._load(name, **shared), self.denoiser).to(device)

    def load_samples(self, accelerator):
        """Clean samples, and what else the denoiser is called with: the same in all processes."""
        args, first = self.args, self.first.to(accelerator.device)
        num_classes = first.num_classes if self.family is None else None
        vae = first.vae
        if args.vae_name_or_path is not None:
            vae = AutoModel.from_pretrained(args.vae_name_or_path, cache_dir=args.cache_dir).to(accelerator.device)
        denoiser = getattr(first, self.denoiser)
        config = self._config(labels=num_classes is not None)
        config = training.resolve_resolution(config, vae, type(denoiser), denoiser.config)
        images = training.load_images(config)
        if num_classes is not None:
            images, _ = match_classes(images, first.config.id2label, num_classes)
        if self.family is not None:
            self.family.resolution = config.data.resolution
        data = training.load_data(config, images, model=denoiser, vae=vae)
        dataset = data.held_out
        if dataset is None:
            # Of the captions of an image, the first
            dataset = data.dataset if self.family is None else CaptionedDataset(data.dataset.dataset, images.captions)
        size = args.num_images, args.train_batch_size
        clean, batch = held_out_samples(dataset, vae, *size, accelerator.device)
        if self.family is not None:
            embeddings = self._encode(batch["caption"], accelerator.device)
            conditions = self.family.conditions(first, embeddings, batch)
        else:
            conditions = {} if num_classes is None else {"class_labels": batch["labels"]}
        first.to("cpu")  # the device's memory is for what is measured
        return clean, conditions

    def _config(self, labels):
        args = self.args
        return training.TrainingConfig(
            run=RunConfig(args.output_dir, seed=args.seed, train_batch_size=args.train_batch_size, report_to="none"),
            data=args.data if labels else replace(args.data, label_column=None),
            model=ModelConfig(cache_dir=args.cache_dir),
            text=None if self.family is None else TextConfig(args.caption_column),
        )

    def _common_family(self):
        families, classes = [], []
        for name in self.args.pretrained_model_name_or_path:
            kind = DiffusionPipeline.load_config(name, cache_dir=self.args.cache_dir)["_class_name"]
            families.append(FAMILIES.get(kind))
            if families[-1] is None:
                classes.append(self._class_names(name, kind))
        if any(names != classes[0] for names in classes):
            raise ValueError(
                "`--pretrained_model_name_or_path` must be pipelines whose `id2label` are the same, for all of them "
                "are told the same labels, got several."
            )
        if any(family != families[0] for family in families):
            raise ValueError("`--pretrained_model_name_or_path` must be pipelines of one kind, got several kinds.")
        return None if families[0] is None else families[0](self.args.data.resolution)

    def _class_names(self, name, kind):
        try:
            return DTRPipeline.load_config(name, cache_dir=self.args.cache_dir).get("id2label")
        except ValueError as error:
            raise ValueError(
                "`--pretrained_model_name_or_path` must be class-conditional or unconditional pipelines, or one of "
                f"{', '.join(FAMILIES)}, got {kind}. `TaskAffinity.measure` takes any denoiser."
            ) from error

    def _load(self, name, **parts):
        pipeline_class = DTRPipeline if self.family is None else DiffusionPipeline
        # Text encoders would otherwise come in the precision that they were saved in.
        return pipeline_class.from_pretrained(name, cache_dir=self.args.cache_dir, dtype=torch.float32, **parts)

    def _checkpoint_folders(self):
        run = Path(self.args.pretrained_model_name_or_path[0])
        folders = [run / f"checkpoint-{step}" for step in self.args.checkpoints]
        missing = [folder.name for folder in folders if not (folder / self.denoiser).is_dir()]
        if missing:
            missing = ", ".join(missing)
            raise ValueError(f"`--checkpoints` must have a {self.denoiser} each in {run}, got none in {missing}.")
        return folders

    def _encode(self, captions, device):
        size = self.args.train_batch_size
        batches = [captions[start : start + size] for start in range(0, len(captions), size)]
        encoded = [self.family.encode(self.first, batch, device, self.prompt_options) for batch in batches]
        return {name: torch.cat([part[name].cpu() for part in encoded]) for name in encoded[0]}


def noise_like(clean, seed):
    return torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def measure(args, pipelines, accelerator, folder):
    scheduler = pipelines.first.scheduler
    loss_fn = DenoisingLoss(scheduler)
    clean, conditions = pipelines.load_samples(accelerator)
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    workspace = Workspace(
        folder,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        wait_for_everyone=accelerator.wait_for_everyone,
        progress=partial(tqdm, desc="timesteps", disable=not accelerator.is_main_process),
    )
    return TaskAffinity.measure(
        pipelines.load_denoisers(accelerator.device),
        loss_fn,
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
        settings={"scheduler": config, "parameters": args.parameters},
    )


def draw(affinity, path):
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
    pipelines = Pipelines(args)
    scheduler = pipelines.first.scheduler
    if args.cluster is not None:
        cluster_timesteps(scheduler, args.cluster, "uniform")  # refuses a number that would be refused in the end
    affinity = measure(args, pipelines, accelerator, folder)
    if accelerator.is_main_process:
        affinity = affinity.with_provenance(
            command=public_command(sys.argv),
            arguments=publishable({**vars(args), "data": asdict(args.data)}),
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        )
        draw(affinity, output_dir / PICTURE)
        affinity.save(output_dir / RESULT)
        report(args, affinity, scheduler)
        # What is needed no more, now that the result is there.
        shutil.rmtree(folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args())
