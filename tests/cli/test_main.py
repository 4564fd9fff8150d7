"""The entry point: one line for what a user can mend, a traceback for a bug."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from diffusers_dtr import cli


COMMANDS = ("card", "convert", "inspect", "sample")


def fail(monkeypatch, error):
    """Every command raises `error`."""

    def run(args):
        raise error

    for command in cli._COMMANDS:
        monkeypatch.setattr(command, "run", run)


def shown_help(capsys, *arguments):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*arguments, "--help"])
    return capsys.readouterr().out


def test_help_lists_the_commands_and_that_of_each_has_examples(capsys):
    assert all(f"\n    {command} " in shown_help(capsys) for command in COMMANDS)
    for command in COMMANDS:
        assert f"examples:\n  diffusers-dtr {command} " in shown_help(capsys, command)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("several\n  lines"),
        OSError("several\n  lines"),
        ImportError("several\n  lines"),
        LocalEntryNotFoundError("several\n  lines"),
    ],
)
def test_an_error_of_the_user_is_one_line(monkeypatch, capsys, error):
    fail(monkeypatch, error)
    assert cli.main(["inspect", "model"]) == 2
    assert capsys.readouterr().err == "diffusers-dtr inspect: several lines\n"


@pytest.mark.parametrize(
    "error", [KeyError("a bug"), TypeError("a bug"), AssertionError("a bug"), RuntimeError("a bug")]
)
def test_a_bug_is_not_hidden(monkeypatch, error):
    fail(monkeypatch, error)
    with pytest.raises(type(error), match="a bug"):
        cli.main(["inspect", "model"])


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "COMMAND" in capsys.readouterr().err


def test_the_package_installs_the_command():
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (line,) = (line for line in pyproject.splitlines() if line.startswith("diffusers-dtr = "))
    module, function = line.split("=")[1].strip().strip('"').split(":")
    assert getattr(importlib.import_module(module), function) is cli.main


def test_the_module_runs_as_the_command_does(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "diffusers_dtr.cli", "inspect", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("diffusers-dtr inspect: There is no diffusers model")
