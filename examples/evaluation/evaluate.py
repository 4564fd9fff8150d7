r"""Measure a pipeline: draw samples, compare them with images by a network's features, and say its held-out loss.

Prints one JSON object and writes it into the output folder as `evaluation.json`, with a grid of samples. A pipeline in
a folder gets the figures in its `metrics.json`, where `diffusers-dtr card` finds them. An evaluation that was
interrupted goes on with the same command. README.md beside this file says more.

    accelerate launch evaluate.py --pipeline ./my-model --dataset_name path/to/cifar10 --num_samples 10000 \
        --feature_extractor cifar10-features.pt --output_dir evaluation
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers.utils import make_image_grid
from evaluation_data import add_data_arguments, data_config, read_images
from evaluation_samples import (
    Sampler,
    choose_conditions,
    claim_folder,
    draw_samples,
    export_samples,
    generator_of,
    json_hash,
    read_json,
    read_npz_images,
    read_samples,
    scheduler_class,
    write_json,
)
from feature_networks import INCEPTION, extract_features, load_network, load_statistics, save_statistics
from held_out import held_out_losses
from huggingface_hub.utils.sha import sha_fileobj
from PIL import Image
from set_metrics import NEIGHBOURS, set_metrics

from diffusers_dtr import training
from diffusers_dtr.model_card import save_metrics
from diffusers_dtr.ranges import COUNT, NON_NEGATIVE, SEED, Range
from diffusers_dtr.run_record import public_command, publishable
from diffusers_dtr.training.data import match_classes
from diffusers_dtr.user_errors import run_script


GRID_COLUMNS, GRID_ROWS = 10, 8
SAMPLES = "samples"
# How samples are drawn: flags without a meaning for samples that are there
DRAWING = {"scheduler", "num_inference_steps", "guidance_scale", "revision", "save_png", "save_npz"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="Folder of samples, features and results.")
    parser.add_argument("--seed", type=SEED, default=0, help="Of samples and subsets. Default: %(default)s.")
    samples = parser.add_argument_group("samples")
    samples.add_argument("--pipeline", help="Folder or Hub repository of a diffusers pipeline.")
    samples.add_argument("--samples", help="Instead of a pipeline: a folder of images, or an ADM .npz.")
    samples.add_argument("--revision", help="Revision of the pipeline's repository.")
    samples.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    samples.add_argument("--num_samples", type=Range("[4, inf)", int), default=10_000, help="Default: %(default)s.")
    samples.add_argument("--batch_size", type=COUNT, default=64, help="Per process. Default: %(default)s.")
    samples.add_argument("--scheduler", help="Class of diffusers. Default the pipeline's own.")
    samples.add_argument("--num_inference_steps", type=COUNT, help="Default the pipeline's.")
    samples.add_argument("--guidance_scale", type=NON_NEGATIVE, help="Default the pipeline's.")
    samples.add_argument("--resolution", type=COUNT, help="Side in pixels. Default the pipeline's.")
    samples.add_argument(
        "--labels",
        choices=("balanced", "data"),
        default="balanced",
        help="Classes in turn, or in the proportions of the data. Captions are always the data's.",
    )
    samples.add_argument("--save_png", action="store_true", help="Keep the samples as PNGs too.")
    samples.add_argument("--save_npz", action="store_true", help="Keep them as samples.npz too, as ADM has it.")
    reference = parser.add_argument_group("what they are compared with: the data, or")
    reference.add_argument("--reference", help="An ADM .npz of images.")
    reference.add_argument("--statistics", help="Statistics (.npz): used if the file is there, else written.")
    network = parser.add_argument_group("features")
    network.add_argument(
        "--feature_extractor",
        default=INCEPTION,
        help="`inception`, a TorchScript file, or a model of transformers such as facebook/dinov2-large. "
        "Default: %(default)s.",
    )
    network.add_argument("--feature_weights", help="File of Inception's weights. Default: downloaded.")
    add_data_arguments(parser, captions=True)
    held_out = parser.add_argument_group("held-out loss, of --validation_split or --validation_data_dir")
    held_out.add_argument("--max_held_out_images", type=COUNT, default=1024, help="Default: %(default)s.")
    held_out.add_argument("--num_clusters", type=COUNT, default=8, help="Default: %(default)s.")
    held_out.add_argument("--cluster_cost", choices=("uniform", "timestep", "snr"), default="snr")
    return parser.parse_args(argv)


def check(args):
    """Refuse flags that do not go together, before anything is loaded."""
    if find_spec("torchmetrics") is None:
        raise ImportError('Evaluation needs torchmetrics: pip install "diffusers-dtr[evaluation]".')
    data = [name for name in ("dataset_name", "train_data_dir") if getattr(args, name) is not None]
    if (args.pipeline is None) == (args.samples is None):
        raise ValueError("Exactly one of --pipeline and --samples must be given.")
    unused = [f"--{name}" for name in sorted(DRAWING) if args.samples is not None and getattr(args, name)]
    if unused:
        raise ValueError(f"--samples are there, and not drawn: leave {', '.join(unused)} out.")
    if len(data) > 1:
        raise ValueError("At most one of --dataset_name and --train_data_dir can be given.")
    if not data and args.reference is None and not (args.statistics and os.path.exists(args.statistics)):
        raise ValueError("Data, --reference or a file of --statistics must be given, to compare the samples with.")
    if wants_held_out(args) and (args.pipeline is None or not data):
        raise ValueError("The held-out loss needs --pipeline, and --dataset_name or --train_data_dir.")
    if args.scheduler is not None:
        scheduler_class(args.scheduler)


def wants_held_out(args):
    return args.validation_split is not None or args.validation_data_dir is not None


def load_data_images(args, sampler):
    """The data's images, with labels or captions if they are needed, labels as the pipeline numbers them; or None."""
    if args.dataset_name is None and args.train_data_dir is None:
        return None
    kind = None if sampler is None else sampler.condition
    if kind == "prompt":
        args.caption_column = args.caption_column or "text"
    elif kind == "class_labels" and (args.labels == "data" or wants_held_out(args)):
        args.label_column = args.label_column or "label"
    images = training.load_images(data_config(args, args.output_dir, args.resolution))
    if kind == "class_labels" and images.labels is not None and sampler.num_classes is not None:
        images, _ = match_classes(images, sampler.id2label, sampler.num_classes)
    return images


@dataclass(frozen=True)
class ImageSet:
    """Images that are there: uint8 `(n, 3, height, width)` for a range of numbers, how many, and a hash of them."""

    images_of: Callable[[range], torch.Tensor]
    count: int
    key: str

    def __post_init__(self):
        if self.count <= NEIGHBOURS:
            raise ValueError(f"At least {NEIGHBOURS + 1} samples and images are needed, got {self.count}.")

    @property
    def side(self):
        """In pixels; a ValueError for images that are no squares."""
        return side_of(self.images_of(range(1)))


def side_of(images):
    height, width = images.shape[2:]
    if height != width:
        raise ValueError(f"Samples must be square, got {height} x {width}: data are cut to squares.")
    return height


def npz_images(path):
    loaded, _ = read_npz_images(path)
    with open(path, "rb") as file:
        return ImageSet(partial(rows_of, loaded), len(loaded), sha_fileobj(file).hex())


def given_samples(args):
    """Those of `--samples`."""
    if not os.path.isdir(args.samples):
        return npz_images(args.samples)
    if args.resolution is None:
        raise ValueError("`--resolution` must be given for a folder of --samples.")
    folder = argparse.Namespace(**{**vars(args), **dict.fromkeys(("dataset_name", "dataset_config_name"))})
    for name in ("validation_split", "validation_data_dir", "label_column", "caption_column", "max_train_samples"):
        setattr(folder, name, None)
    folder.train_data_dir, folder.train_split = args.samples, "train"
    images = training.load_images(data_config(folder, args.output_dir, args.resolution))
    return data_images(images, args.resolution, folder)


def data_images(images, side, args):
    """The data at a resolution."""
    dataset = training.load_data(data_config(args, args.output_dir, side), images).dataset
    key = json_hash([images.dataset._fingerprint, args.image_column, side])
    return ImageSet(partial(images_of_rows, dataset, args.dataloader_num_workers), len(dataset), key)


def first_sample(sampler, conditions, args):
    """The first of a pipeline, so that what cannot be drawn is told before anything is written."""
    drawn = Path(args.output_dir, SAMPLES, "00000.npz")
    if drawn.exists():
        return read_samples([drawn], range(1))
    image = sampler(conditions[:1], [generator_of(args.seed, 0)])
    return torch.from_numpy(image).permute(0, 3, 1, 2)


def images_of_rows(dataset, num_workers, rows):
    return read_images(dataset, rows, num_workers)[0]


def rows_of(images, rows):
    return images[rows.start : rows.stop : rows.step]


def find_reference(network, images, side, args):
    """What the samples are compared with: saved features or None, images or None, and what they are."""
    found, source = None, {}
    if args.reference is not None:
        found = npz_images(args.reference)
        source = {"dataset": args.reference, "images": found.count, "resolution": found.side}
    elif images is not None:
        found = data_images(images, side, args)
        split = {} if args.dataset_name is None else {"split": args.train_split}
        source = {"dataset": args.dataset_name or args.train_data_dir, **split, "images": found.count}
        source["resolution"] = side
    if found is not None:
        source["some_sha256"] = some_hash(found)
    source, features = publishable(source), None
    if args.statistics is not None and os.path.exists(args.statistics):
        features, saved = load_statistics(args.statistics, network)
        if source.items() - saved.items():
            raise ValueError(
                f"`--statistics` {args.statistics!r} are of {saved}, not of {source}: give another file, or neither "
                "data nor --reference."
            )
        source = saved
    if source["resolution"] != side:
        raise ValueError(f"The reference has images of {source['resolution']} pixels a side, the samples of {side}.")
    return features, found, source


def some_hash(images):
    """Of some of the images, which tells other ones also where names and numbers are the same."""
    some = images.images_of(range(0, images.count, -(-images.count // 16)))
    return hashlib.sha256(some.contiguous().numpy().tobytes()).hexdigest()[:16]


def reference_features(network, reference, args, accelerator):
    """Features of a reference, and what it is."""
    features, found, source = reference
    if features is None:
        folder = Path(args.output_dir, "reference", found.key[:16])
        features, _ = extract_features(network, found.images_of, found.count, folder, accelerator)
        if args.statistics is not None and accelerator.is_main_process:
            save_statistics(args.statistics, network, features, source)
    return features, source


def save_grid(samples, args, num_classes):
    columns = num_classes if args.labels == "balanced" and num_classes in range(2, 17) else GRID_COLUMNS
    columns = min(columns, samples.count)
    rows = min(GRID_ROWS, samples.count // columns)
    images = samples.images_of(range(rows * columns)).permute(0, 2, 3, 1).numpy()
    make_image_grid([*map(Image.fromarray, images)], rows, columns).save(Path(args.output_dir, "samples.png"))


def versions():
    packages = ("diffusers-dtr", "diffusers", "torch", "torchmetrics", "transformers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def card_metrics(report):
    """The figures as entries of a model card."""
    network, metrics = report["network"], report["metrics"]
    frechet = ("FID", "fid") if network["name"] == INCEPTION else (f"Fréchet distance, {network['name']}", "fd")
    if "dinov2" in network["name"]:
        frechet = ("FD-DINOv2", "fd-dinov2")
    suffix = "" if network["name"] == INCEPTION else f", {network['name']}"
    names = {
        "frechet_distance": frechet,
        "inception_score": (f"Inception score{suffix}", "inception_score"),
        "precision": (f"Precision{suffix}", "precision"),
        "recall": (f"Recall{suffix}", "recall"),
        "kid": (f"KID{suffix}", "kid"),
    }
    settings = {"network": network["name"], "network_sha256": network["sha256"], **metrics["settings"]}
    shown = ("scheduler", "num_inference_steps", "guidance_scale", "labels", "seed")
    settings |= {name: report["settings"][name] for name in shown if report["settings"].get(name) is not None}
    dataset = report["reference"]["dataset"]
    entries = [
        {"name": name, "type": kind, "value": metrics[key], "settings": settings, "dataset": dataset}
        for key, (name, kind) in names.items()
        if metrics[key] is not None
    ]
    losses = report.get("held_out_loss")
    if losses is not None:
        shown = {name: losses[name] for name in ("images", "noised_samples", "seed")}
        name = "Denoising loss on held-out images"
        entries.append({"name": name, "type": "mse", "value": losses["mean"], "settings": shown, "dataset": dataset})
    return entries


def settings_of(args, sampler, samples, images):
    """What decides on the samples, which an output folder is of."""
    if samples is not None:
        return {"samples": args.samples, "samples_key": samples.key, "seed": args.seed}
    names = ["pipeline", "revision", "num_samples", "seed", "resolution", "labels"]
    names += [] if sampler.condition != "class_labels" else ["label_column"] if args.labels == "data" else []
    names += ["caption_column"] if sampler.condition == "prompt" else []
    flags = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    told_by_data = sampler.condition == "prompt" or (sampler.condition is not None and args.labels == "data")
    data = {"data": images.dataset._fingerprint} if told_by_data else {}
    return flags | data | sampler.settings


def main(args):
    check(args)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])
    with accelerator.local_main_process_first():  # which downloads what the others then find
        network = load_network(args.feature_extractor, args.feature_weights, accelerator.device)
        sampler = None if args.pipeline is None else Sampler(args, accelerator.device)
        images = load_data_images(args, sampler)
        samples = None if args.samples is None else given_samples(args)
    if samples is None:
        conditions = choose_conditions(
            sampler.condition, args.labels, args.num_samples, sampler.num_classes, images, args.seed
        )
        side = side_of(first_sample(sampler, conditions, args))
    else:
        side = samples.side
    reference = find_reference(network, images, side, args)
    losses_of = held_out_losses(sampler, images, side, args, accelerator) if wants_held_out(args) else None
    settings = settings_of(args, sampler, samples, images)
    claim_folder(args.output_dir, settings, accelerator)

    paths = None
    if samples is None:
        paths = draw_samples(sampler, conditions, args, Path(args.output_dir, SAMPLES), accelerator)
        samples = ImageSet(partial(read_samples, paths), len(conditions), "")
    features_dir = Path(args.output_dir, "features")
    features, logits = extract_features(network, samples.images_of, samples.count, features_dir, accelerator)
    reference, source = reference_features(network, reference, args, accelerator)
    losses = None if losses_of is None else losses_of()
    if not accelerator.is_main_process:
        return

    report = {
        "command": public_command(sys.argv),
        "settings": publishable(settings),
        "network": network.notes | network.identity,
        "reference": source,
        "metrics": set_metrics(features, reference, logits, args.seed),
        **({} if losses is None else {"held_out_loss": losses}),
        "versions": versions(),
        "hardware": hardware(accelerator),
    }
    save_grid(samples, args, None if sampler is None else sampler.num_classes)
    if paths is not None:
        export_samples(paths, args, args.output_dir)
    write_report(Path(args.output_dir, "evaluation.json"), report)
    local = args.pipeline is not None and os.path.isdir(args.pipeline)
    save_metrics(args.pipeline if local else args.output_dir, card_metrics(report), sys.argv)
    print(json.dumps(report, indent=2))


def write_report(path, report):
    """Write it beside that of another network, which is there and gets the hash of its network for a name."""
    if path.exists():
        before = read_json(path)["network"]["sha256"]
        if before != report["network"]["sha256"]:
            path.replace(path.with_name(f"evaluation-{before[:16]}.json"))
    write_json(path, report)


def hardware(accelerator):
    name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.machine()
    return {"device": name, "processes": accelerator.num_processes, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    run_script(main, parse_args())
