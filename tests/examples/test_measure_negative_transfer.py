"""Negative transfer: with runs of two steps, one process or the launcher doing the training."""

import json
import shutil
import subprocess
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from training_runs import EXAMPLES, MODEL, load_script, make_images, record, train_in_this_process

from diffusers_dtr import DTRPipeline, TimestepClusters
from diffusers_dtr.analysis import confidence_interval, frechet_distance


ANALYSIS = EXAMPLES / "analysis"
NAMES = ("plain", "clustered", "routed")
FEATURES = """
import torch

def mean_and_spread(images):
    assert images.shape[1:] == (1, 8, 8) and 0 <= images.min() and images.max() <= 1
    return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)
"""
WITH_FEATURES = ("--feature_extractor", "tiny_features:mean_and_spread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny data"
    make_images(folder / "train")
    make_images(folder / "test", count=12)
    (folder / "tiny_features.py").write_text(FEATURES)
    return folder


@pytest.fixture(scope="module")
def script(data) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ANALYSIS))
        patch.syspath_prepend(str(data))
        yield load_script(ANALYSIS / "measure_negative_transfer.py")


def training_flags(data: Path, *flags: object) -> list[str]:
    folders = ["--train_data_dir", data / "train", "--validation_data_dir", data / "test"]
    small = ["--model_config", json.dumps(MODEL), "--resolution", 8, "--train_batch_size", 8, "--max_train_steps", 2]
    more = ["--cache_dir", data / "cache", "--learning_rate", 1e-2, "--num_clusters", 2]
    return [str(value) for value in (*folders, *small, *more, *flags)]


def arguments(data: Path, output: Path, *flags: object, training: tuple = ()) -> list[str]:
    small = ["--num_loss_samples", 20, "--num_samples", 8, "--num_inference_steps", 4, "--seeds", 0, 1]
    own = ["--work_dir", data / "runs", "--output", output, *small, *flags]
    return [*map(str, own), "--", *training_flags(data, *training)]


def main(script: ModuleType, *args: object, **options) -> dict:
    argv = arguments(*args, **options)
    script.main(script.parse_args(argv))
    return json.loads(Path(argv[argv.index("--output") + 1]).read_text())


@pytest.fixture(scope="module")
def measured(script, data) -> SimpleNamespace:
    """A report without Fréchet distances, what was printed, and the runs that were trained for it."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        runs = train_in_this_process(script, patch)
        report = main(script, data, data / "results" / "tiny.json")
    return SimpleNamespace(report=report, runs=runs, printed=printed.getvalue(), path=data / "results" / "tiny.json")


# --- training --------------------------------------------------------------------------------------------------------


def test_every_model_is_trained_once_and_differs_in_the_method_alone(measured):
    runs = [run["arguments"] for run in measured.runs]
    by_name = {(run["seed"], Path(run.pop("output_dir")).name): run for run in runs}
    assert len(by_name) == len(runs) == 2 * 5
    for seed in (0, 1):
        plain = by_name[seed, "plain"]
        assert (plain["routing_type"], plain["balancing"], plain["train_cluster"]) == ("none", "uniform", None)
        others = {"clustered": {"balancing": "uncertainty"}, "routed": {"routing_type": "dtr"}}
        others |= {f"cluster-{number}": {"train_cluster": number} for number in (0, 1)}
        for name, changed in others.items():
            assert by_name[seed, name] == {**plain, **changed}


def test_repeating_the_command_repeats_no_work_and_goes_on_with_interrupted_runs(
    script, measured, data, tmp_path, monkeypatch
):
    launched = train_in_this_process(script, monkeypatch)
    with monkeypatch.context() as patch:
        patch.delattr(script, "Measurement")
        assert main(script, data, measured.path) == measured.report
    assert not launched
    (data / "runs" / "seed-1" / "plain" / "training_config.json").unlink()
    again = main(script, data, tmp_path / "again.json")
    (resumed,) = launched
    assert Path(resumed["arguments"]["output_dir"]).name == "plain"
    assert resumed["arguments"]["resume_from_checkpoint"] == "latest"
    assert again["entries"] == measured.report["entries"]


def test_models_without_classes_are_trained_and_measured(script, data, tmp_path, monkeypatch):
    launched = train_in_this_process(script, monkeypatch)
    config = {"in_channels": 1, "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    config |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    flags = ["--script", "unconditional", "--train_joint", "routed", "--work_dir", tmp_path / "runs", *WITH_FEATURES]
    argv = arguments(data, tmp_path / "unet.json", *flags)
    place = argv.index("--model_config")
    argv[place : place + 2] = ["--unet_config", json.dumps(config)]
    script.main(script.parse_args(argv))
    report = json.loads((tmp_path / "unet.json").read_text())
    assert [run["model"]["class"] for run in launched] == ["DTRUNet2DModel"] * 2 * 3
    assert "train_unconditional.py" in report["settings"]["training"]
    for metric in ("loss", "frechet_distance"):
        assert len(report["gaps"][metric]["routed"]["mean"]) == 2


# --- the report ------------------------------------------------------------------------------------------------------


def test_gaps_are_relative_to_the_joint_models_loss_with_an_interval_over_seeds(measured):
    report = measured.report
    assert [(entry["seed"], entry["joint"]) for entry in report["entries"]] == [(s, n) for s in (0, 1) for n in NAMES]
    expected = {}
    for name in NAMES:
        losses = [entry["loss"] for entry in report["entries"] if entry["joint"] == name]
        own, theirs = (torch.tensor([loss[key] for loss in losses]).double() for key in ("joint", "specialist"))
        expected[name] = 100 * (theirs / own - 1)
    # Joint models are compared with the first, seed by seed.
    apart = {name: expected[name] - expected["plain"] for name in NAMES[1:]}
    for found, values in ((report["gaps"]["loss"], expected), (report["differences"]["loss"], apart)):
        assert found.keys() == values.keys()
        for name, value in values.items():
            for key, end in zip(("mean", "low", "high"), confidence_interval(value), strict=True):
                assert found[name][key] == pytest.approx(end.tolist(), rel=1e-4, abs=1e-4)

    for seed in (0, 1):
        losses = [entry["loss"] for entry in report["entries"] if entry["seed"] == seed]
        assert losses[0]["specialist"] == losses[1]["specialist"] == losses[2]["specialist"]
        assert len({tuple(loss["joint"]) for loss in losses}) == 3


def test_report_tells_how_everything_was_made_and_no_path_with_tables_and_a_picture(measured, data):
    report = measured.report
    assert str(data) not in json.dumps(report)
    assert report["settings"]["training"].count("path/to/train") == 1
    assert len(report["training"]) == 10
    assert all({"command", "seconds", "versions", "hardware"} == run.keys() for run in report["training"])
    assert (report["clusters"][0], report["clusters"][-1]) == (0, 1000)
    rows = [line for line in measured.printed.splitlines() if line.startswith("| ")]
    assert len(rows) == (2 + 3) + (2 + 2)
    gaps = {name: values[0] for name, values in report["gaps"]["loss"]["plain"].items()}
    assert f"{gaps['mean']:+.1f} % [{gaps['low']:+.1f}, {gaps['high']:+.1f}]" in rows[2]
    assert rows[0].startswith(f"| joint model | timesteps 0 to {report['clusters'][1] - 1} |")
    assert measured.path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


# --- the metrics -----------------------------------------------------------------------------------------------------


def test_specialist_taken_for_the_joint_model_has_no_gap_in_its_cluster(script, measured, data, tmp_path):
    runs = data / "runs" / "seed-{seed}"
    flags = ["--train_joint", "--joint", "itself", runs / "cluster-1", "--specialists", runs / "cluster-{cluster}"]
    report = main(script, data, tmp_path / "itself.json", *flags, *WITH_FEATURES)
    for entry in report["entries"]:
        loss, distance = entry["loss"], entry["frechet_distance"]
        assert loss["joint"][1] == loss["specialist"][1]
        assert loss["standard_error"][1] == 0
        assert loss["joint"][0] != loss["specialist"][0]
        assert distance["joint"][0] == distance["specialist"][1] != distance["specialist"][0]
    for metric in ("loss", "frechet_distance"):
        gaps = report["gaps"][metric]["itself"]
        assert [gaps[end][1] for end in ("mean", "low", "high")] == [0, 0, 0]


def test_distance_is_that_of_samples_to_training_images(script, measured, data, tmp_path):
    flags = ["--train_joint", "plain", *WITH_FEATURES]
    report = main(script, data, tmp_path / "distance.json", *flags)
    pipeline, generator = DTRPipeline.from_pretrained(data / "runs" / "seed-1" / "plain"), torch.Generator()
    sampling = {"num_inference_steps": 4, "generator": generator.manual_seed(1), "output_type": "pt"}
    samples = pipeline(class_labels=[0, 1, 2, 0, 1, 2, 0, 1], **sampling).images
    args = script.parse_args(arguments(data, tmp_path / "distance.json", *flags))
    measurement = script.Measurement(args, TimestepClusters(report["clusters"]), pipeline)
    assert measurement.real_features.shape == (24, 2)
    expected = frechet_distance(measurement.extract(samples), measurement.real_features)
    assert report["entries"][1]["frechet_distance"]["joint"] == [pytest.approx(expected, rel=1e-4)]


def test_specialist_takes_the_steps_of_its_cluster_and_no_other(script, measured, data):
    seen = {"plain": [], "cluster-1": []}
    joint, specialist = (DTRPipeline.from_pretrained(data / "runs" / "seed-0" / name) for name in seen)
    for name, pipeline in zip(seen, (joint, specialist), strict=True):
        pipeline.denoiser.register_forward_pre_hook(lambda module, inputs, name=name: seen[name].append(inputs[1][0]))
    switched, clusters = script.SwitchedPipeline(**joint.components), TimestepClusters([0, 300, 700, 1000])
    switched.switch(specialist, clusters, 1)
    switched(class_labels=[0, 1], num_inference_steps=10)
    inside = [(clusters.assign(torch.stack(steps)) == 1).tolist() for steps in seen.values()]
    assert inside == [[False] * 6, [True] * 4]


def test_extractor_may_be_torchscript(script, tmp_path):
    path = tmp_path / "pooled.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())).save(path)
    assert script.load_extractor(str(path), torch.device("cpu"))(torch.ones(5, 1, 8, 8)).shape == (5, 4)


def test_margins_tell_digits_apart():
    digit_margins = load_script(ANALYSIS / "digit_features.py").digit_margins
    scans = torch.from_numpy(load_digits().images[:, None] / 16).float()
    noise = 0.2 * torch.randn(scans.shape, generator=torch.Generator().manual_seed(0))
    margins, noisy = digit_margins(scans), digit_margins((scans + noise).clamp(0, 1))
    assert margins.shape == (1797, 45)
    assert frechet_distance(margins[::2], noisy[1::2]) > 3 * frechet_distance(margins[::2], margins[1::2])


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "training", "message"),
    [
        ((), ("--seed", 3), "this script sets --seed itself"),
        ((), ("--no_such_flag", 1), "unrecognized arguments: --no_such_flag"),
        (("--seeds", 4, 4), (), "--seeds must be at least two"),
        (("--joint", "plain", "there"), (), "each once, got ['plain', 'clustered', 'routed', 'plain']"),
        (("--train_joint",), (), "at least one joint model"),
        (("--script", "text_to_image"), (), "argument --script: invalid choice: 'text_to_image'"),
        (("--script", "unconditional", "--guidance_scale", 2), (), "--guidance_scale needs classes"),
        ((), None, "needs --validation_split or --validation_data_dir"),
    ],
)
def test_flags_that_make_no_sense_are_refused(script, data, tmp_path, capsys, flags, training, message):
    argv = arguments(data, tmp_path / "tiny.json", *flags, training=training or ())
    if training is None:
        place = argv.index("--validation_data_dir")
        argv[place : place + 2] = []
    with pytest.raises(SystemExit):
        script.parse_args(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no_such_module:features", "tiny_features:no_such_function"])
def test_extractor_that_is_not_there_shows_before_training(script, data, tmp_path, name, monkeypatch):
    launched = train_in_this_process(script, monkeypatch)
    with pytest.raises((ImportError, AttributeError), match="no_such"):
        main(script, data, tmp_path / "t.json", "--work_dir", tmp_path / "runs", "--feature_extractor", name)
    assert not launched


@pytest.mark.parametrize(
    ("output", "flags", "training", "message"),
    [
        ("other.json", (), ("--max_train_steps", 3), "`--work_dir` has runs with other training flags"),
        ("tiny.json", ("--num_loss_samples", 21), (), "`--output` must be a file of its own for every setting"),
        ("wrong.json", ("--specialists", "RUNS/seed-{seed}/cluster-1"), (), "must be of cluster 0 of"),
    ],
)
def test_runs_and_files_of_other_settings_are_not_taken(script, measured, data, output, flags, training, message):
    before = measured.path.read_bytes()
    flags = [str(flag).replace("RUNS", str(data / "runs")) for flag in flags]
    with pytest.raises(ValueError, match=message):
        main(script, data, measured.path.with_name(output), *flags, training=training)
    assert measured.path.read_bytes() == before


def test_failed_run_is_named_with_what_it_said(script, data, tmp_path, monkeypatch, capsys):
    def run(command, stdout, **options):
        stdout.write("something went wrong")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
    with pytest.raises(ChildProcessError, match=r"conditional\.py .* failed\. Above is the end of .*log\.txt"):
        main(script, data, tmp_path / "tiny.json", "--work_dir", tmp_path / "runs")
    assert "something went wrong" in capsys.readouterr().err


@pytest.mark.slow
def test_command_launches_real_runs_side_by_side(script, measured, data, tmp_path):
    missing = [data / "runs" / f"seed-{seed}" / "plain" for seed in (0, 1)]
    for folder in missing:
        shutil.rmtree(folder)
    report = main(script, data, tmp_path / "real.json", "--jobs", 2)
    for folder in missing:
        command = record(folder)["command"]
        assert command.startswith("accelerate launch train_class_conditional.py --num_validation_images 1")
    # Trained in another process, from the same seeds
    for entry, other in zip(report["entries"], measured.report["entries"], strict=True):
        assert entry["loss"]["joint"] == pytest.approx(other["loss"]["joint"], rel=1e-4)
