"""What a user can mend is one line and exit code 2; a bug shows where it is."""

import sys

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from diffusers_dtr.user_errors import exit_code, run_script


def fail(error):
    raise error


@pytest.mark.parametrize("kind", [ValueError, OSError, ImportError, LocalEntryNotFoundError])
def test_an_error_of_the_user_is_one_line_without_a_terminals_commands(kind, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/train.py", "--flag"])
    with pytest.raises(SystemExit, match="2"):
        run_script(fail, kind("`--flag` must be\n  less \x1b[31m and\x07"))
    assert capsys.readouterr().err == "train.py: `--flag` must be less \ufffd[31m and\ufffd\n"


@pytest.mark.parametrize("kind", [KeyError, TypeError, RuntimeError, AssertionError])
def test_a_bug_is_raised(kind):
    with pytest.raises(kind):
        run_script(fail, kind("a bug"))


def test_a_script_that_ends_well_exits_with_zero():
    with pytest.raises(SystemExit, match="0"):
        run_script(print, end="")


class Unreadable(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ValueError(f"image {index} cannot be read")


def test_an_error_of_a_process_that_loads_data_is_shown_without_its_traceback(capsys):
    loader = torch.utils.data.DataLoader(Unreadable(), num_workers=1)
    assert exit_code("train.py", list, loader) == 2
    assert capsys.readouterr().err == "train.py: image 0 cannot be read\n"


def test_an_error_without_a_message_is_named(capsys):
    assert exit_code("train.py", fail, ConnectionResetError()) == 2
    assert capsys.readouterr().err == "train.py: ConnectionResetError\n"
