"""The study: cells of four steps from its settings to the report, and the statistics beside a hand computation."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import EXAMPLES, MODEL, load_script, make_images, reset_accelerate

from diffusers_dtr import DTRPipeline


FOLDER = EXAMPLES / "study"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Two arms with one seed, of four steps: after fewer, blocks begun with zeros show no routing yet."""
    study = yaml.safe_load((FOLDER / "study.yaml").read_text())
    digits = study["tasks"]["digits"]
    digits["model"] = MODEL
    digits["training"] |= {"max_train_steps": 4, "lr_warmup_steps": 1, "train_batch_size": 8}
    digits["measure"] |= {"points": 2, "num_samples": 60, "num_reference_images": 60, "num_inference_steps": 2}
    study["tasks"] = {"digits": digits}
    study["order"] = [{"task": "digits", "seeds": [0], "arms": ["unrouted", "dtr"]}]
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_images(folder / "train", count=80)
    make_images(folder / "test", count=12)
    return folder


@pytest.fixture
def study(monkeypatch):
    """The script, which runs cells in this process."""
    study, started = load_script(FOLDER / "run_study.py"), []

    class Pool:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def shutdown(self, cancel_futures): ...
        def submit(self, function, path, *job):
            def result():
                started.append(path)
                try:
                    return function(path, *job)
                finally:
                    reset_accelerate()

            return type("Future", (), {"result": staticmethod(result)})

    monkeypatch.setattr(study, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(study, "in_own_process", study.run)
    study.started = started
    return study


def run(study, settings, output, *flags):
    study.main(study.parse_args([str(value) for value in ("--settings", settings, "--output_dir", output, *flags)]))
    return {path: json.loads(path.read_text()) for path in sorted(output.rglob("*.json"))}


def test_cells_are_run_once_differ_in_routing_alone_and_are_reported(study, settings, digits, tmp_path, capsys):
    output = tmp_path / "results"
    first = run(study, settings, output, "--digits", digits, "--arms", "dtr")
    assert len(first) == len(study.started) == 1
    results = run(study, settings, output, "--digits", digits, "--pipelines_dir", tmp_path / "kept")
    assert [path.parent.name for path in study.started] == ["dtr", "unrouted"]
    dtr, unrouted = results.values()
    assert [dtr] == list(first.values())
    assert [point["step"] for point in dtr["points"]] == [2, 4]
    same = ("num_parameters", "initial_weights", "first_batch", "seed")
    assert all(dtr[name] == unrouted[name] for name in same)
    assert dtr["points"][-1]["loss"] != unrouted["points"][-1]["loss"]
    assert str(digits) not in json.dumps(dtr)
    (kept,) = (tmp_path / "kept").glob("*/*/*")
    assert kept.relative_to(tmp_path / "kept") == Path("digits", "unrouted", "seed-0")
    assert DTRPipeline.from_pretrained(kept).transformer.config.routing_type == "none"
    card = (kept / "README.md").read_text()
    assert "# digits-unrouted-seed-0" in card
    end = unrouted["points"][-1]
    assert f"| Held-out denoising loss | {end['loss']:.4g} | evaluations per image: 4," in card
    assert f"| Fréchet distance | {end['frechet_distance']:.4g} | num samples: 60," in card
    assert "scheduler: DDIMScheduler, features: digit_features.py:digit_margins |" in card.replace("\\", "")
    assert "![Samples](figures/samples.png)" in card
    scheduler = DTRPipeline.from_pretrained(kept).scheduler
    assert (type(scheduler).__name__, scheduler.config.timestep_spacing) == ("DDIMScheduler", "trailing")
    assert "(`DTRTransformer2DModel`)" in card
    assert "num_inference_steps=2," in card  # those of the measured samples
    assert not [*kept.glob("checkpoint-*")]
    with pytest.raises(
        ValueError, match=rf"`--pipelines_dir` must not have what is to be run again: remove .*{kept.name}"
    ):
        run(study, settings, tmp_path / "others", "--digits", digits, "--pipelines_dir", tmp_path / "kept")

    report = load_script(FOLDER / "make_report.py")
    report.main(report.parse_args(["--settings", str(settings), "--results", str(output), "--output", f"{output}.md"]))
    text = (tmp_path / "results.md").read_text()
    assert f"| digits | dtr | unrouted | held-out loss | {dtr['points'][-1]['loss']:.4g} |" in text
    assert "1 of the 3 seeds of a verdict" in text
    assert "None that can be told." in text
    assert "What to choose" not in text  # which is about the kept results
    assert "random" not in text.partition("## Not run yet")[0]
    links = [link for link in re.findall(r"\]\((.+?)\)", text) if not link.startswith("http")]
    assert len(links) == 8
    assert [link for link in links if not (tmp_path / link.partition("#")[0]).exists()] == []
    assert len(list((tmp_path / "figures").glob("digits_*.png"))) == 2
    assert "2 of 2 cells" in capsys.readouterr().out


def test_settings_data_and_networks_that_cells_cannot_be_run_with_are_refused_before_any_is(
    study, settings, digits, tmp_path
):
    given = yaml.safe_load(settings.read_text())
    given["arms"]["dtr"]["routing_tpye"] = "none"
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text(yaml.safe_dump(given))
    with pytest.raises(ValueError, match=r"`training` of the settings and `arms`: .*routing_tpye"):
        run(study, misspelt, tmp_path / "out", "--digits", digits)
    with pytest.raises((ValueError, OSError), match="absent"):
        run(study, settings, tmp_path / "out", "--digits", tmp_path / "absent")
    given = yaml.safe_load(settings.read_text())
    given["tasks"]["digits"]["measure"]["feature_extractor"] = "{cifar10_features}"
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(given))
    grid = load_script(FOLDER / "study_grid.py")
    there = grid.read_study(other)
    cell = grid.Cell("digits", "unrouted", 0)
    cell.path(tmp_path / "out").parent.mkdir(parents=True)
    cell.path(tmp_path / "out").write_text(
        json.dumps({"settings": grid.cell_settings(there, cell), "features": "another"})
    )
    with pytest.raises(
        ValueError, match=r"`--cifar10_features` must be the network of the results of digits in .*another"
    ):
        run(study, other, tmp_path / "out", "--digits", digits)
    assert study.started == []


def test_a_cell_that_fails_is_named_and_the_others_are_run(study, settings, digits, tmp_path, monkeypatch, capsys):
    run_cell = study.run_cell

    def diverging(settings, *job):
        if settings["training"].get("routing_type") != "none":
            raise FloatingPointError("the loss is nan")
        return run_cell(settings, *job)

    monkeypatch.setattr(study, "run_cell", diverging)
    with pytest.raises(ValueError, match="1 of 2 cells failed, as was said above: digits, dtr, seed 0"):
        run(study, settings, tmp_path, "--digits", digits)
    assert "digits, dtr, seed 0 failed: the loss is nan" in capsys.readouterr().out
    assert [path.parent.name for path in tmp_path.rglob("seed-0.json")] == ["unrouted"]


@pytest.mark.slow
def test_cells_side_by_side_are_those_one_after_the_other(study, settings, digits, tmp_path):
    one_by_one = run(study, settings, tmp_path / "one", "--digits", digits)
    command = [sys.executable, FOLDER / "run_study.py", "--settings", settings, "--output_dir", tmp_path / "two"]
    subprocess.run([*command, "--digits", digits, "--jobs", "2"], check=True)
    both = [json.loads(path.read_text()) for path in sorted((tmp_path / "two").rglob("*.json"))]
    for result, other in zip(both, one_by_one.values(), strict=True):
        assert result["points"] == other["points"]
        assert result["samples"] == other["samples"]


def test_results_of_other_settings_are_refused_and_cells_without_data_left_out(study, settings, tmp_path, capsys):
    output = tmp_path / "results"
    assert run(study, settings, output) == {}
    assert "2 are left out: digits for want of --digits" in capsys.readouterr().out
    other = output / "digits" / "dtr" / "seed-0.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"seed-0.json has a result of other settings: give another folder"):
        run(study, settings, output)
    report = load_script(FOLDER / "make_report.py")
    with pytest.raises(ValueError, match=r"seed-0.json has a result of other settings"):
        report.main(report.parse_args(["--settings", str(settings), "--results", str(output)]))
    other.write_text('{"settings": ')
    with pytest.raises(ValueError, match=r"seed-0.json must be a result of run_study.py: remove it"):
        run(study, settings, output)
    other.unlink()
    with pytest.raises(ValueError, match=r"`--arms` must be of .*'dtr'"):
        run(study, settings, output, "--arms", "dtx")


def test_results_of_cifar10_are_in_the_features_of_the_classifier_that_is_kept_with_them():
    cell, study = load_script(FOLDER / "study_cell.py"), load_script(FOLDER / "run_study.py")
    extract, features_hash = cell.load_extractor(str(study.parse_args([]).cifar10_features))
    black, noise = torch.zeros(2, 3, 32, 32), torch.rand(2, 3, 32, 32, generator=torch.manual_seed(0))
    features = extract(torch.cat([black, noise]))
    assert features.shape == (4, 128)
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])
    results = [json.loads(path.read_text()) for path in (FOLDER / "results" / "cifar10").rglob("*.json")]
    assert {result["features"] for result in results} == {features_hash}
    for wrong in ("README.md", "absent.pt"):
        with pytest.raises(ValueError, match=f"`--cifar10_features` must be a file of TorchScript, got .*{wrong}"):
            cell.load_extractor(str(FOLDER / wrong))


def points(*losses):
    return [{"step": 100 * number, "loss": loss} for number, loss in enumerate(losses, start=1)]


def made_up(arm, *runs, **changes):
    base = {"num_parameters": 7, "first_batch": "a", "initial_weights": "b"}
    return {("digits", arm): {seed: {**base, "seed": seed, "points": run, **changes} for seed, run in enumerate(runs)}}


@pytest.fixture
def paired():
    return load_script(FOLDER / "study_statistics.py")


def test_paired_difference_and_its_interval_are_those_of_a_hand_computation(paired):
    results = made_up("dtr", points(1.0), points(2.0), points(4.0)) | made_up(
        "unrouted", points(2.0), points(4.0), points(7.0)
    )
    found = paired.difference(results, "digits", "dtr", "unrouted", "loss")
    assert found.values == [-1.0, -2.0, -3.0]
    # Their standard deviation is 1, and 4.302653 the 97.5 % quantile of Student's t with 2 degrees of freedom.
    half = 4.302653 / math.sqrt(3)
    assert found.interval() == pytest.approx((-2.0, -2.0 - half, -2.0 + half), abs=1e-6)
    assert found.verdict("lower") == "cannot be told at this scale"
    certain = paired.Difference([1.0, 1.0, 1.1], [2.0, 2.0, 2.0])
    assert (certain.verdict("lower"), certain.verdict("higher")) == ("holds", "does not hold")
    assert paired.Difference([1.0], [2.0]).verdict("lower") == "1 of the 3 seeds of a verdict"
    assert paired.Difference([None] * 3, [1.0] * 3).verdict("lower") == "does not hold"
    assert paired.Difference([None, 0.5, 0.5], [1.0] * 3).verdict("lower") == "cannot be told at this scale"


def test_share_of_the_steps_is_where_the_reference_is_reached(paired):
    results = made_up("dtr", points(5.0, 3.0, 1.0), points(9.0, 9.0, 9.0)) | made_up(
        "unrouted", points(9.0, 6.0, 2.0), points(9.0, 8.0, 7.0)
    )
    assert paired.share_of_steps(results, "digits", "dtr", "unrouted", "loss") == [pytest.approx(250 / 300), None]


def test_results_by_features_of_several_networks_are_refused(tmp_path, paired):
    grid = load_script(FOLDER / "study_grid.py")
    study = grid.read_study(FOLDER / "study.yaml")
    for seed, features in enumerate("aab"):
        cell = grid.Cell("cifar10", "unrouted", seed)
        cell.path(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        result = {"settings": grid.cell_settings(study, cell), "features": features}
        cell.path(tmp_path).write_text(json.dumps(result))
        if seed == 1:
            assert len(paired.read_results(study, tmp_path)["cifar10", "unrouted"]) == 2
    with pytest.raises(ValueError, match=r"results of cifar10 must be by features of one network: .*seed-1.*seed-2"):
        paired.read_results(study, tmp_path)


@pytest.mark.parametrize("name", ["num_parameters", "first_batch", "initial_weights", "features"])
def test_runs_of_other_data_order_weights_size_or_features_are_not_compared(paired, name):
    results = made_up("dtr", points(1.0), **{name: "other"}) | made_up("unrouted", points(2.0))
    with pytest.raises(ValueError, match=f"dtr and unrouted of digits differ in {name}"):
        paired.difference(results, "digits", "dtr", "unrouted", "loss")


def test_report_names_the_arms_that_beat_their_reference_where_seeds_are_enough_for_a_verdict(tmp_path):
    report, grid = load_script(FOLDER / "make_report.py"), load_script(FOLDER / "study_grid.py")
    study = grid.read_study(FOLDER / "study.yaml")

    def better(seeds, dtr=(1.0, 1.1, 1.3), random=(3.0, 3.1, 3.3)):
        ends = {"unrouted": [2.0, 2.1, 2.2], "dtr": dtr, "random": random}
        runs = {
            arm: [[{"step": 1, "loss": end / 2, "frechet_distance": end}] for end in ends[arm][:seeds]] for arm in ends
        }
        results = {key: value for arm, points_of in runs.items() for key, value in made_up(arm, *points_of).items()}
        return report.Report(study, results, tmp_path, tmp_path).better_arms()

    row = "| digits | dtr | unrouted | -0.9667 [-1.11, -0.8232] | -0.4833 [-0.555, -0.4116] |"
    assert row in better(3)
    assert "random" not in better(3)
    assert "| digits | random | unrouted | -0.8667 [" in better(3, random=(1.1, 1.2, 1.4))
    for nothing in (better(2), better(3, dtr=[2.9, 1.1, 1.3])):
        assert nothing.endswith("\n\nNone that can be told.\n")


def test_drawn_lines_are_of_the_seeds_that_all_have(tmp_path, monkeypatch):
    figures = load_script(FOLDER / "study_figures.py")
    run = [{"step": step, "loss": 1.0, "frechet_distance": 2.0} for step in (1, 2)]
    far = [{"step": step, "loss": 9.0, "frechet_distance": 9.0} for step in (1, 2)]
    results = made_up("unrouted", run, run, far) | made_up("dtr", run, run)
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, _: drawn.append(figure))
    figures.draw_quality(results, "digits", ["unrouted", "dtr"], tmp_path / "quality.png")
    distances, losses = drawn[0].axes
    assert [line.get_ydata().tolist() for line in distances.lines] == [[2.0, 2.0]] * 2
    assert [line.get_ydata().tolist() for line in losses.lines] == [[1.0, 1.0]] * 2
    assert distances.get_legend().get_title().get_text() == "seeds 0, 1"


def test_report_of_the_kept_results_is_the_kept_report(monkeypatch):
    report = load_script(FOLDER / "make_report.py")
    study = report.read_study(FOLDER / "study.yaml")
    drawn = {}
    monkeypatch.setattr(report, "draw_quality", lambda _, task, arms, path: drawn.update({task: arms}))
    for name in ("draw_differences", "draw_samples"):
        monkeypatch.setattr(report, name, lambda *_: None)
    results = report.read_results(study, FOLDER / "results")
    text = report.Report(study, results, FOLDER, FOLDER / "results").text()
    assert drawn["digits"] == ["unrouted", "dtr", "random", "unrouted-min_snr", "unrouted-nash_mtl"]  # see README.md
    assert drawn["digits_unet"] == ["unrouted", "dtr"]
    assert text == (FOLDER / "RESULTS.md").read_text()


def test_report_of_another_study_draws_all_its_arms(tmp_path):
    report = load_script(FOLDER / "make_report.py")
    flags = ["--settings", FOLDER / "pilot.yaml", "--results", FOLDER / "results" / "pilot"]
    report.main(report.parse_args([*map(str, [*flags, "--output", tmp_path / "new" / "RESULTS.md"])]))
    assert "## digits" in (tmp_path / "new" / "RESULTS.md").read_text()
    assert (tmp_path / "new" / "figures" / "digits_quality.png").exists()


def test_grid_is_complete_and_every_claim_is_about_it():
    grid = load_script(FOLDER / "study_grid.py")
    study = grid.read_study(FOLDER / "study.yaml")
    seeds = {}
    for cell in grid.cells(study):
        seeds.setdefault((cell.task, cell.arm), []).append(cell.seed)
        grid.cell_settings(study, cell)
    for task in ("digits", "cifar10"):
        assert seeds[task, "unrouted"] == seeds[task, "dtr"] == [0, 1, 2, 3, 4]
        counts = {arm: len(those) for (of, arm), those in seeds.items() if of == task}
        once = {arm for arm, count in counts.items() if count not in (3, 5)}
        assert once <= {"unrouted-lr-2e-3", "dtr-lr-2e-3"}  # a check of the pilot's learning rate
    pairs = [pair for claim in study["claims"] for pair in claim.get("comparisons", claim.get("convergence", []))]
    assert all({("digits", arm), ("cifar10", arm)} & seeds.keys() for pair in pairs for arm in pair)
    assert [cell.seed for cell in grid.cells(grid.read_study(FOLDER / "pilot.yaml"))] == [0] * 7
    for arm, options in study["arms"].items():
        reference = study["arms"][options.get("against", arm)]
        for name in ("model", "learning_rate"):
            assert reference.get(name) == options.get(name)
