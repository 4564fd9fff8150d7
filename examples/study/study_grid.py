"""The cells of a study, from its settings file: tasks, arms and seeds, in the order in which they are run."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Cell:
    """One run: a task, what is changed in it, and the seed of its weights, data order and noise."""

    task: str
    arm: str
    seed: int

    def path(self, results):
        """Where its result is."""
        return Path(results) / self.task / self.arm / f"seed-{self.seed}.json"


def read_result(study, cell, folder):
    """The result of a cell, or None if there is none yet; a ValueError for one of other settings, or no whole file."""
    path = cell.path(folder)
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a result of run_study.py: remove it, or give another folder.") from error
    if result.get("settings") != cell_settings(study, cell):
        raise ValueError(f"{path} has a result of other settings: give another folder, or the file of its settings.")
    return result


def read_study(path):
    """Settings: `tasks` and `arms` by name, the `order` of the grid, the `claims` that it is about, and `advice`."""
    study = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for name, task in study["tasks"].items():
        steps, points = task["training"]["max_train_steps"], task["measure"]["points"]
        if steps % points:
            raise ValueError(f"`max_train_steps` of {name} must be a multiple of its {points} points, got {steps}.")
    for entry in study["order"]:
        unknown = sorted({entry["task"]} - study["tasks"].keys() | {*entry["arms"]} - study["arms"].keys())
        if unknown:
            raise ValueError(f"`order` of {path} must have tasks and arms of the file, got {', '.join(unknown)}.")
    return study


def cells(study):
    """All cells, best first: within an entry, all arms of a seed before the next seed."""
    every = [
        Cell(entry["task"], arm, seed) for entry in study["order"] for seed in entry["seeds"] for arm in entry["arms"]
    ]
    return list(dict.fromkeys(every))  # an entry may name an arm again, beside what it is compared with


def cell_settings(study, cell):
    """All that a cell's result depends on but for its seed, with the flags' names for folders."""
    task, arm = study["tasks"][cell.task], study["arms"][cell.arm]
    options = {name: value for name, value in arm.items() if name not in ("against", "model")}
    return {
        "denoiser": task["denoiser"],
        "model": {**task["model"], **arm.get("model", {})},
        "training": {**task["training"], **options},
        "measure": task["measure"],
    }
