"""Samples of a pipeline, each a function of the seed and its number, in shards that are complete or not there."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import diffusers
import numpy as np
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, DiTPipeline, SchedulerMixin
from PIL import Image

from diffusers_dtr import DTRPipeline, NoiseLevels


SHARD = 256
# Pipelines that do no more than ours, which has labels, guidance and a generator in all of them
SIMPLE_PIPELINES = (DTRPipeline, DiTPipeline, DDPMPipeline, DDIMPipeline)


@contextmanager
def written_whole(path):
    """A path to write to, which an interruption leaves complete at `path` or not there, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    yield partial
    partial.replace(path)


def write_npz(path, **arrays):
    """Write arrays to a file that is complete or not there."""
    with written_whole(Path(path)) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def write_json(path, value):
    """Write a file of JSON likewise."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path):
    """What a file of JSON holds; a ValueError that names it where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' must be a whole file of JSON ({error}): remove it.") from error


def read_npz_images(path):
    """Images and labels (or None) of an ADM file: `arr_0` uint8 `(n, height, width, 3)`, `arr_1` integers `(n,)`."""
    with open_npz(path) as file:
        images = file.get("arr_0")
        if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            found = "none" if images is None else f"{images.dtype} {images.shape}"
            raise ValueError(f"{os.fspath(path)!r} must hold `arr_0`, uint8 (n, height, width, 3), got {found}.")
        return torch.from_numpy(images).permute(0, 3, 1, 2), file.get("arr_1")


@contextmanager
def open_npz(path):
    """The arrays of an `.npz`; a ValueError for a file that is none, or not whole."""
    wanted = f"{os.fspath(path)!r} must be a whole .npz: remove it, or give another."
    try:
        file = np.load(path, allow_pickle=False)
    except (EOFError, BadZipFile, ValueError) as error:
        raise ValueError(wanted) from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(wanted)
    with file:
        try:
            yield file
        except (EOFError, BadZipFile) as error:
            raise ValueError(wanted) from error


class Sampler:
    """A pipeline with the arguments that it is called with.

    Args:
        args: `pipeline`, `revision`, `dtype`, `scheduler`, `num_inference_steps`, `guidance_scale`, `resolution`.
        device: Where it computes.

    Attributes:
        pipeline: The pipeline; simple ones as a `DTRPipeline`.
        condition: The argument that a sample is told by: "class_labels", "prompt", or None.
        settings: What is the same for all samples, for the record.

    Raises:
        ValueError: If the pipeline cannot be called so.
    """

    def __init__(self, args, device):
        pipeline = DiffusionPipeline.from_pretrained(
            args.pipeline, revision=args.revision, dtype=getattr(torch, args.dtype)
        )
        own = inspect.signature(pipeline.__call__).parameters
        if type(pipeline) in SIMPLE_PIPELINES:
            pipeline = DTRPipeline.from_pipe(pipeline)
        if args.scheduler is not None:
            pipeline.scheduler = other_scheduler(pipeline.scheduler, args.scheduler)
        self.pipeline = pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.parameters = inspect.signature(pipeline.__call__).parameters
        self.condition = next((name for name in ("prompt", "class_labels") if name in self.parameters), None)
        if isinstance(pipeline, DTRPipeline) and pipeline.num_classes is None:
            self.condition = None
        sides = dict.fromkeys(("height", "width"), args.resolution)
        wanted = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale, **sides}
        self.options = {name: value for name, value in wanted.items() if value is not None}
        flags = dict.fromkeys(sides, "resolution")
        unknown = {f"--{flags.get(name, name)}": name for name in self.options if name not in self.parameters}
        if unknown:
            raise ValueError(f"A {type(pipeline).__name__} takes no {', '.join(unknown)}: leave it out.")
        # Of the pipeline as it was loaded, though a simple one is drawn from by another class
        defaults = {name: own[name].default for name in wanted if name in own and name in self.parameters}
        self.options = {name: value for name, value in defaults.items() if value is not None} | self.options
        self.settings = {
            "pipeline_class": type(pipeline).__name__,
            "models_hash": models_hash(pipeline),
            "scheduler": type(pipeline.scheduler).__name__,
            "scheduler_config": {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")},
            "dtype": args.dtype,
            **{name: self.options.get(name) for name in defaults},
        }

    @property
    def denoiser(self):
        """The transformer or U-Net."""
        components = self.pipeline.components
        return next(components[name] for name in ("transformer", "unet") if components.get(name) is not None)

    @property
    def num_classes(self):
        """Of a class-conditional pipeline, or None."""
        if self.condition != "class_labels":
            return None
        config = self.denoiser.config
        return config.get("num_class_embeds") or config.get("num_embeds_ada_norm")

    @property
    def id2label(self):
        """Names of the classes, or None."""
        return self.pipeline.config.get("id2label")

    def __call__(self, conditions, generators):
        """uint8 images `(n, height, width, 3)` for n conditions, which are None where there are none."""
        call = {**self.options, "generator": generators, "output_type": "np"}
        if self.condition is not None:
            call[self.condition] = conditions
        if self.condition != "prompt" and "batch_size" in self.parameters:
            call["batch_size"] = len(generators)
        elif self.condition is None:
            call["num_images"] = len(generators)
        # What a pipeline draws beside its generators: of its samples alone, whatever was drawn before
        torch.manual_seed(generators[0].initial_seed())
        images = np.asarray(self.pipeline(**call).images)
        if not np.isfinite(images).all():
            raise FloatingPointError(
                f"{type(self.pipeline).__name__} draws images that are not finite: its weights are, or what "
                f"{type(self.pipeline.scheduler).__name__} or --dtype makes of them is. Nothing can be measured."
            )
        images = images if images.ndim == 4 else images[..., None]
        images = (images.clip(0, 1) * 255).round().astype(np.uint8)
        return images.repeat(3, axis=3) if images.shape[3] == 1 else images[..., :3]


def scheduler_class(name):
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"`--scheduler` must be a scheduler of diffusers, such as DDIMScheduler, got {name!r}.")
    return found


def other_scheduler(scheduler, name):
    """One of another class for the same model; a ValueError where that would take its output for something else."""
    other = scheduler_class(name).from_config(scheduler.config)
    predicted, taken_for = (NoiseLevels(one).prediction_type for one in (scheduler, other))
    if predicted != taken_for:
        raise ValueError(
            f"`--scheduler` must take the model's output for what it is, {predicted}, got {name}, which takes it for "
            f"{taken_for}."
        )
    return other


def models_hash(pipeline):
    """A hash of the classes, settings and weights of all models of a pipeline."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return json_hash(
        {
            name: [type(part).__name__, _settings_of(part.config), tensors_hash(part.state_dict())]
            for name, part in modules.items()
        }
    )


def _settings_of(config):
    """Those that are not of where a model was loaded from, and by which version."""
    config = config if isinstance(config, dict) else config.to_dict()
    return {name: value for name, value in config.items() if not name.startswith("_") and "version" not in name}


def json_hash(value):
    """A hash of what JSON can hold, and of the texts of the rest."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def tensors_hash(tensors):
    """A hash of named tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def choose_conditions(kind, labels, num_samples, num_classes, images, seed):
    """What each sample is told: a list of labels or captions, or of None.

    Args:
        kind: "class_labels", "prompt" or None, as a sampler has it.
        labels: "balanced", or "data" for the proportions of the data.
        num_samples: How many.
        num_classes: Classes of the pipeline.
        images: The data (`load_images`), with the pipeline's labels, or None.
        seed: Seed of the order in which the data are gone through, again and again if need be.
    """
    if kind is None:
        return [None] * num_samples
    if kind == "class_labels" and labels == "balanced":
        if num_classes is None:
            raise ValueError("`--labels balanced` needs a pipeline that tells its number of classes: use `data`.")
        return [number % num_classes for number in range(num_samples)]
    if images is None:
        flag = "--caption_column" if kind == "prompt" else "--labels data"
        raise ValueError(f"`{flag}` needs data: give --dataset_name or --train_data_dir.")
    order = np.random.default_rng(seed).permutation(len(images))
    rows = [int(order[number % len(order)]) for number in range(num_samples)]
    return [images.captions[row][0] if kind == "prompt" else int(images.labels[row]) for row in rows]


def generator_of(seed, number):
    """A generator of a sample alone, on the CPU, so that the device does not matter either."""
    state = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def claim_folder(folder, settings, accelerator):
    """Begin an output folder, or go on in one with the same settings.

    Raises:
        ValueError: If it was begun with others; the message names them.
    """
    path = Path(folder, "settings.json")
    settings = json.loads(json.dumps(settings, default=str))
    accelerator.wait_for_everyone()
    there = read_json(path) if path.exists() else None
    accelerator.wait_for_everyone()  # all have looked before one writes
    if there is not None and there != settings:
        changed = sorted(name for name in there.keys() | settings.keys() if there.get(name) != settings.get(name))
        raise ValueError(
            f"`--output_dir` {os.fspath(folder)!r} holds an evaluation with other settings ({', '.join(changed)}): "
            "choose another folder."
        )
    if there is None and accelerator.is_main_process:
        write_json(path, settings)
    accelerator.wait_for_everyone()


def fill_shards(folder, count, compute, accelerator):
    """Write the shards of a folder that are not there yet, each by one of the processes.

    Args:
        folder: Holds `00000.npz` and so on.
        count: Entries of all shards together.
        compute: From a range of entries to the arrays of their shard.
        accelerator: Its processes share the work.

    Returns:
        The shards' paths, in order.
    """
    starts = range(0, count, SHARD)
    paths = [Path(folder, f"{number:05d}.npz") for number in range(len(starts))]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    accelerator.wait_for_everyone()  # all have looked before one writes
    for number in missing[accelerator.process_index :: accelerator.num_processes]:
        write_npz(paths[number], **compute(range(starts[number], min(starts[number] + SHARD, count))))
        print(f"{paths[number].parent.name}: {paths[number].name} of {len(paths)} files", flush=True)
    accelerator.wait_for_everyone()
    lost = [path.name for path in paths if not path.exists()]
    if lost:
        raise ValueError(f"{os.fspath(folder)!r} lacks {lost[0]}: it must be one folder for all processes.")
    return paths


def draw_samples(sampler, conditions, args, folder, accelerator):
    """The shards of all samples, `images` and, of a class-conditional pipeline, `labels`."""

    def compute(numbers):
        parts = [numbers[start : start + args.batch_size] for start in range(0, len(numbers), args.batch_size)]
        images = [
            sampler([conditions[number] for number in part], [generator_of(args.seed, number) for number in part])
            for part in parts
        ]
        shard = {"images": np.concatenate(images)}
        if sampler.condition == "class_labels":
            shard["labels"] = np.array([conditions[number] for number in numbers])
        return shard

    return fill_shards(folder, len(conditions), compute, accelerator)


def read_shard(path, name):
    with open_npz(path) as file:
        return file.get(name)


def read_samples(paths, numbers):
    """uint8 `(n, 3, height, width)` for a range of samples."""
    first, last = numbers.start // SHARD, (numbers.stop - 1) // SHARD
    images = np.concatenate([read_shard(path, "images") for path in paths[first : last + 1]])
    return torch.from_numpy(images[numbers.start - first * SHARD :][: len(numbers)]).permute(0, 3, 1, 2)


def export_samples(paths, args, folder):
    """Write the samples as PNGs, as an ADM file, or neither."""
    if args.save_png:
        Path(folder, "png").mkdir(exist_ok=True)
        for start, path in enumerate(paths):
            for place, image in enumerate(read_shard(path, "images")):
                Image.fromarray(image).save(Path(folder, "png", f"{start * SHARD + place:06d}.png"))
    if args.save_npz:
        labels = [read_shard(path, "labels") for path in paths]
        arrays = {} if labels[0] is None else {"arr_1": np.concatenate(labels)}
        images = np.concatenate([read_shard(path, "images") for path in paths])
        write_npz(Path(folder, "samples.npz"), arr_0=images, **arrays)
