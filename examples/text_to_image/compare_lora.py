"""Plain and routed LoRA at equal rank, steps, data and noise, on digits in the negative, over several seeds.

A tiny Stable Diffusion learns the captioned digits; adapters then teach it the same digits with light and dark
exchanged. What is compared is the held-out denoising loss on negatives that were not trained on, on the same noise and
timesteps for all. Every run is the text-to-image script with other flags. A run that is in the file is not repeated.

    python ../digits/prepare_digits.py --output_dir digits
    python ../digits/prepare_text_to_image.py --digits_dir digits --family sd --output_dir digits-sd
    python compare_lora.py --digits_dir digits-sd --output results/routed_lora_digits.json
"""

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageOps
from scipy import stats

from diffusers_dtr.ranges import SEED
from diffusers_dtr.user_errors import run_script


SCRIPT = Path(__file__).resolve().parent / "train_text_to_image.py"
COMMON = (
    "--resolution 16 --center_crop --cache_latents --cache_text_embeddings --proportion_empty_prompts 0.1 "
    "--lr_scheduler cosine --lr_warmup_steps 50 --train_batch_size 64 --num_validation_images 4 "
    "--validation_num_inference_steps 2 --report_to none --checkpointing_steps 100000"
)
BASE = "--max_train_steps 500 --learning_rate 1e-3 --routing_type none --seed 0"
LORA = "--rank 4 --max_train_steps 400 --learning_rate 2e-3"
METHODS = {
    "plain LoRA": "--routing_type none",
    "routed LoRA, beta 0.8": "--route_lora --routing_beta 0.8",
    "routed LoRA, beta 0.5": "--route_lora --routing_beta 0.5",
    "random routing, beta 0.5": "--route_lora --routing_beta 0.5 --routing_type random",
    "LoRA on a routed denoiser, beta 0.8": "--routing_type dtr --routing_beta 0.8",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits_dir", required=True, help="Folder that prepare_text_to_image.py wrote.")
    parser.add_argument("--output", required=True, help="JSON file to write, or to complete.")
    parser.add_argument("--seeds", type=SEED, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parser.parse_args(argv)


def write_negatives(source, target):
    for path in [path for split in ("train", "test") for path in (source / split).rglob("*")]:
        place = target / path.relative_to(source)
        if path.suffix == ".png":
            place.parent.mkdir(parents=True, exist_ok=True)
            ImageOps.invert(Image.open(path).convert("L")).save(place)
        elif path.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def train(folder, data, base, *flags):
    """The record of a run of the training script."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", str(SCRIPT), "--pretrained_model_name_or_path", str(base)]
    command += ["--train_data_dir", str(data / "train"), "--validation_data_dir", str(data / "test")]
    command += [*flags, "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
    return json.loads((folder / "training_config.json").read_text(encoding="utf-8"))


def table(runs):
    """Mean losses, and each method's paired difference to the first with its 95 % interval."""
    losses = {method: {run["seed"]: run["loss"] for run in runs if run["method"] == method} for method in METHODS}
    reference = losses[next(iter(METHODS))]
    rows = ["| method | held-out loss | difference to plain LoRA, 95 % interval |", "| --- | --- | --- |"]
    for method, values in losses.items():
        if not values:
            continue
        mean = sum(values.values()) / len(values)
        differences = [values[seed] - reference[seed] for seed in values.keys() & reference.keys()]
        rows.append(f"| {method} ({len(values)} seeds) | {mean:.5f} | {interval(differences)} |")
    return "\n".join(rows)


def interval(differences):
    if len(differences) < 2 or not any(differences):
        return ""
    mean, count = sum(differences) / len(differences), len(differences)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in differences) / (count - 1))
    half = stats.t.ppf(0.975, count - 1) * deviation / math.sqrt(count)
    return f"{mean:+.5f} ± {half:.5f}"


def main(args):
    digits, output = Path(args.digits_dir), Path(args.output)
    report = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"runs": []}
    base, negatives = digits / "base", digits / "negatives"
    if not (base / "model_index.json").exists():
        train(base, digits, digits / "pipeline", *shlex.split(f"{COMMON} {BASE}"))
    write_negatives(digits, negatives)
    for seed in args.seeds:
        for method in args.methods:
            if any((run["method"], run["seed"]) == (method, seed) for run in report["runs"]):
                continue
            flags = shlex.split(f"{COMMON} {LORA} {METHODS[method]} --seed {seed}")
            folder = digits / "runs" / f"{list(METHODS).index(method)}-{seed}"
            record = train(folder, negatives, base, *flags)
            loss = record["results"]["validation_loss"]
            shown = shlex.join(["accelerate", "launch", SCRIPT.name, *flags])
            entry = {"method": method, "seed": seed, "loss": loss, "flags": shown, "versions": record["versions"]}
            report["runs"].append(entry)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"{method}, seed {seed}: held-out loss {loss:.5f}", flush=True)
    print(table(report["runs"]))


if __name__ == "__main__":
    run_script(main, parse_args())
