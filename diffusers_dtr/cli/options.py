"""Flags and outputs that the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..atomic_files import creating
from ..hub import check_token
from ..ranges import POSITIVE


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for access to the Hub."""
    add = parser.add_argument_group("Hub").add_argument
    add("--revision", help="Branch, tag or commit of a repository. Its main branch by default.")
    add(
        "--token",
        type=token,
        help="Access token. Better leave it out of the command line: `hf auth login` or the variable HF_TOKEN "
        "serve all commands.",
    )
    wait = "Give up when the Hub has not answered for this long. Default: %(default)g."
    add("--timeout", type=POSITIVE, default=60.0, metavar="SECONDS", help=wait)


def token(text: str) -> str:
    """Parse an access token; argparse would repeat it in the error after a ValueError."""
    try:
        return check_token(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@contextmanager
def new_output(path: str, suffix: str = "") -> Iterator[Path]:
    """A path to write a command's output to, as `creating` yields it; its name must end in `suffix`."""
    if suffix and Path(path).suffix != suffix:
        raise ValueError(f"The output must end in `{suffix}`, got {path!r}.")
    with creating(path) as partial:
        yield partial
