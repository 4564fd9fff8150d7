"""Write what a study has found so far, from the JSON files of its finished cells alone: claims, tables and pictures.

python make_report.py
"""

import argparse
import os
import re
import statistics
from pathlib import Path

from study_figures import METRICS, draw_differences, draw_quality, draw_samples
from study_grid import cells, read_study
from study_statistics import MIN_SEEDS, Difference, difference, read_results, share_of_steps, value_of

from diffusers_dtr.user_errors import run_script


HERE = Path(__file__).resolve().parent
LINK = re.compile(r"\]\((?!https?:)([^)]+)\)")  # of Markdown, to a file
INTRODUCTION = """# What routing and balancing did

Written by `python make_report.py` from the JSON files in [results]({results}), which `run_study.py` makes
([README](README.md)); what is compared is said in [study.yaml](study.yaml). Both metrics are of the averaged weights,
and the better the lower: the held-out loss is the mean squared error of the prediction over all timesteps, the Fréchet
distance is that of samples to training images in the features of a small classifier. Differences are paired: arms of
one seed have the same number of parameters, initial weights, data order and noise. A value beside a difference, and a
line in a picture, is a mean over the seeds that both arms, or all drawn ones, have; in the tables of arms it is one
over all seeds of the arm. The 95 % intervals of differences are Student's t over seeds; a verdict takes at least
{min_seeds} seeds, and an interval without zero. Of many such intervals one in twenty misses the truth. These are small
models on small images: what does not show here may show at the papers' sizes, and the other way round.
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=HERE / "study.yaml", help="YAML file of the study. Default %(default)s.")
    parser.add_argument("--results", default=HERE / "results", help="What run_study.py wrote. Default %(default)s.")
    parser.add_argument("--output", default=HERE / "RESULTS.md", help="File to write; pictures go into figures/.")
    return parser.parse_args(argv)


class Report:
    """The sections of a report; what nobody has run yet is listed at its end alone."""

    def __init__(self, study, results, folder, kept_in):
        self.study, self.results, self.folder, self.figures = study, results, folder, folder / "figures"
        self.kept_in = Path(kept_in).resolve()
        self.tasks = list(dict.fromkeys(task for task, _ in results))

    def text(self):
        """All of it, as Markdown."""
        sections = [INTRODUCTION.format(min_seeds=MIN_SEEDS, results=self.kept_in), self.recommendation()]
        sections += [
            "## Claims\n",
            *(self.claim(**claim) for claim in self.study.get("claims", ())),
            self.better_arms(),
        ]
        sections = [LINK.sub(self._from_here, section) for section in sections]
        return "\n".join(filter(None, [*sections, *map(self.task, self.tasks), self.missing()]))

    def recommendation(self):
        """What a user may do with all this."""
        advice = [f"> - {line}" for line in self.study.get("advice", ())]
        return "\n".join(["> **What to choose, as far as this goes**", ">", *advice, ""]) if advice else ""

    def better_arms(self):
        """The arms with a lower Fréchet distance than what they are compared with, and what that costs in loss."""
        lines = _header("task", "arm", "against", *(f"difference of the {label}" for label in METRICS.values()))
        for task in self.tasks:
            for pair in self._told_pairs(task):
                found = [difference(self.results, task, *pair, metric) for metric in METRICS]
                if found[0].verdict("lower") == "holds":
                    lines.append(f"| {task} | {' | '.join(pair)} | {' | '.join(map(_interval, found))} |")
        title = "## Arms with samples closer to the data than those of what they are compared with\n"
        return "\n".join([title, *(lines if len(lines) > 2 else ["None that can be told."]), ""])

    def claim(self, claim, reported, expected=None, comparisons=(), convergence=(), elsewhere=None):
        """A paragraph with its table, or nothing where none of it is measured."""
        rows = [self._row(pair, expected, *place) for pair in comparisons for place in self._places(pair)]
        if rows:
            columns = "its value", "the other's", "difference, 95 % interval", "verdict"
            rows = [*_header("task", "arm", "against", "metric", *columns), *rows]
        shares = [self._convergence_row(pair, *place) for pair in convergence for place in self._places(pair)]
        if shares:
            columns = "share of the steps, by seed", "difference to all of them, 95 % interval", "verdict"
            shares = [*_header("task", "arm", "against", "metric", *columns), *shares]
        measured = [*([f"Measured. {elsewhere}"] if elsewhere else []), *rows, *shares]
        return "\n".join([f"### {claim}\n", f"Reported. {reported}\n", *measured, ""]) if measured else ""

    def task(self, task):
        """Pictures of a task, and a table of all its arms."""
        arms = [arm for of, arm in self.results if of == task]
        drawn = [arm for arm in ("unrouted", "dtr", "random", "unrouted-min_snr", "unrouted-nash_mtl") if arm in arms]
        runs = [run for arm in arms for run in self.results[task, arm].values()]
        seconds = statistics.median(run["processor_seconds"] for run in runs)
        hardware = ", ".join(sorted({str(run["hardware"]) for run in runs}))
        lines = [f"## {task}\n", f"{runs[0]['points'][-1]['step']} steps; {seconds:.0f} s of a processor for a run."]
        lines += [f"Hardware: {hardware}.\n"]
        draw_quality(self.results, task, drawn or arms, self.figures / f"{task}_quality.png")
        lines += [f"![Quality against training steps, {task}](figures/{task}_quality.png)\n"]
        pairs = self._told_pairs(task)
        if pairs:
            draw_differences(self.results, task, pairs, self.figures / f"{task}_differences.png")
            lines += [f"![Paired differences at the end, {task}](figures/{task}_differences.png)\n"]
        seed = min(self.results[task, arms[0]])
        shown = [arm for arm in arms if seed in self.results[task, arm]]
        draw_samples(self.results, task, shown, seed, self.figures / f"{task}_samples.png")
        lines += [f"![Samples of all arms from the same noise, {task}](figures/{task}_samples.png)\n"]
        lines += _header("arm", "seeds", "parameters", *METRICS.values())
        lines += [*(self._arm_row(task, arm) for arm in arms), ""]
        asked = [tuple(pair) for claim in self.study.get("claims", ()) for pair in claim.get("convergence", ())]
        courses = [pair for pair in asked if pair in pairs]
        if courses:
            lines += [*self._course(task, courses, [point["step"] for point in runs[0]["points"]]), ""]
            lines += self._eighths(task, courses)
        return "\n".join([*lines, ""])

    def missing(self):
        """What the grid has and nobody has run yet."""
        planned, lines = {}, []
        for cell in cells(self.study):
            if cell.seed not in self.results.get((cell.task, cell.arm), {}):
                planned.setdefault(cell.task, {}).setdefault(cell.arm, []).append(str(cell.seed))
        for task, arms in planned.items():
            lines += [f"- {task}: " + "; ".join(f"{arm} (seeds {', '.join(seeds)})" for arm, seeds in arms.items())]
        return "\n".join(["## Not run yet\n", *(lines or ["Nothing: the grid is complete."]), ""])

    def _from_here(self, link):
        """A link that was relative to this script."""
        path, *anchor = link[1].split("#")
        path = os.path.relpath(HERE / path, self.folder.resolve()).replace(os.sep, "/")
        return f"]({'#'.join([path, *anchor])})"

    def _places(self, pair):
        """Tasks and metrics that a comparison has values of."""
        return [(task, metric) for task in self.tasks if self._seeds(task, pair) for metric in METRICS]

    def _row(self, pair, expected, task, metric):
        names = " | ".join(pair)
        found = difference(self.results, task, *pair, metric)
        means = " | ".join(f"{statistics.mean(values):.4g}" for values in (found.arm, found.reference))
        return f"| {task} | {names} | {METRICS[metric]} | {means} | {_interval(found)} | {found.verdict(expected)} |"

    def _convergence_row(self, pair, task, metric):
        names = " | ".join(pair)
        shares = share_of_steps(self.results, task, *pair, metric)
        by_seed = ", ".join("never" if share is None else f"{share:.2f}" for share in shares)
        found = Difference(shares, [1.0] * len(shares))
        interval = "" if None in shares else _interval(found)
        return f"| {task} | {names} | {METRICS[metric]} | {by_seed} | {interval} | {found.verdict('lower')} |"

    def _arm_row(self, task, arm):
        runs = list(self.results[task, arm].values())
        columns = [_spread([value_of(run, metric) for run in runs]) for metric in METRICS]
        return f"| {arm} | {len(runs)} | {runs[0]['num_parameters']:,} | {' | '.join(columns)} |"

    def _course(self, task, pairs, steps):
        """Paired differences at every point."""
        lines = _header("difference", "metric", *(f"{step} steps" for step in steps))
        for pair in pairs:
            for metric, label in METRICS.items():
                found = [difference(self.results, task, *pair, metric, point) for point in range(len(steps))]
                lines += [f"| {' less '.join(pair)} | {label} | {' | '.join(map(_interval, found))} |"]
        return lines

    def _eighths(self, task, pairs):
        """Losses at the end in every eighth of the timesteps, from the cleanest to the noisiest."""
        lines = _header("held-out loss at the end", *(f"eighth {number}" for number in range(1, 9)))
        for pair in pairs:
            eighths = [difference(self.results, task, *pair, number) for number in range(8)]
            lines += [f"| {pair[1]} | {' | '.join(_spread(each.reference) for each in eighths)} |"]
            lines += [f"| {' less '.join(pair)} | {' | '.join(map(_interval, eighths))} |"]
        return [*dict.fromkeys(lines)]  # a reference of several once

    def _told_pairs(self, task):
        """Arms of a task with what they are compared with, where both have seeds enough for a verdict."""
        arms = self.study["arms"]
        pairs = [(arm, arms[arm]["against"]) for of, arm in self.results if of == task and "against" in arms[arm]]
        return [pair for pair in pairs if self._seeds(task, pair) >= MIN_SEEDS]

    def _seeds(self, task, pair):
        arm, reference = (self.results.get((task, name), {}).keys() for name in pair)
        return len(arm & reference)


def _header(*columns):
    return [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]


def _interval(found):
    interval = found.interval()
    return "" if interval is None else "{:+.4g} [{:+.4g}, {:+.4g}]".format(*interval)


def _spread(values):
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def main(args):
    study, output = read_study(args.settings), Path(args.output)
    results = read_results(study, args.results)
    if not results:
        raise ValueError(f"`--results` must have finished cells of {args.settings}, got {args.results} without any.")
    if Path(args.results).resolve() != HERE / "results":
        study.pop("advice", None)  # which is about the results that are kept here
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(Report(study, results, output.parent, args.results).text(), encoding="utf-8")
    print(f"{sum(map(len, results.values()))} of {len(cells(study))} cells are in {output}")


if __name__ == "__main__":
    run_script(main, parse_args())
