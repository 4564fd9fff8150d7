r"""Measure what training on all timesteps at once costs each cluster of them: negative transfer (ANT, observation O2).

Trains, with the same budget and for every seed, joint models on all timesteps (plain; with clusters balanced by
uncertainty; routed) and one plain specialist per cluster on that cluster's timesteps alone. The gap of a cluster is a
metric where its timesteps are left to the specialist, less that of the joint model: below zero there is negative
transfer. Metrics are the held-out denoising loss in the cluster and, with a feature extractor, the Fréchet distance of
samples to the training images. Writes a JSON file, a picture beside it, and prints tables.

What follows `--` are flags of train_class_conditional.py, or with `--script unconditional` of train_unconditional.py,
the same for all runs. Finished runs are kept in the work folder and interrupted ones gone on with: repeat the command
until it is done.

    python measure_negative_transfer.py --work_dir runs --output results/digits.json --seeds 0 1 2 \
      -- --train_data_dir digits/train --validation_data_dir digits/test --num_clusters 4 --max_train_steps 400 ...
"""

import argparse
import json
import runpy
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name

import torch
from accelerate import Accelerator
from negative_transfer_report import Report

from diffusers_dtr import DenoisingLoss, DTRPipeline, TimestepClusters, training
from diffusers_dtr.analysis import HeldOutClusterLosses, frechet_distance
from diffusers_dtr.ranges import COUNT, NON_NEGATIVE, SEED, Range
from diffusers_dtr.run_record import RECORD_FILE, public_command, publishable
from diffusers_dtr.training.data import build_loader, held_out_samples
from diffusers_dtr.user_errors import run_script


EXAMPLES = Path(__file__).resolve().parent.parent
SCRIPTS = {name: EXAMPLES / name / f"train_{name}.py" for name in ("class_conditional", "unconditional")}

# A specialist cannot sample by itself, and nobody looks at the others' grids. The flags that are given win over these.
QUICK = "--num_validation_images 1 --validation_num_inference_steps 1 --checkpoints_total_limit 1 --report_to none"
UNROUTED = ["--routing_type", "none"]
JOINT_MODELS = {
    "plain": UNROUTED,
    "clustered": [*UNROUTED, "--balancing", "uncertainty"],
    "routed": ["--routing_type", "dtr"],
}
# What runs differ in
RESERVED = ("seed", "output_dir", "resume_from_checkpoint", "train_cluster", "balancing", "timestep_sampling")
RESERVED += ("routing_type", "push_to_hub")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--script", choices=SCRIPTS, default="class_conditional", help="Which models to train. Default %(default)s.")
    add("--work_dir", required=True, help="Folder of the training runs.")
    add("--output", required=True, help="JSON file to write, or to complete. The picture lies beside it, as PNG.")
    add("--seeds", type=SEED, nargs="+", default=[0, 1, 2], help="At least two, for an interval.")
    add("--train_joint", choices=JOINT_MODELS, nargs="*", default=list(JOINT_MODELS), help="Joint models to train.")
    add(
        "--joint",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "PATH"),
        help="A joint model that is there already: a pipeline. {seed} in its path stands for the seed.",
    )
    add(
        "--specialists",
        metavar="PATH",
        help="Specialists that are there already: runs with --train_cluster. {seed} and {cluster} stand for both.",
    )
    add("--jobs", type=COUNT, default=1, help="Training runs at a time.")
    add("--num_loss_samples", type=COUNT, default=2048, help="Samples of the held-out loss of each cluster.")
    add(
        "--feature_extractor",
        help="TorchScript file, or function `module:name`, from images (n, channels, height, width) in [0, 1] to "
        "features (n, d). Without it there are no Fréchet distances.",
    )
    add("--num_samples", type=Range("[2, inf)", int), default=1000, help="Images drawn for each Fréchet distance.")
    add("--num_inference_steps", type=COUNT, default=50)
    add("--guidance_scale", type=NON_NEGATIVE, default=1.0)
    add("--batch_size", type=COUNT, default=256, help="Samples per forward call while measuring.")
    add("training_flags", nargs="+", metavar="FLAG", help="After `--`: flags of the training script.")
    args = parser.parse_args(argv)
    if args.script == "unconditional" and args.guidance_scale > 1:
        parser.error("--guidance_scale needs classes, which unconditional models do not have")
    script = runpy.run_path(str(SCRIPTS[args.script]))
    args.training = script["parse_args"]([*args.training_flags, "--output_dir", args.work_dir])
    given = {flag.partition("=")[0].removeprefix("--") for flag in args.training_flags if flag.startswith("--")}
    if given & {*RESERVED}:
        parser.error(f"this script sets --{' and --'.join(sorted(given & {*RESERVED}))} itself")
    if args.training.data.validation_split is None and args.training.data.validation_data_dir is None:
        parser.error("the held-out loss needs --validation_split or --validation_data_dir among the training flags")
    data = args.training.data
    if args.feature_extractor is not None and (data.latents_dir is not None or data.streaming):
        parser.error("--feature_extractor needs images to choose from, not --latents_dir or --streaming")
    if len({*args.seeds}) < 2:
        parser.error("--seeds must be at least two, from whose spread the intervals come")
    args.names = [*args.train_joint, *(name for name, _ in args.joint)]
    if len({*args.names}) < len(args.names) or not args.names:
        parser.error(f"--train_joint and --joint must name at least one joint model, and each once, got {args.names}")
    return args


# 1. Training


def train_all(args):
    """Folders of all runs, by seed and number of the cluster or name of the joint model."""
    work_dir = Path(args.work_dir)
    flags_file = work_dir / "training_flags.json"
    flags = [SCRIPTS[args.script].name, *args.training_flags]
    if flags_file.exists() and json.loads(flags_file.read_text(encoding="utf-8")) != flags:
        raise ValueError(f"`--work_dir` has runs with other training flags, see {flags_file}: choose another folder.")
    work_dir.mkdir(parents=True, exist_ok=True)
    flags_file.write_text(json.dumps(flags), encoding="utf-8")

    runs, jobs = {}, {}
    for seed in args.seeds:
        for cluster in range(args.training.objective.num_clusters):
            if args.specialists is not None:
                runs[seed, cluster] = Path(args.specialists.format(seed=seed, cluster=cluster))
            else:
                runs[seed, cluster] = work_dir / f"seed-{seed}" / f"cluster-{cluster}"
                jobs[seed, cluster] = [*UNROUTED, "--train_cluster", str(cluster)]
        for name in args.train_joint:
            runs[seed, name] = work_dir / f"seed-{seed}" / name
            jobs[seed, name] = JOINT_MODELS[name]
        for name, path in args.joint:
            runs[seed, name] = Path(path.format(seed=seed))
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(lambda key: train(args, runs[key], [*jobs[key], "--seed", str(key[0])]), jobs):
            pass  # an error of a run is raised here
    return runs


def train(args, folder, flags):
    if (folder / RECORD_FILE).exists():  # a run writes it last
        return
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += [str(SCRIPTS[args.script]), *QUICK.split(), *args.training_flags, *flags]
    command += ["--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        sys.stderr.write(log.read_text(encoding="utf-8", errors="replace")[-2000:])
        raise ChildProcessError(f"{shlex.join(command)} failed. Above is the end of {log}.")
    print(f"Trained {folder}", flush=True)


def read_clusters(args, runs):
    """The clusters that the specialists were trained on, which they must agree about."""
    configs = []
    for seed in args.seeds:
        for cluster in range(args.training.objective.num_clusters):
            record = json.loads((runs[seed, cluster] / RECORD_FILE).read_text(encoding="utf-8"))
            configs.append(record["clusters"])
            if record["arguments"]["train_cluster"] != cluster or configs[0] != configs[-1]:
                raise ValueError(f"{runs[seed, cluster]} must be of cluster {cluster} of {configs[0]}.")
    keys = ("boundaries", "timesteps")
    clusters = TimestepClusters.from_dict({key: configs[0][key] for key in keys if key in configs[0]})
    if len(clusters) != args.training.objective.num_clusters:
        raise ValueError(f"`--num_clusters` must be the specialists', {len(clusters)}.")
    return clusters


# 2. Measuring


class SwitchedPipeline(DTRPipeline):
    """Samples with a specialist in the steps of its cluster, and with the joint model in all others."""

    def switch(self, specialist, clusters, cluster):
        """Say which model takes which steps."""
        self.specialist, self.clusters, self.cluster = specialist, clusters, cluster

    def predict(self, model_input, timestep, *arguments):
        """As the one or the other pipeline predicts."""
        inside = self.clusters.assign(timestep.reshape(1)).item() == self.cluster
        return (self.specialist if inside else super()).predict(model_input, timestep, *arguments)


class Measurement:
    """What all models are measured on: held-out samples, and features of the training images."""

    def __init__(self, args, clusters, pipeline):
        self.args, self.clusters = args, clusters
        self.accelerator = Accelerator()
        config = args.training.replace(cache_latents=False)
        data = training.load_data(config, model=pipeline.denoiser, vae=pipeline.vae)
        num_images, batch_size = config.validation.max_held_out_images, config.run.train_batch_size
        clean, batch = held_out_samples(data.held_out, data.vae, num_images, batch_size, torch.device("cpu"))
        self.losses = HeldOutClusterLosses(
            DenoisingLoss(pipeline.scheduler),
            clusters,
            clean,
            {} if pipeline.num_classes is None else {"class_labels": batch["labels"]},
            num_samples=args.num_loss_samples,
            batch_size=args.batch_size,
        )
        if args.feature_extractor is not None:
            self.extract = load_extractor(args.feature_extractor, self.accelerator.device)
            self.real_features = self._features(self._training_images(config, data.dataset))

    def of_seed(self, seed, runs, names):
        """Yield all metrics of a seed's joint models, and of what its specialists make of them."""
        specialists = [self._load(runs[seed, cluster]) for cluster in range(len(self.clusters))]
        theirs = [self.losses(specialist.denoiser, cluster) for cluster, specialist in enumerate(specialists)]
        for name in names:
            joint = self._load(runs[seed, name])
            own = [self.losses(joint.denoiser, cluster) for cluster in range(len(self.clusters))]
            differences = [one - other for one, other in zip(theirs, own, strict=True)]
            loss = {
                "joint": [losses.mean().item() for losses in own],
                "specialist": [losses.mean().item() for losses in theirs],
                # Of the mean difference, for other held-out samples of the same two models
                "standard_error": [(values.std() / len(values) ** 0.5).item() for values in differences],
            }
            entry = {"seed": seed, "joint": name, "loss": loss}
            if self.args.feature_extractor is not None:
                entry["frechet_distance"] = self._distances(joint, specialists, seed)
            yield entry

    def _load(self, folder):
        return DTRPipeline.from_pretrained(folder).to(self.accelerator.device)

    def _distances(self, joint, specialists, seed):
        switched = SwitchedPipeline(**joint.components)
        distances = []
        for cluster, specialist in enumerate(specialists):
            switched.switch(specialist, self.clusters, cluster)
            distances.append(self._distance(switched, seed))
        return {"joint": [self._distance(joint, seed)], "specialist": distances}

    def _distance(self, pipeline, seed):
        """From samples to the training images. All of a seed begin with the same noise, and add the same."""
        pipeline.set_progress_bar_config(disable=True)
        labels = {"num_images": self.args.num_samples}
        if pipeline.num_classes is not None:
            labels = {"class_labels": [number % pipeline.num_classes for number in range(self.args.num_samples)]}
        samples = pipeline(
            **labels,
            guidance_scale=self.args.guidance_scale,
            num_inference_steps=self.args.num_inference_steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            max_batch_size=self.args.batch_size,
        ).images
        return frechet_distance(self._features(samples), self.real_features)

    @torch.no_grad()
    def _features(self, images):
        batches = images.to(self.accelerator.device).split(self.args.batch_size)
        return torch.cat([self.extract(batch).cpu() for batch in batches])

    def _training_images(self, config, dataset):
        """In [0, 1], cropped and mirrored as in the first epoch of training."""
        loader = build_loader(config, dataset, self.accelerator, 0)
        batches = islice(loader, -(-len(dataset) // config.run.train_batch_size))
        return torch.cat([batch["pixel_values"] for batch in batches])[: len(dataset)] / 2 + 0.5


def load_extractor(name, device):
    return torch.jit.load(name, map_location=device).eval() if Path(name).is_file() else resolve_name(name)


# 3. Both, and a report


def settings(args):
    names = ("num_loss_samples", "feature_extractor", "num_samples", "num_inference_steps", "guidance_scale")
    training_flags = public_command([SCRIPTS[args.script].name, *args.training_flags])
    return {"training": training_flags, **publishable({name: getattr(args, name) for name in names})}


def main(args):
    report = Report(Path(args.output), settings(args))
    if args.feature_extractor is not None:
        load_extractor(args.feature_extractor, "cpu")  # one that is not there shows before hours of training
    runs = train_all(args)
    clusters = read_clusters(args, runs)
    report.describe(public_command(sys.argv, launcher=["python"]), clusters, [runs[key] / RECORD_FILE for key in runs])

    todo = {seed: [name for name in args.names if not report.has(seed, name)] for seed in args.seeds}
    if any(todo.values()):
        measurement = Measurement(args, clusters, DTRPipeline.from_pretrained(runs[args.seeds[0], args.names[0]]))
        for seed, names in todo.items():
            for entry in measurement.of_seed(seed, runs, names) if names else ():
                report.add(entry)
                print(f"Measured {entry['joint']} of seed {seed}", flush=True)
    report.finish(args.seeds, args.names)
    print(report.tables(args.names))


if __name__ == "__main__":
    run_script(main, parse_args())
