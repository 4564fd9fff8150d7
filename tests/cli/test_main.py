"""The entry point: fast help, one line for what a user can mend, and a limit on waiting for the Hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from zipfile import ZipFile

import pytest
from hub_faults import NeverAnswer
from huggingface_hub import HfApi, get_session

import diffusers_dtr
from diffusers_dtr import cli
from diffusers_dtr.cli import command as light


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_are_the_same_before_and_after_the_package_is_imported(flag, capsys):
    shown = []
    for main in (light.main, cli.main):
        with pytest.raises(SystemExit, match="0"):
            main([flag])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    if flag == "--version":
        assert shown[0] == f"diffusers-dtr {diffusers_dtr.__version__}\n"
    else:
        assert all(f"\n    {command} " in shown[0] for command in ("card", "convert", "inspect", "sample"))


@pytest.mark.parametrize("command", light.COMMANDS)
def test_the_help_of_a_command_has_examples(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert f"examples:\n  diffusers-dtr {command} " in capsys.readouterr().out


RUN = """
import sys
sys.path[:0] = {path!r}
from {module} import main
try:
    sys.exit(main())
finally:
    print({{"torch", "diffusers", "diffusers_dtr", "huggingface_hub"}} & {{*sys.modules}}, file=sys.stderr)
"""


def run_installed(*arguments, path):
    """What the command does with these folders on the path, and which large modules it imports."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    (line,) = (line for line in pyproject.splitlines() if line.startswith("diffusers-dtr = "))
    module, function = line.split("=")[1].strip().strip('"').split(":")
    assert function == "main"
    code = RUN.format(path=[*map(str, path)], module=module)
    # Not this checkout, if it is on the path
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("unknown", 2)])
def test_help_and_mistakes_import_nothing_large(tmp_path, argument, code):
    shutil.copy(light.__file__, tmp_path / "diffusers_dtr_command.py")
    done = run_installed(argument, path=[tmp_path, ROOT])
    assert done.stderr.endswith("set()\n"), done.stderr
    assert done.returncode == code


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_command_answers_from_a_wheel_and_from_an_editable_install(kind, tmp_path, monkeypatch):
    build = pytest.importorskip("hatchling.build", reason="hatchling builds the package")
    monkeypatch.chdir(ROOT)
    name = (build.build_wheel if kind == "wheel" else build.build_editable)(str(tmp_path))
    installed = tmp_path / "installed"
    with ZipFile(tmp_path / name) as wheel:
        wheel.extractall(installed)
    paths = [line for file in installed.glob("*.pth") for line in file.read_text().splitlines()]
    assert bool(paths) == (kind == "editable")
    done = run_installed("--version", path=[installed, *paths])
    assert (done.stdout, done.stderr) == (f"diffusers-dtr {diffusers_dtr.__version__}\n", "set()\n")


def test_a_command_runs_through_the_entry_point(tmp_path, capsys):
    assert light.main(["inspect", str(tmp_path)]) == 2
    assert "There is no diffusers model" in capsys.readouterr().err


def test_an_unknown_option_shows_those_of_its_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", "model", "--labels", "cat"])
    error = capsys.readouterr().err
    assert error.startswith("usage: diffusers-dtr inspect ")
    assert error.endswith("diffusers-dtr inspect: error: unrecognized arguments: --labels cat\n")


# ---- the Hub

COMMAND_LINES = [
    ["inspect", "owner/tiny"],
    ["card", "owner/tiny", "--output", "card"],
    ["card", "owner/tiny", "--push"],
    ["sample", "owner/tiny", "--output", "grid.png"],
    ["convert", "owner/tiny", "new"],
]
every_command = pytest.mark.parametrize("arguments", COMMAND_LINES, ids=lambda arguments: " ".join(arguments[::2]))


@every_command
def test_a_hub_that_never_answers_is_given_up(hub, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    HfApi().create_repo("owner/tiny")
    hub.faults.append(NeverAnswer(method=".*", path=".", times=100))
    before, start = get_session().timeout, time.monotonic()
    assert cli.main([*arguments, "--timeout", "0.5"]) == 2
    assert time.monotonic() - start < 10
    assert "answer" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []
    # The limit holds for the command alone.
    assert (get_session().timeout, len(get_session().event_hooks["request"])) == (before, 1)


@every_command
def test_an_invalid_token_is_refused_and_not_repeated(hub, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments, "--token=hf_secret\n"])
    error = capsys.readouterr().err
    assert "argument --token: `token` must be printable ASCII" in error
    assert "secret" not in error
    assert hub.requests == []
