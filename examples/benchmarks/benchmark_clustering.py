"""How long interval clustering takes: the exact optimum by cost and number of timesteps. Prints JSON.

python examples/benchmarks/benchmark_clustering.py --num_timesteps 1000 4000 --num_clusters 8 --repeats 9
"""

import argparse
import json
import statistics
from functools import partial

import torch
from diffusers import DDPMScheduler
from measuring import environment, seconds_by_turns

from diffusers_dtr import cluster_timesteps
from diffusers_dtr.ranges import COUNT, WHOLE
from diffusers_dtr.user_errors import run_script


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_timesteps", type=COUNT, nargs="+", default=[1000, 4000], metavar="T")
    parser.add_argument("--num_clusters", type=COUNT, default=8)
    parser.add_argument("--repeats", type=COUNT, default=9, help="Timed runs of each; their median is reported.")
    parser.add_argument("--warmup", type=WHOLE, default=1, help="Untimed runs of each first.")
    parser.add_argument("--num_threads", type=COUNT, default=None, help="Threads; PyTorch's choice by default.")
    return parser.parse_args()


def problems(num_timesteps):
    """The arguments of one clustering by each cost; a linear schedule of any length spans the same noise levels."""
    scheduler = DDPMScheduler(num_timesteps, beta_start=0.1 / num_timesteps, beta_end=20 / num_timesteps)
    affinity = torch.rand(num_timesteps, num_timesteps, generator=torch.Generator().manual_seed(0))
    return {"snr": (scheduler, "snr"), "timestep": (num_timesteps, "timestep"), "affinity": (num_timesteps, affinity)}


def main():
    args = parse_args()
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    results = []
    for num_timesteps in args.num_timesteps:
        runs = {
            name: partial(cluster_timesteps, subject, args.num_clusters, cost)
            for name, (subject, cost) in problems(num_timesteps).items()
        }
        seconds = seconds_by_turns(runs, args.repeats, args.warmup)
        results += [
            {
                "cost": name,
                "num_timesteps": num_timesteps,
                "median_ms": round(1000 * statistics.median(seconds[name]), 3),
                "boundaries": run().boundaries,
            }
            for name, run in runs.items()
        ]
    report = {
        "num_clusters": args.num_clusters,
        "repeats": args.repeats,
        **environment(),
        "results": results,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main)
