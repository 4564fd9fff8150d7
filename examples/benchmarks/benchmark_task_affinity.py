"""What sketched task affinity costs beyond the backward passes that it needs: time and peak memory.

For a few numbers of timesteps, bare passes (forward, loss, backward over the whole batch, one per timestep) and a
whole measurement by TaskAffinity take turns in one process. The slope of each over the number of timesteps is the time
per timestep; what is left is what a measurement costs once. Peak memory is of resident pages, each number from a
process of its own. It is compared with that of bare passes over a quarter of the batch at a time, as TaskAffinity does
them. The last stage, the inner products of all sketches, is measured by itself at 1000 timesteps. Prints JSON.

    python examples/benchmarks/benchmark_task_affinity.py --batch_size 16 32 64 --repeats 5
"""

import argparse
import json
import multiprocessing
from functools import partial

import torch
from diffusers import DDPMScheduler
from measuring import CLOCKS, compare, environment, fill_weights, seconds_by_turns
from measuring import peak_bytes as current_peak

from diffusers_dtr import DenoisingLoss, DTRTransformer2DModel, TaskAffinity
from diffusers_dtr.analysis import gram
from diffusers_dtr.ranges import COUNT, Range
from diffusers_dtr.user_errors import run_script


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="DiT-S/4", help="A size that DTRTransformer2DModel.from_preset knows.")
    parser.add_argument("--batch_size", type=COUNT, nargs="+", default=[64], help="Images; multiples of 4.")
    parser.add_argument(
        "--num_timesteps", type=Range("[2, inf)", int), nargs="+", default=[2, 4], help="At least two numbers."
    )
    parser.add_argument("--sketch_size", type=Range("[1, 2^30]", int), default=8192)
    parser.add_argument("--repeats", type=COUNT, default=3, help="Timed runs of each; medians are reported.")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="Processor time is the steadier one on a CPU that others use."
    )
    return parser.parse_args()


class Subject:
    """A model and a batch of images, and both things that are done with them."""

    def __init__(self, args, batch_size):
        torch.manual_seed(0)
        self.model = DTRTransformer2DModel.from_preset(args.preset).eval()
        fill_weights(self.model)
        self.loss_fn = DenoisingLoss(DDPMScheduler())
        config = self.model.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        self.clean, self.noise = torch.randn(2, *shape)
        self.labels = torch.randint(config.num_embeds_ada_norm, (batch_size,))
        self.sketch_size = args.sketch_size

    def bare(self, num_timesteps, num_parts=1):
        """The least that gradients at so many timesteps take, over equal parts of the batch one after the other."""
        for timestep in torch.linspace(0, 999, num_timesteps).long():
            for clean, noise, labels in zip(
                *(values.chunk(num_parts) for values in (self.clean, self.noise, self.labels)), strict=True
            ):
                timesteps = timestep.expand(len(clean))
                noisy = self.loss_fn.levels.add_noise(clean, noise, timesteps)
                output = self.model(noisy, timesteps, labels).sample
                self.loss_fn(output, clean, noise, timesteps).loss.backward()
            self.model.zero_grad()

    def bare_in_quarters(self, num_timesteps):
        """The same passes with the activations of a quarter of the batch at a time."""
        self.bare(num_timesteps, num_parts=4)

    def affinity(self, num_timesteps):
        """The whole measurement."""
        TaskAffinity.measure(
            self.model,
            self.loss_fn,
            self.clean,
            self.noise,
            {"class_labels": self.labels},
            timesteps=num_timesteps,
            estimator="plain",
            sketch_size=self.sketch_size,
        )


def turns(args, batch_size):
    """Seconds of both, by number of timesteps, and their ratios."""
    subject = Subject(args, batch_size)
    subject.bare(1)
    return {
        n: compare([seconds_by_turns(runs, args.repeats, warmup=0, clock=CLOCKS[args.clock])])
        for n in args.num_timesteps
        for runs in [{"affinity": partial(subject.affinity, n), "bare": partial(subject.bare, n)}]
    }


def peak_bytes(args, batch_size, kind, num_timesteps):
    """Of a process that does nothing else."""
    getattr(Subject(args, batch_size), kind)(num_timesteps)
    return current_peak()


def peak_bytes_of_inner_products(args, num_timesteps):
    features = torch.ones(4, num_timesteps, args.sketch_size)
    before = current_peak()
    gram(features)
    return current_peak() - before + features.nbytes


def slope(points):
    """Least squares: change per timestep."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points.items(), strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def measure(args, batch_size, pool):
    by_number = pool.apply(turns, (args, batch_size))
    medians = {n: found["median_seconds"] for n, found in by_number.items()}
    slopes = {kind: slope({n: seconds[kind] for n, seconds in medians.items()}) for kind in ("affinity", "bare")}
    fewest, most = min(args.num_timesteps), max(args.num_timesteps)
    bare = pool.apply(peak_bytes, (args, batch_size, "bare_in_quarters", fewest))
    peaks = {n: pool.apply(peak_bytes, (args, batch_size, "affinity", n)) for n in (fewest, most)}
    return {
        "by_number_of_timesteps": by_number,
        "seconds_per_further_timestep": {kind: round(value, 4) for kind, value in slopes.items()},
        "extra_peak_bytes": {n: peak - bare for n, peak in peaks.items()},
    }


def main():
    args = parse_args()
    # A process that ends after each task, because peaks of memory are of a process's life.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        report = {
            "command": vars(args),
            **environment(),
            "batch_size": {size: measure(args, size, pool) for size in args.batch_size},
            "extra_peak_bytes_of_inner_products_of_1000_timesteps": pool.apply(
                peak_bytes_of_inner_products, (args, 1000)
            ),
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main)
