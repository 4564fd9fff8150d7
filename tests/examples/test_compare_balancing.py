"""The study of balancings: with runs of two steps, one process or the launcher doing the training."""

import json
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from training_runs import EXAMPLES, MODEL, SCRIPT, load_script, make_images, record, run_main


TINY = (
    "--train_data_dir {data}/train --validation_data_dir {data}/test --resolution 8 --train_batch_size 8 "
    f"--max_train_steps 2 --model_config '{json.dumps(MODEL)}'"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny data"
    make_images(folder / "train")
    make_images(folder / "test", count=12)
    return folder


@pytest.fixture
def study(monkeypatch) -> ModuleType:
    study = load_script(EXAMPLES / "study" / "compare_balancing.py")
    monkeypatch.setitem(study.TASKS, "digits", TINY)
    monkeypatch.setattr(study, "COMMON", study.COMMON.replace("--lr_warmup_steps 50", "--lr_warmup_steps 1"))
    return study


@pytest.fixture
def launched(study, data, monkeypatch) -> list[dict]:
    """Trains in this process what the study launches in another; here are the records of the runs."""
    records = []

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        argv = command[command.index(str(SCRIPT)) + 1 :]
        cached = ["--cache_dir", str(data / "cache")]
        records.append(record(run_main(load_script(SCRIPT), [*argv, *cached])))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=run))
    return records


def main(study: ModuleType, data: Path, output: Path, *flags: object, task: str = "digits") -> None:
    argv = ["--task", task, "--data", data, "--output", output, *flags]
    study.main(study.parse_args([str(value) for value in argv]))


def test_every_method_and_seed_is_run_once_and_compared(study, launched, data, tmp_path, capsys):
    output = tmp_path / "results" / "digits.json"
    main(study, data, output, "--seeds", 0)
    report = json.loads(output.read_text())
    assert report["task"] == "digits"
    assert [entry["method"] for entry in report["runs"]] == list(study.METHODS)
    assert len({entry["loss"] for entry in report["runs"]}) == len(study.METHODS)
    for entry, run in zip(report["runs"], launched, strict=True):
        assert entry["loss"] == run["results"]["validation_loss"]
        assert entry["per_eighth"] == [run["results"][f"validation_loss/eighth_{number}"] for number in range(8)]
        assert entry["command"].startswith("accelerate launch train_class_conditional.py --train_data_dir DATA/train")
        assert str(data) not in entry["command"]
        assert study.METHODS[entry["method"]] in entry["command"]
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(study.METHODS)
    assert {row.count("|") for row in rows} == {12}
    assert rows[2].startswith(f"| plain (1 seeds) | {report['runs'][0]['loss']:.4f} ± nan | ")


def test_runs_of_the_file_are_not_repeated(study, launched, data, tmp_path, capsys):
    output = tmp_path / "digits.json"
    main(study, data, output, "--seeds", 0, "--methods", "plain")
    first = json.loads(output.read_text())["runs"]
    main(study, data, output, "--seeds", 0, 1, "--methods", "plain")
    assert [run["arguments"]["seed"] for run in launched] == [0, 1]
    runs = json.loads(output.read_text())["runs"]
    assert runs[:1] == first
    assert [(entry["method"], entry["seed"]) for entry in runs] == [("plain", 0), ("plain", 1)]
    capsys.readouterr()
    main(study, data, output, "--seeds", 0, 1, "--methods", "plain")
    assert len(launched) == 2
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| plain")]
    mean = (runs[0]["loss"] + runs[1]["loss"]) / 2
    assert row.startswith(f"| plain (2 seeds) | {mean:.4f} ± {abs(runs[0]['loss'] - runs[1]['loss']) / 2**0.5:.4f} |")


def test_runs_of_a_seed_differ_in_the_method_only(study, launched, data, tmp_path):
    main(study, data, tmp_path / "digits.json", "--seeds", 3, "--methods", "plain", "uncertainty")
    one, other = (run["arguments"] for run in launched)
    assert {name for name in one if one[name] != other[name]} == {"balancing"}


def test_file_of_another_task_is_refused(study, launched, data, tmp_path):
    output = tmp_path / "digits.json"
    main(study, data, output, "--seeds", 0, "--methods", "plain")
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"`--output` must be a file of its own for each task.*digits"):
        main(study, data, output, task="cifar10")
    assert output.read_bytes() == before


def test_failed_run_is_named_with_what_it_said(study, data, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "something went wrong")
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(RuntimeError, match=r"plain, seed 0, failed: .*train_class_conditional\.py(.|\n)*went wrong"):
        main(study, data, tmp_path / "digits.json", "--seeds", 0)
    assert not (tmp_path / "digits.json").exists()


@pytest.mark.parametrize("task", ["digits", "cifar10"])
def test_command_of_every_task_and_method_is_one_of_the_script(task, monkeypatch):
    study, script = load_script(EXAMPLES / "study" / "compare_balancing.py"), load_script(SCRIPT)

    def stop(command: list[str], **options) -> None:
        parsed.append(script.parse_args(command[command.index(str(SCRIPT)) + 1 :]))
        raise InterruptedError

    parsed = []
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=stop))
    for method in study.METHODS:
        args = study.parse_args(["--task", task, "--data", "d", "--output", "o"])
        with pytest.raises(InterruptedError):
            study.run(args, method, 5)
    assert {args.seed for args in parsed} == {5}
    assert {args.num_clusters for args in parsed} == {8}
    assert {args.balancing for args in parsed} == {"uniform", "uncertainty", "pcgrad", "nash_mtl"}


@pytest.mark.slow
def test_study_launches_real_runs_side_by_side(study, data, tmp_path, capsys):
    main(study, data, tmp_path / "digits.json", "--seeds", 0, "--methods", "plain", "PCGrad", "--jobs", 2)
    runs = json.loads((tmp_path / "digits.json").read_text())["runs"]
    assert [entry["method"] for entry in runs] == ["plain", "PCGrad"]
    assert "| PCGrad (1 seeds) |" in capsys.readouterr().out
