"""Negative transfer: with runs of two steps, one process or the launcher doing the training."""

import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from training_runs import EXAMPLES, MODEL, load_script, make_images, record, run_main

from diffusers_dtr import DTRPipeline, TimestepClusters
from diffusers_dtr.analysis import confidence_interval, frechet_distance


ANALYSIS = EXAMPLES / "analysis"
FEATURES = """
import torch

def mean_and_spread(images):
    assert images.shape[1:] == (1, 8, 8) and 0 <= images.min() and images.max() <= 1
    return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny data"
    make_images(folder / "train")
    make_images(folder / "test", count=12)
    (folder / "tiny_features.py").write_text(FEATURES)
    return folder


@pytest.fixture
def script(data, monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ANALYSIS))
    monkeypatch.syspath_prepend(str(data))
    return load_script(ANALYSIS / "measure_negative_transfer.py")


@pytest.fixture
def launched(script, monkeypatch) -> list[dict]:
    """Trains in this process what the script launches in another; here are the records of the runs."""
    records = []

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        (place,) = (number for number, word in enumerate(command) if word.endswith(".py"))
        records.append(record(run_main(load_script(Path(command[place])), command[place + 1 :])))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
    return records


def training_flags(data: Path, *flags: object) -> list[str]:
    folders = [
        "--train_data_dir",
        data / "train",
        "--validation_data_dir",
        data / "test",
        "--cache_dir",
        data / "cache",
    ]
    small = ["--model_config", json.dumps(MODEL), "--resolution", 8, "--train_batch_size", 8, "--max_train_steps", 2]
    return [str(value) for value in (*folders, *small, "--learning_rate", 1e-2, "--num_clusters", 2, *flags)]


def arguments(data: Path, output: Path, *flags: object, training: tuple = ()) -> list[str]:
    small = ["--num_loss_samples", 20, "--num_samples", 8, "--num_inference_steps", 4, "--seeds", 0, 1]
    own = ["--work_dir", data / "runs", "--output", output, *small, *flags]
    return [*map(str, own), "--", *training_flags(data, *training)]


def main(script: ModuleType, *args: object, **options) -> dict:
    argv = arguments(*args, **options)
    script.main(script.parse_args(argv))
    return json.loads(Path(argv[argv.index("--output") + 1]).read_text())


@pytest.fixture
def measured(script, launched, data, tmp_path) -> dict:
    """A report without Fréchet distances; whatever test comes first trains the runs."""
    return main(script, data, tmp_path / "results" / "tiny.json")


def test_every_model_is_trained_once_and_differs_in_the_method_alone(script, launched, data, tmp_path):
    shutil.rmtree(data / "runs", ignore_errors=True)
    main(script, data, tmp_path / "tiny.json")
    assert len(launched) == 2 * 5
    runs = {
        (run["arguments"]["seed"], Path(run["arguments"]["output_dir"]).name): run["arguments"] for run in launched
    }
    names = ["cluster-0", "cluster-1", "plain", "clustered", "routed"]
    assert runs.keys() == {(seed, name) for seed in (0, 1) for name in names}
    for seed in (0, 1):
        plain = runs[seed, "plain"]
        assert (plain["routing_type"], plain["balancing"], plain["train_cluster"]) == ("none", "uniform", None)
        changes = {
            name: {
                key: value for key, value in runs[seed, name].items() if value != plain[key] and key != "output_dir"
            }
            for name in names
        }
        assert changes == {
            "plain": {},
            "clustered": {"balancing": "uncertainty"},
            "routed": {"routing_type": "dtr"},
            "cluster-0": {"train_cluster": 0},
            "cluster-1": {"train_cluster": 1},
        }


def test_repeating_the_command_repeats_no_work(script, launched, data, tmp_path, monkeypatch):
    first = main(script, data, tmp_path / "tiny.json")
    launched.clear()
    monkeypatch.delattr(script, "Measurement")
    assert main(script, data, tmp_path / "tiny.json") == first
    assert not launched


def test_interrupted_run_is_gone_on_with(script, launched, measured, data, tmp_path):
    folder = data / "runs" / "seed-1" / "plain"
    (folder / "training_config.json").unlink()
    launched.clear()
    again = main(script, data, tmp_path / "again.json")
    (resumed,) = launched
    assert Path(resumed["arguments"]["output_dir"]).name == "plain"
    assert resumed["arguments"]["resume_from_checkpoint"] == "latest"
    assert again["entries"] == measured["entries"]


def test_gaps_are_relative_to_the_joint_models_loss_with_an_interval_over_seeds(measured):
    assert [(entry["seed"], entry["joint"]) for entry in measured["entries"]] == [
        (seed, joint) for seed in (0, 1) for joint in ("plain", "clustered", "routed")
    ]
    for joint, gaps in measured["gaps"]["loss"].items():
        losses = [entry["loss"] for entry in measured["entries"] if entry["joint"] == joint]
        percent = [
            [100 * (theirs / own - 1) for theirs, own in zip(loss["specialist"], loss["joint"], strict=True)]
            for loss in losses
        ]
        ends = confidence_interval(torch.tensor(percent, dtype=torch.float64))
        for name, end in zip(("mean", "low", "high"), ends, strict=True):
            assert gaps[name] == pytest.approx(end.tolist(), rel=1e-4, abs=1e-4)


def test_joint_models_are_compared_with_the_first_seed_by_seed(measured):
    def percent(joint: str) -> torch.Tensor:
        losses = [entry["loss"] for entry in measured["entries"] if entry["joint"] == joint]
        own, theirs = (
            torch.tensor([loss[key] for loss in losses], dtype=torch.float64) for key in ("joint", "specialist")
        )
        return 100 * (theirs / own - 1)

    assert measured["differences"]["loss"].keys() == {"clustered", "routed"}
    for joint, difference in measured["differences"]["loss"].items():
        ends = confidence_interval(percent(joint) - percent("plain"))
        for name, end in zip(("mean", "low", "high"), ends, strict=True):
            assert difference[name] == pytest.approx(end.tolist(), rel=1e-4, abs=1e-4)


def test_all_joint_models_of_a_seed_meet_the_same_specialists(measured):
    for seed in (0, 1):
        losses = [entry["loss"] for entry in measured["entries"] if entry["seed"] == seed]
        assert losses[0]["specialist"] == losses[1]["specialist"] == losses[2]["specialist"]
        assert len({tuple(loss["joint"]) for loss in losses}) == 3


def test_report_tells_how_everything_was_made_and_no_path(measured, data):
    text = json.dumps(measured)
    assert str(data) not in text
    assert measured["settings"]["training"].count("path/to/train") == 1
    assert len(measured["training"]) == 10
    assert all({"command", "seconds", "versions", "hardware"} == run.keys() for run in measured["training"])
    assert measured["clusters"][0] == 0
    assert measured["clusters"][-1] == 1000


def test_tables_and_a_picture_show_the_gaps(script, launched, data, tmp_path, capsys):
    report = main(script, data, tmp_path / "tiny.json")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == (2 + 3) + (2 + 2)
    gaps = {name: values[0] for name, values in report["gaps"]["loss"]["plain"].items()}
    assert f"{gaps['mean']:+.1f} % [{gaps['low']:+.1f}, {gaps['high']:+.1f}]" in rows[2]
    assert rows[0].startswith(f"| joint model | timesteps 0 to {report['clusters'][1] - 1} |")
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_specialist_taken_for_the_joint_model_has_no_gap_in_its_cluster(script, launched, measured, data, tmp_path):
    flags = ["--train_joint", "--joint", "itself", data / "runs" / "seed-{seed}" / "cluster-1"]
    flags += ["--specialists", data / "runs" / "seed-{seed}" / "cluster-{cluster}"]
    flags += ["--feature_extractor", "tiny_features:mean_and_spread"]
    report = main(script, data, tmp_path / "itself.json", *flags)
    for entry in report["entries"]:
        assert entry["loss"]["joint"][1] == entry["loss"]["specialist"][1]
        assert entry["loss"]["standard_error"][1] == 0
        assert entry["loss"]["joint"][0] != entry["loss"]["specialist"][0]
        assert entry["frechet_distance"]["joint"][0] == entry["frechet_distance"]["specialist"][1]
        assert entry["frechet_distance"]["joint"][0] != entry["frechet_distance"]["specialist"][0]
    for metric in ("loss", "frechet_distance"):
        gaps = report["gaps"][metric]["itself"]
        assert [gaps[end][1] for end in ("mean", "low", "high")] == [0, 0, 0]


def test_distance_is_that_of_samples_to_training_images(script, launched, measured, data, tmp_path):
    flags = ["--train_joint", "plain", "--feature_extractor", "tiny_features:mean_and_spread"]
    report = main(script, data, tmp_path / "distance.json", *flags)
    pipeline = DTRPipeline.from_pretrained(data / "runs" / "seed-1" / "plain")
    samples = pipeline(
        class_labels=[0, 1, 2, 0, 1, 2, 0, 1],
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    args = script.parse_args(arguments(data, tmp_path / "distance.json", *flags))
    measurement = script.Measurement(args, TimestepClusters(report["clusters"]), pipeline)
    assert measurement.real_features.shape == (24, 2)
    expected = frechet_distance(measurement.extract(samples), measurement.real_features)
    assert report["entries"][1]["frechet_distance"]["joint"] == [pytest.approx(expected, rel=1e-4)]


def test_specialist_takes_the_steps_of_its_cluster_and_no_other(script, launched, measured, data):
    joint, specialist = (
        DTRPipeline.from_pretrained(data / "runs" / "seed-0" / name) for name in ("plain", "cluster-1")
    )
    seen = {"joint": [], "specialist": []}
    for name, pipeline in (("joint", joint), ("specialist", specialist)):
        pipeline.denoiser.register_forward_pre_hook(lambda module, inputs, name=name: seen[name].append(inputs[1][0]))
    switched = script.SwitchedPipeline(**joint.components)
    clusters = TimestepClusters([0, 300, 700, 1000])
    switched.switch(specialist, clusters, 1)
    switched(class_labels=[0, 1], num_inference_steps=10)
    steps = {name: clusters.assign(torch.stack(timesteps)) for name, timesteps in seen.items()}
    assert (steps["specialist"] == 1).all()
    assert (steps["joint"] != 1).all()
    assert [len(steps["specialist"]), len(steps["joint"])] == [4, 6]


def test_models_without_classes_are_trained_and_measured(script, launched, data, tmp_path):
    config = {"in_channels": 1, "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    config |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    flags = ["--script", "unconditional", "--train_joint", "routed", "--work_dir", tmp_path / "runs"]
    flags += ["--feature_extractor", "tiny_features:mean_and_spread", "--num_inference_steps", 2]
    argv = arguments(data, tmp_path / "unet.json", *flags)
    place = argv.index("--model_config")
    argv[place : place + 2] = ["--unet_config", json.dumps(config)]
    script.main(script.parse_args(argv))
    report = json.loads((tmp_path / "unet.json").read_text())
    assert len(launched) == 2 * 3
    assert {run["model"]["class"] for run in launched} == {"DTRUNet2DModel"}
    assert "train_unconditional.py" in report["settings"]["training"]
    for metric in ("loss", "frechet_distance"):
        assert len(report["gaps"][metric]["routed"]["mean"]) == 2


def test_extractor_may_be_torchscript(script, tmp_path):
    path = tmp_path / "pooled.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())).save(path)
    extract = script.load_extractor(str(path), torch.device("cpu"))
    assert extract(torch.ones(5, 1, 8, 8)).shape == (5, 4)


@pytest.mark.parametrize("name", ["no_such_module:features", "tiny_features:no_such_function"])
def test_extractor_that_is_not_there_shows_before_training(script, launched, data, tmp_path, name):
    argv = arguments(data, tmp_path / "tiny.json", "--work_dir", tmp_path / "runs", "--feature_extractor", name)
    with pytest.raises((ImportError, AttributeError), match="no_such"):
        script.main(script.parse_args(argv))
    assert not launched


def test_failed_run_is_named_with_what_it_said(script, data, tmp_path, monkeypatch):
    def run(command, stdout, **options):
        stdout.write("something went wrong")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
    argv = arguments(data, tmp_path / "tiny.json")
    argv[argv.index("--work_dir") + 1] = str(tmp_path / "runs")
    with pytest.raises(RuntimeError, match=r"train_class_conditional\.py(.|\n)*failed(.|\n)*went wrong"):
        script.main(script.parse_args(argv))


@pytest.mark.parametrize(
    ("flags", "training", "message"),
    [
        ((), ("--seed", 3), "this script sets --seed itself"),
        ((), ("--balancing=uncertainty",), "this script sets --balancing itself"),
        ((), ("--no_such_flag", 1), "unrecognized arguments: --no_such_flag"),
        (("--seeds", 4, 4), (), "--seeds must be at least two"),
        (("--joint", "plain", "there"), (), "each once, got ['plain', 'clustered', 'routed', 'plain']"),
        (("--train_joint",), (), "at least one joint model"),
        (("--script", "text_to_image"), (), "argument --script: invalid choice: 'text_to_image'"),
        (("--script", "unconditional", "--guidance_scale", 2), (), "--guidance_scale needs classes"),
    ],
)
def test_flags_that_make_no_sense_are_refused(script, data, tmp_path, capsys, flags, training, message):
    with pytest.raises(SystemExit):
        script.parse_args(arguments(data, tmp_path / "tiny.json", *flags, training=training))
    assert message in capsys.readouterr().err


def test_held_out_images_are_needed(script, data, tmp_path, capsys):
    argv = arguments(data, tmp_path / "tiny.json")
    place = argv.index("--validation_data_dir")
    with pytest.raises(SystemExit):
        script.parse_args([*argv[:place], *argv[place + 2 :]])
    assert "needs --validation_split or --validation_data_dir" in capsys.readouterr().err


def test_runs_of_other_flags_are_not_taken(script, launched, measured, data, tmp_path):
    with pytest.raises(ValueError, match="`--work_dir` has runs with other training flags"):
        main(script, data, tmp_path / "other.json", training=("--max_train_steps", 3))


def test_file_of_other_settings_is_refused(script, launched, data, tmp_path):
    main(script, data, tmp_path / "tiny.json")
    before = (tmp_path / "tiny.json").read_bytes()
    with pytest.raises(ValueError, match="`--output` must be a file of its own for every setting"):
        main(script, data, tmp_path / "tiny.json", "--num_loss_samples", 21)
    assert (tmp_path / "tiny.json").read_bytes() == before


def test_models_of_another_cluster_are_not_taken_for_specialists(script, launched, measured, data, tmp_path):
    with pytest.raises(ValueError, match="must be of cluster 0 of"):
        main(script, data, tmp_path / "wrong.json", "--specialists", data / "runs" / "seed-{seed}" / "cluster-1")


def test_margins_tell_digits_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(ANALYSIS))
    digit_margins = load_script(ANALYSIS / "digit_features.py").digit_margins
    scans = torch.from_numpy(load_digits().images[:, None] / 16).float()
    margins = digit_margins(scans)
    assert margins.shape == (1797, 45)
    noisy = digit_margins(
        (scans + 0.2 * torch.randn(scans.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    )
    assert frechet_distance(margins[::2], noisy[1::2]) > 3 * frechet_distance(margins[::2], margins[1::2])


@pytest.mark.slow
def test_command_launches_real_runs_side_by_side(measured, data, tmp_path):
    missing = [data / "runs" / f"seed-{seed}" / "plain" for seed in (0, 1)]
    for folder in missing:
        shutil.rmtree(folder)
    report = main(load_script(ANALYSIS / "measure_negative_transfer.py"), data, tmp_path / "real.json", "--jobs", 2)
    for folder in missing:
        command = record(folder)["command"]
        assert command.startswith("accelerate launch train_class_conditional.py --num_validation_images 1")
    # Trained in another process, from the same seeds
    for entry, other in zip(report["entries"], measured["entries"], strict=True):
        assert entry["loss"]["joint"] == pytest.approx(other["loss"]["joint"], rel=1e-4)
