"""Train the same small model with different balancings of the timestep clusters, over several seeds, and compare.

Every run is the class-conditional training script with other flags; nothing else differs between two runs of a seed.
What is compared is the held-out denoising loss in every eighth of the timesteps, on the same images, noise and
timesteps for all runs. Writes one JSON file with the commands and all results, and prints a table. A run that is
already in the file is not repeated.

    python compare_balancing.py --task digits --data digits --output results/digits.json
    python compare_balancing.py --task cifar10 --data path/or/name/of/cifar10 --output results/cifar10.json
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffusers_dtr.ranges import COUNT, SEED
from diffusers_dtr.run_record import RECORD_FILE
from diffusers_dtr.user_errors import run_script


SCRIPT = Path(__file__).resolve().parent.parent / "class_conditional" / "train_class_conditional.py"

# What all runs of a task share. Clusters are the eighths that the held-out loss is reported for.
COMMON = (
    "--num_clusters 8 --cluster_cost uniform --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 50 "
    "--use_ema --ema_max_decay 0.995 --num_validation_images 10 --validation_num_inference_steps 2 "
    "--checkpointing_steps 100000 --logging_steps 50 --report_to none"
)
TASKS = {
    "digits": (
        "--train_data_dir {data}/train --validation_data_dir {data}/test --resolution 8 --center_crop "
        "--train_batch_size 64 --max_train_steps 600 --model_config "
        '\'{"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 1, "patch_size": 2}\''
    ),
    "cifar10": (
        "--dataset_name {data} --validation_split test --resolution 32 --random_flip "
        "--train_batch_size 32 --max_train_steps 600 --model_config "
        '\'{"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 3, "patch_size": 4}\''
    ),
}
METHODS = {
    "plain": "--balancing uniform",
    "min-SNR": "--balancing uniform --loss_weighting min_snr",
    "uncertainty": "--balancing uncertainty",
    "PCGrad": "--balancing pcgrad --balancing_update_every 5",
    "NashMTL": "--balancing nash_mtl --balancing_update_every 5",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", required=True, help="Folder of prepare_digits.py, or a CIFAR-10 for load_dataset.")
    parser.add_argument("--output", required=True, help="JSON file to write, or to complete.")
    parser.add_argument("--seeds", type=SEED, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=COUNT, default=1, help="Runs at a time, of one thread each.")
    return parser.parse_args(argv)


def run(args, method, seed):
    flags = shlex.split(f"{TASKS[args.task]} {COMMON} {METHODS[method]} --seed {seed}")
    flags = [flag.replace("{data}", args.data) for flag in flags]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"]
        command += ["--num_cpu_threads_per_process", "1", str(SCRIPT), *flags, "--output_dir", f"{folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode != 0:
            sys.stderr.write(done.stderr)
            raise ChildProcessError(f"{method}, seed {seed}, failed: {shlex.join(command)}")
        record = json.loads(Path(folder, "run", RECORD_FILE).read_text(encoding="utf-8"))
    results = record["results"]
    shown = [flag.replace(args.data, "DATA") for flag in flags]
    return {
        "method": method,
        "seed": seed,
        "command": shlex.join(["accelerate", "launch", SCRIPT.name, *shown]),
        "seconds": record["seconds"],
        "loss": results["validation_loss"],
        "per_eighth": [results[f"validation_loss/eighth_{number}"] for number in range(8)],
        "versions": record["versions"],
    }


def table(runs):
    rows = ["| method | mean | " + " | ".join(f"eighth {number}" for number in range(1, 9)) + " | seconds |"]
    rows.append("| --- " * 11 + "|")
    for method in METHODS:
        mine = [entry for entry in runs if entry["method"] == method]
        if not mine:
            continue
        columns = zip(*([entry["loss"], *entry["per_eighth"]] for entry in mine), strict=True)
        cells = [spread(column) for column in columns]
        seconds = round(statistics.median(entry["seconds"] for entry in mine))
        rows.append(f"| {method} ({len(mine)} seeds) | " + " | ".join(cells) + f" | {seconds} |")
    return "\n".join(rows)


def spread(values):
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def main(args):
    output = Path(args.output)
    report = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"task": args.task, "runs": []}
    if report["task"] != args.task:
        raise ValueError(f"`--output` must be a file of its own for each task, got one with runs of {report['task']}.")
    runs = report["runs"]
    done = {(entry["method"], entry["seed"]) for entry in runs}
    todo = [(method, seed) for seed in args.seeds for method in args.methods if (method, seed) not in done]
    output.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for entry in pool.map(lambda job: run(args, *job), todo):
            runs.append(entry)
            report = {"task": args.task, "machine": platform.machine(), "jobs": args.jobs, "runs": runs}
            partial = output.with_name(f"{output.name}.partial")
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            partial.replace(output)  # an interruption leaves the old file or the new one
            print(f"{entry['method']}, seed {entry['seed']}: held-out loss {entry['loss']:.5f}", flush=True)
    print(table(runs))


if __name__ == "__main__":
    run_script(main, parse_args())
