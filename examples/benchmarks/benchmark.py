"""What routing, balancing and training at scale cost beside what a user would take instead, in one run.

Every comparison is between runs that take turns in this process, all the same number of times, so that a drift of the
machine's speed hits both sides, in some rounds, each with models of its own. Writes a JSON file and a table.

    python examples/benchmarks/benchmark.py --models DiT-S/4 DiT-L/2:2 SDXL:1:4 --batch_size 2
    python examples/benchmarks/benchmark.py --device cuda --dtype bfloat16 --compile --batch_size 16 --output gpu
"""

import argparse
import gc
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from denoisers import DENOISERS, dit, name_and_cuts, pair
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from measuring import compare, environment, fill_weights, peak_bytes, seconds_by_turns
from parallel_steps import two_processes
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_dtr import (
    ClusteredLoss,
    DTRPipeline,
    DTRTransformer2DModel,
    GradientBalancer,
    cluster_timesteps,
    encode_images,
)
from diffusers_dtr.ranges import COUNT, WHOLE
from diffusers_dtr.training import TrainingConfig, load_data
from diffusers_dtr.training.config import DataConfig, ModelConfig, RunConfig
from diffusers_dtr.user_errors import run_script


def autocast(args):
    return torch.autocast(args.device, dtype=getattr(torch, args.dtype), enabled=args.dtype != "float32")


@torch.no_grad()
def forward(model, call, inputs, args):
    with autocast(args):
        call(**inputs)


def train_step(model, call, inputs, args):
    """Forward, backward and SGD, the optimizer that flatters routing least."""
    with autocast(args):
        loss = call(**inputs).sample.square().mean()
    loss.backward()
    with torch.no_grad():
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        torch._foreach_add_(trained, gradients, alpha=-1e-6)
    model.zero_grad()


def routing(args):
    """Routed denoisers beside plain ones."""
    for name in args.models:
        models, inputs = pair(name, args.device, args.batch_size, args.shrink)
        compiled = args.compile is not None and (not args.compile or name in args.compile)
        for how in ("eager", "compiled") if compiled else ("eager",):
            calls = models if how == "eager" else {key: torch.compile(m, fullgraph=True) for key, m in models.items()}
            for run in (forward, train_step):
                runs = {key: partial(run, model, calls[key], inputs, args) for key, model in models.items()}
                yield f"{name}, {run.__name__.replace('_', ' ')}, {how}", args.batch_size, runs
        torch.compiler.reset()


def sampling(args):
    """DTRPipeline beside DiTPipeline, both guided, with the same autoencoder."""
    config = dit(args.preset, args.shrink)
    torch.manual_seed(0)
    # A small one, because it is not what is compared.
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)
    plain = DiTTransformer2DModel(**{key: value for key, value in config.items() if key != "freq_shift"})
    pipelines = {
        "DTRPipeline": DTRPipeline(DDIMScheduler(), transformer=DTRTransformer2DModel(**config), vae=vae),
        "DiTPipeline": DiTPipeline(plain.eval(), vae, DDIMScheduler()),
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(args.device, **({} if args.dtype == "float32" else {"dtype": getattr(torch, args.dtype)}))
        if args.compile is not None:
            pipeline.transformer.compile(dynamic=False)
    options = {"guidance_scale": 4.0, "num_inference_steps": args.num_inference_steps, "output_type": "np"}
    for count in args.num_images:
        labels = list(range(count))
        runs = {name: partial(pipeline, labels, **options) for name, pipeline in pipelines.items()}
        yield f"{args.preset}, {args.num_inference_steps} steps, guided, batch {count}", count, runs


def noise_of(denoiser, noisy, timesteps, conditions):
    return denoiser(noisy, timestep=timesteps, **conditions).sample[:, : noisy.shape[1]]


def balanced_step(denoiser, loss_fn, optimizers, clean, labels, args):
    timesteps = loss_fn.clusters.sample(len(clean), device=clean.device)
    noise = torch.randn_like(clean)
    with autocast(args):
        noisy = loss_fn.levels.add_noise(clean, noise, timesteps)
        output = loss_fn.denoise(partial(noise_of, denoiser), noisy, timesteps, {"class_labels": labels})
    loss_fn(output, clean, noise, timesteps).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def several(times, step):
    for _ in range(times):
        step()


def class_conditional(args, batch_size, device):
    """A DiT in training, its optimizer, and a batch."""
    torch.manual_seed(0)
    denoiser = DTRTransformer2DModel(**dit(args.preset, args.shrink)).to(device).train()
    fill_weights(denoiser)
    size = denoiser.config.sample_size
    batch = torch.randn(batch_size, 4, size, size, device=device), torch.arange(batch_size, device=device)
    return denoiser, torch.optim.AdamW(denoiser.parameters(), lr=1e-6), batch


def balancing(args):
    """Balancings beside the plain mean, in steps with AdamW: an update of the weights, and those that keep them."""
    scheduler, k, steps = DDPMScheduler(), args.num_clusters, args.balancing_update_every
    batch_size = max(k, args.batch_size)
    denoiser, optimizer, batch = class_conditional(args, batch_size, args.device)
    last = denoiser.transformer_blocks[-1]
    ways = {
        "uncertainty": "uncertainty",
        "PCGrad": GradientBalancer(denoiser, "pcgrad", k, update_every=steps),
        "NashMTL": GradientBalancer(denoiser, "nash_mtl", k, update_every=steps),
        "PCGrad, last block": GradientBalancer(last, "pcgrad", k, update_every=steps),
        "plain": "uniform",
    }
    runs = {}
    for name, way in ways.items():
        loss_fn = ClusteredLoss(scheduler, cluster_timesteps(scheduler, k), balancing=way).to(args.device)
        groups = loss_fn.parameter_groups()
        optimizers = [optimizer, torch.optim.AdamW(groups)] if groups else [optimizer]
        runs[name] = partial(several, steps, partial(balanced_step, denoiser, loss_fn, optimizers, *batch, args))
    what = "train step" if steps == 1 else f"{steps} train steps, one of which updates the weights"
    yield f"{args.preset}, {k} clusters, {what}", steps * batch_size, runs


def data(args):
    """Latents from a cache beside images that are encoded, and what loading alone takes."""
    rng, width = np.random.default_rng(0), args.vae_width
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (width, 2 * width, 4 * width, 4 * width), "norm_num_groups": width // 4}
    vae = AutoencoderKL(**blocks, **widths).requires_grad_(False).eval().to(args.device)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for number in range(4 * args.batch_size):
            pixels = rng.integers(0, 256, (args.resolution, args.resolution, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{number}.jpg")
        batches = {}
        for name, cached in (("cached latents", True), ("images", False)):
            config = TrainingConfig(
                RunConfig(f"{folder}/run"),
                DataConfig(
                    train_data_dir=str(images), resolution=args.resolution, center_crop=True, cache_latents=cached
                ),
                ModelConfig(vae_name_or_path="as given", cache_dir=f"{folder}/cache"),
            )
            dataset = load_data(config, vae=vae).dataset
            places = [(epoch, index) for epoch in range(10**4) for index in range(len(dataset))]
            batches[name] = iter(DataLoader(dataset, args.batch_size, sampler=places))
        loading = {name: partial(next, loaded) for name, loaded in batches.items()}
        yield f"loading alone, {args.resolution} px", args.batch_size, loading
        ready = {
            "cached latents": lambda: next(batches["cached latents"])["latents"].to(args.device),
            "images": lambda: encode_images(vae, next(batches["images"])["pixel_values"].to(args.device)),
        }
        yield f"loading and encoding, {args.resolution} px, VAE of width {width}", args.batch_size, ready


def plain_step(device, args, batch_size, parallel=True):
    """A step of a process; in a group of processes, one that averages gradients."""
    denoiser, optimizer, batch = class_conditional(args, batch_size, device)
    loss_fn = ClusteredLoss(DDPMScheduler(), cluster_timesteps(DDPMScheduler(), args.num_clusters)).to(device)
    denoiser = torch.nn.parallel.DistributedDataParallel(denoiser) if parallel else denoiser
    return partial(balanced_step, denoiser, loss_fn, [optimizer], *batch, args)


def processes(args):
    """Two processes, DDP and half the batch each, beside one with all of it."""
    half = max(1, args.batch_size // 2)
    with two_processes(plain_step, args, half) as both:
        alone = plain_step(args.device, args, 2 * half, parallel=False)
        yield f"{args.preset}, train step", 2 * half, {"two processes": both, "one process": alone}


GROUPS = {group.__name__: group for group in (routing, sampling, balancing, data, processes)}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="What to compare.")
    models = f"Of routing: {', '.join(DENOISERS)}; with at most DEPTH blocks, sides of images divided by DIVISOR."
    add("--models", nargs="+", default=list(DENOISERS), metavar="NAME[:DEPTH[:DIVISOR]]", help=models)
    add("--preset", default="DiT-S/4", metavar="NAME[:DEPTH[:DIVISOR]]", help="The DiT of the other groups.")
    add("--shrink", type=COUNT, default=1, help="Divides all widths, to try the command out.")
    add("--batch_size", type=COUNT, default=16, help="Balancing has a sample per cluster at least.")
    add("--num_images", type=COUNT, nargs="+", default=[1, 4, 16], help="Batch sizes of sampling.")
    add("--num_inference_steps", type=COUNT, default=20, help="Of sampling.")
    add("--num_clusters", type=COUNT, default=8)
    add("--balancing_update_every", type=COUNT, default=1, help="Steps of a turn of balancing.")
    add("--resolution", type=COUNT, default=256, help="Side of the images that are encoded.")
    add("--vae_width", type=COUNT, default=128, help="Of the first block; a multiple of 4.")
    add("--rounds", type=COUNT, default=3, help="How often everything is made and measured anew.")
    add("--repeats", type=COUNT, default=3, help="Timed turns of every run in a round; medians are reported.")
    add("--warmup", type=WHOLE, default=2, help="Untimed turns of every run in a round first.")
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="Autocast type.")
    add("--compile", nargs="*", metavar="MODEL", help="Those of `--models` to measure compiled too; all by default.")
    add("--output", default="benchmark", help="Where to write, without `.json` and `.md`.")
    return parser.parse_args()


def table(report):
    """Every comparison of a report, in Markdown."""
    lines = [
        "| compared | with | ratio of times | of single rounds | samples per second |",
        "| --- " * 5 + "|",
    ]
    for cell in report["cells"]:
        seconds, others = cell["median_seconds"], cell["ratios"]
        base = cell["items"] / seconds[cell["base"]]
        for name, ratio in others.items():
            rate = f"{cell['items'] / seconds[name]:.4g}, {base:.4g}"
            spread = f"{ratio['min']:.2f} – {ratio['max']:.2f}"
            lines.append(
                f"| {cell['name']}: {name} | {cell['base']} | {ratio['of_medians']:.2f} | {spread} | {rate} |"
            )
    return "\n".join(lines) + "\n"


def main():
    args = parse_args()
    for model in args.models:
        name_and_cuts(model)
    dit(args.preset)
    measured = {}
    for number in range(args.rounds):
        for group in args.groups:
            for name, items, runs in GROUPS[group](args):
                seconds = seconds_by_turns(runs, args.repeats, args.warmup, args.device)
                measured.setdefault((group, name, items), []).append(seconds)
                print(f"Round {number + 1}, {name}: {compare([seconds])['ratios']}", file=sys.stderr)
                del runs
                gc.collect()
    keys = ("group", "name", "items")
    cells = [dict(zip(keys, cell, strict=True)) | compare(rounds) for cell, rounds in measured.items()]
    report = {"command": vars(args), **environment(args.device), "cells": cells, "peak_bytes": peak_bytes(args.device)}
    Path(f"{args.output}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Path(f"{args.output}.md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    run_script(main)
