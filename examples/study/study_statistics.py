"""Paired statistics of finished cells: runs of the same seed, data order and noise are compared with each other."""

from dataclasses import dataclass

import torch
from study_grid import cells, read_result

from diffusers_dtr.analysis import confidence_interval


# From three values on an interval says something.
MIN_SEEDS = 3
# In what two runs must agree to be compared. Features that a function makes have no hash.
AGREE = ("seed", "num_parameters", "first_batch", "initial_weights", "features")


def read_results(study, folder):
    """Finished cells: for every task and arm, the results by seed.

    Raises:
        ValueError: For results of other settings than the study's, or by features of several networks.
    """
    results, networks = {}, {}
    for cell in cells(study):
        result = read_result(study, cell, folder)
        if result is not None:
            results.setdefault((cell.task, cell.arm), {})[cell.seed] = result
            networks.setdefault(cell.task, {})[result.get("features")] = cell.path(folder)
    for task, paths in networks.items():
        if len(paths) > 1:
            some = " and ".join(str(path) for path in list(paths.values())[:2])
            raise ValueError(f"The results of {task} must be by features of one network: {some} are by several.")
    return results


@dataclass(frozen=True)
class Difference:
    """Of a metric that is the better the lower, between an arm and what it is compared with.

    A run of the arm that never gets there has None.
    """

    arm: list[float | None]
    reference: list[float]

    @property
    def values(self):
        """By seed, which is negative where the arm is better."""
        return [one - other for one, other in zip(self.arm, self.reference, strict=True)]

    def interval(self):
        """Mean, and ends of the 95 % interval by Student's t; None of fewer than two seeds."""
        if len(self.arm) < 2:
            return None
        return tuple(end.item() for end in confidence_interval(torch.tensor(self.values, dtype=torch.float64)))

    def verdict(self, expected):
        """Whether the arm's values are `lower` or `higher`, as is expected."""
        if len(self.arm) < MIN_SEEDS:
            return f"{len(self.arm)} of the {MIN_SEEDS} seeds of a verdict"
        if None in self.arm:
            return "does not hold" if set(self.arm) == {None} else "cannot be told at this scale"
        _, low, high = self.interval()
        if low <= 0 <= high:
            return "cannot be told at this scale"
        return "holds" if (high < 0) == (expected == "lower") else "does not hold"


def value_of(run, metric, point=-1):
    """A metric of a run, by default at its end: by name, or by number the loss of an eighth of the timesteps."""
    values = run["points"][point]
    return values["loss_per_eighth"][metric] if isinstance(metric, int) else values[metric]


def difference(results, task, arm, reference, metric, point=-1):
    """Between two arms of a task, over the seeds that both have."""
    runs = _pairs(results, task, arm, reference)
    return Difference(*([value_of(run, metric, point) for run in each] for each in runs))


def share_of_steps(results, task, arm, reference, metric):
    """By seed, after which share of its steps an arm is as good as its reference in the end; None: never."""
    shares = []
    for run, other in zip(*_pairs(results, task, arm, reference), strict=True):
        reached = first_step_at(run["points"], metric, other["points"][-1][metric])
        shares.append(reached and reached / other["points"][-1]["step"])
    return shares


def first_step_at(points, metric, target):
    """The step at which a metric comes down to a target, between points on a straight line; None: never."""
    before = None
    for point in points:
        if point[metric] <= target:
            if before is None:
                return float(point["step"])
            part = (before[metric] - target) / (before[metric] - point[metric])
            return before["step"] + part * (point["step"] - before["step"])
        before = point
    return None


def _pairs(results, task, arm, reference):
    """Runs of both by seed, which are checked to differ in nothing but what the arms are about."""
    mine, others = results.get((task, arm), {}), results.get((task, reference), {})
    seeds = sorted(mine.keys() & others.keys())
    for one, other in ((mine[seed], others[seed]) for seed in seeds):
        steps = [[point["step"] for point in run["points"]] for run in (one, other)]
        wrong = [name for name in AGREE if one.get(name) != other.get(name)]
        if wrong or steps[0] != steps[1]:
            raise ValueError(f"{arm} and {reference} of {task} differ in {', '.join(wrong) or 'steps'}.")
    return [mine[seed] for seed in seeds], [others[seed] for seed in seeds]
