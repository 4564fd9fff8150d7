"""What balancing costs: time and peak memory of a train step, by balancing, on the denoisers of DTR.

Each balancing is measured in a fresh process. Memory is the peak of what the step adds to model, optimizer and data:
of the CUDA allocator's, or of the process's resident memory on a CPU. `expected_gradient_bytes` is what the docstring
of GradientBalancer states for one process: k + 1 float32 gradients. Prints JSON.

    python examples/benchmarks/benchmark_gradient_balancing.py --preset DiT-S/4 --batch_size 32 --device cuda
"""

import argparse
import json
import multiprocessing
import statistics
from importlib.metadata import version

import torch
from diffusers import DDPMScheduler
from measuring import environment, fill_weights, peak_bytes, seconds_by_turns

from diffusers_dtr import ClusteredLoss, DTRTransformer2DModel, GradientBalancer, cluster_timesteps
from diffusers_dtr.ranges import COUNT
from diffusers_dtr.user_errors import run_script


# Name -> (balancing, steps that share weights, whether the Gramian is of the last block alone).
SUBJECTS = {
    "uniform": ("uniform", None, None),
    "uncertainty": ("uncertainty", None, None),
    "pcgrad": ("pcgrad", 1, False),
    "pcgrad, every 10 steps": ("pcgrad", 10, False),
    "pcgrad, last block": ("pcgrad", 1, True),
    "nash_mtl": ("nash_mtl", 1, False),
    "nash_mtl, every 10 steps": ("nash_mtl", 10, False),
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="DiT-S/4", help="A size that DTRTransformer2DModel.from_preset knows.")
    parser.add_argument("--num_clusters", type=COUNT, default=8)
    parser.add_argument("--batch_size", type=COUNT, default=16)
    parser.add_argument("--steps", type=COUNT, default=10, help="Timed steps of each balancing; the mean is reported.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="Autocast type.")
    parser.add_argument("--only", nargs="+", choices=tuple(SUBJECTS), default=list(SUBJECTS), help="What to measure.")
    return parser.parse_args()


def build_loss(denoiser, name, num_clusters):
    balancing, update_every, last_block = SUBJECTS[name]
    scheduler = DDPMScheduler()
    if update_every is not None:
        module = denoiser.transformer_blocks[-1] if last_block else denoiser
        balancing = GradientBalancer(module, balancing, num_clusters, update_every=update_every)
    return ClusteredLoss(scheduler, cluster_timesteps(scheduler, num_clusters), balancing=balancing)


def measure(name, args):
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    denoiser = DTRTransformer2DModel.from_preset(args.preset).to(device).train()
    fill_weights(denoiser)
    loss_fn = build_loss(denoiser, name, args.num_clusters).to(device)
    optimizer = torch.optim.AdamW([{"params": denoiser.parameters()}, *loss_fn.parameter_groups()], lr=1e-4)
    size = denoiser.config.sample_size
    shape = (2, args.batch_size, denoiser.config.in_channels, size, size)
    clean, noise = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(denoiser.config.num_embeds_ada_norm, (args.batch_size,), generator=generator).to(device)

    def step():
        timesteps = loss_fn.clusters.sample(args.batch_size, generator=generator, device=device)
        with torch.autocast(device.type, dtype=getattr(torch, args.dtype), enabled=args.dtype != "float32"):
            output = denoiser(loss_fn.levels.add_noise(clean, noise, timesteps), timesteps, labels).sample
        loss = loss_fn(output[:, : clean.shape[1]], clean, noise, timesteps).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    before = peak_bytes(device)
    seconds = seconds_by_turns({name: step}, args.steps, warmup=1, device=device)[name]
    module_parameters = sum(p.numel() for p in denoiser.transformer_blocks[-1].parameters())
    parameters = sum(p.numel() for p in denoiser.parameters())
    balanced = {None: 0, False: parameters, True: module_parameters}[SUBJECTS[name][2]]
    return {
        "parameters": parameters,
        "mean_seconds": round(statistics.mean(seconds), 4),
        "peak_bytes_of_steps": peak_bytes(device) - before,
        "expected_gradient_bytes": 4 * (args.num_clusters + 1) * balanced,
    }


def main():
    args = parse_args()
    # A process that ends after each task, because peaks of memory are of a process's life.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        results = pool.starmap(measure, [(name, args) for name in args.only], chunksize=1)
    report = {
        "command": vars(args),
        **environment(args.device),
        "torchjd": version("torchjd"),
        "balancing": dict(zip(args.only, results, strict=True)),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main)
