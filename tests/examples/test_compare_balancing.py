"""The study of balancings: with runs of two steps, one process or the launcher doing the training."""

import json
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from training_runs import EXAMPLES, MODEL, SCRIPT, load_script, make_images, train_in_this_process


STUDY = EXAMPLES / "study" / "compare_balancing.py"
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
    study = load_script(STUDY)
    monkeypatch.setitem(study.TASKS, "digits", TINY)
    monkeypatch.setattr(study, "COMMON", study.COMMON.replace("--lr_warmup_steps 50", "--lr_warmup_steps 1"))
    return study


@pytest.fixture
def launched(study, data, monkeypatch) -> list[dict]:
    return train_in_this_process(study, monkeypatch, "--cache_dir", data / "cache")


def main(study: ModuleType, data: Path, output: Path, *flags: object, task: str = "digits") -> list[dict]:
    argv = ["--task", task, "--data", data, "--output", output, *flags]
    study.main(study.parse_args([str(value) for value in argv]))
    return json.loads(output.read_text())["runs"]


def rows_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("| ")]


def test_every_method_is_run_once_differs_in_the_method_alone_and_is_compared(study, launched, data, tmp_path, capsys):
    runs = main(study, data, tmp_path / "results" / "digits.json", "--seeds", 0)
    assert [entry["method"] for entry in runs] == list(study.METHODS)
    assert len({entry["loss"] for entry in runs}) == len(study.METHODS)
    for entry, run in zip(runs, launched, strict=True):
        assert entry["loss"] == run["results"]["validation_loss"]
        assert entry["per_eighth"] == [run["results"][f"validation_loss/eighth_{number}"] for number in range(8)]
        assert entry["command"].startswith("accelerate launch train_class_conditional.py --train_data_dir DATA/train")
        assert str(data) not in entry["command"]
        assert study.METHODS[entry["method"]] in entry["command"]
    plain, uncertainty = (launched[list(study.METHODS).index(name)]["arguments"] for name in ("plain", "uncertainty"))
    assert {name for name in plain if plain[name] != uncertainty[name]} == {"balancing"}
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 2 + len(study.METHODS)
    assert {row.count("|") for row in rows} == {12}
    assert rows[2].startswith(f"| plain (1 seeds) | {runs[0]['loss']:.4f} ± nan | ")


def test_runs_of_the_file_are_not_repeated_and_those_of_another_task_refused(study, launched, data, tmp_path, capsys):
    output = tmp_path / "digits.json"
    first = main(study, data, output, "--seeds", 0, "--methods", "plain")
    for _ in range(2):
        capsys.readouterr()
        runs = main(study, data, output, "--seeds", 0, 1, "--methods", "plain")
    assert [run["arguments"]["seed"] for run in launched] == [0, 1]
    assert runs[:1] == first
    assert [(entry["method"], entry["seed"]) for entry in runs] == [("plain", 0), ("plain", 1)]
    losses = [run["loss"] for run in runs]
    spread = f"{sum(losses) / 2:.4f} ± {abs(losses[0] - losses[1]) / 2**0.5:.4f}"
    assert rows_of(capsys.readouterr().out)[-1].startswith(f"| plain (2 seeds) | {spread} |")
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"`--output` must be a file of its own for each task.*digits"):
        main(study, data, output, task="cifar10")
    assert output.read_bytes() == before


def test_failed_run_is_named_with_what_it_said(study, data, tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "something went wrong")
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(ChildProcessError, match=r"plain, seed 0, failed: .*train_class_conditional\.py"):
        main(study, data, tmp_path / "digits.json", "--seeds", 0)
    assert "something went wrong" in capsys.readouterr().err
    assert not (tmp_path / "digits.json").exists()


@pytest.mark.parametrize("task", ["digits", "cifar10"])
def test_command_of_every_task_and_method_is_one_of_the_script(task, monkeypatch):
    study, script = load_script(STUDY), load_script(SCRIPT)
    parsed = []

    def stop(command: list[str], **options) -> None:
        parsed.append(script.parse_args(command[command.index(str(SCRIPT)) + 1 :]))
        raise InterruptedError

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=stop))
    args = study.parse_args(["--task", task, "--data", "d", "--output", "o"])
    for method in study.METHODS:
        with pytest.raises(InterruptedError):
            study.run(args, method, 5)
    assert {(config.run.seed, config.objective.num_clusters) for config in parsed} == {(5, 8)}
    assert {args.objective.balancing for args in parsed} == {"uniform", "uncertainty", "pcgrad", "nash_mtl"}


@pytest.mark.slow
def test_study_launches_real_runs_side_by_side(study, data, tmp_path, capsys):
    runs = main(study, data, tmp_path / "digits.json", "--seeds", 0, "--methods", "plain", "PCGrad", "--jobs", 2)
    assert [entry["method"] for entry in runs] == ["plain", "PCGrad"]
    assert "| PCGrad (1 seeds) |" in capsys.readouterr().out
