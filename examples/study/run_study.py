"""Run the cells of a study that are not finished yet, in order: each trains a model and measures it along the way.

A finished cell is a JSON file; repeat the command to go on after an interruption. Cells of data that no flag names are
left out. `make_report.py` makes tables and figures of whatever is there.

    python ../digits/prepare_digits.py --output_dir digits
    python run_study.py --digits digits --jobs 2
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import torch
from study_cell import check_options, check_task, run_cell
from study_grid import cell_settings, cells, read_result, read_study

from diffusers_dtr.ranges import COUNT, SEED
from diffusers_dtr.user_errors import run_script


HERE = Path(__file__).resolve().parent
DATA = {
    "digits": "Folder of prepare_digits.py.",
    "cifar10": "CIFAR-10: a name or folder for load_dataset with the columns image and label.",
    "cifar10_features": "TorchScript file of ../evaluation/train_feature_extractor.py. Default %(default)s.",
}
DEFAULTS = {"cifar10_features": HERE / "cifar10-features.pt"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=HERE / "study.yaml", help="YAML file of the study. Default %(default)s.")
    parser.add_argument("--output_dir", default=HERE / "results", help="Folder of the results. Default %(default)s.")
    for name, text in DATA.items():
        parser.add_argument(f"--{name}", default=DEFAULTS.get(name), help=text)
    parser.add_argument("--tasks", nargs="+", help="Only cells of these tasks.")
    parser.add_argument("--arms", nargs="+", help="Only cells of these arms.")
    parser.add_argument("--seeds", type=SEED, nargs="+", help="Only cells of these seeds.")
    parser.add_argument("--pipelines_dir", help="Keep the trained pipelines and their cards in this folder.")
    parser.add_argument("--jobs", type=COUNT, default=1, help="Cells at a time, of one thread each.")
    return parser.parse_args(argv)


def chosen_cells(args, study):
    """Cells that the flags ask for, and how to name them."""
    chosen = cells(study)
    for name in ("task", "arm", "seed"):
        wanted, there = getattr(args, f"{name}s"), {getattr(cell, name) for cell in cells(study)}
        if wanted is not None:
            if not there.issuperset(wanted):
                raise ValueError(f"`--{name}s` must be of {sorted(there)}, got {wanted}.")
            chosen = [cell for cell in chosen if getattr(cell, name) in wanted]
    return chosen


def missing_flags(args, study, cell):
    text = json.dumps(cell_settings(study, cell))
    return [f"--{name}" for name in DATA if f"{{{name}}}" in text and getattr(args, name) is None]


def run(path, *job):
    torch.set_num_threads(1)
    result = run_cell(*job)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)  # an interruption leaves no half of a file
    return result


def in_own_process(*job):
    """As `run`: accelerate keeps state for the whole process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *job).result()


def main(args):
    study = read_study(args.settings)
    folders = {name: getattr(args, name) for name in DATA}
    jobs, left_out, networks = {}, {}, {}
    chosen = chosen_cells(args, study)
    for cell in chosen:
        path, settings = cell.path(args.output_dir), cell_settings(study, cell)
        result = read_result(study, cell, args.output_dir)
        if result is not None:
            networks.setdefault(cell.task, set()).add(result.get("features"))
            continue
        if flags := missing_flags(args, study, cell):
            left_out.setdefault(f"{cell.task} for want of {' and '.join(flags)}", []).append(cell)
        else:
            kept = None if args.pipelines_dir is None else cell.path(args.pipelines_dir).with_suffix("")
            if kept is not None and kept.exists():
                raise ValueError(f"`--pipelines_dir` must not have what is to be run again: remove {kept}.")
            jobs[cell] = path, settings, cell.seed, folders, kept
    print(f"{len(chosen)} cells, of which {len(jobs)} are to be run", flush=True)
    for reason, those in left_out.items():
        print(f"{len(those)} are left out: {reason}", flush=True)
    for _, settings, _, _, _ in jobs.values():
        check_options(settings, folders)
    for cell, (_, settings, _, _, _) in {cell.task: (cell, job) for cell, job in jobs.items()}.values():
        network, others = check_task(settings, folders), networks.get(cell.task, set())
        if network is not None and others - {network}:
            raise ValueError(
                f"`--cifar10_features` must be the network of the results of {cell.task} in {args.output_dir}, "
                f"{', '.join(map(str, others))}, got {network}: give that one, or another --output_dir."
            )
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            runs = {cell: pool.submit(in_own_process, *job) for cell, job in jobs.items()}
            for number, (cell, future) in enumerate(runs.items(), start=1):
                try:
                    text = summary(cell, future.result())
                except (ValueError, OSError, FloatingPointError) as error:  # the others may well be fine
                    failed.append(cell)
                    text = f"{cell.task}, {cell.arm}, seed {cell.seed} failed: {error}"
                print(f"{number} of {len(runs)}: {text}", flush=True)
        finally:
            # After another error or Ctrl-C, nothing more is begun.
            pool.shutdown(cancel_futures=True)
    if failed:
        names = "; ".join(f"{cell.task}, {cell.arm}, seed {cell.seed}" for cell in failed)
        raise ValueError(f"{len(failed)} of {len(runs)} cells failed, as was said above: {names}.")


def summary(cell, result):
    last, seconds = result["points"][-1], result["processor_seconds"]
    metrics = f"held-out loss {last['loss']:.5f}, Fréchet distance {last['frechet_distance']:.3f}"
    return f"{cell.task}, {cell.arm}, seed {cell.seed}: {metrics}, {seconds} s of a processor"


if __name__ == "__main__":
    run_script(main, parse_args())
