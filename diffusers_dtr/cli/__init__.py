"""The commands of `diffusers-dtr`: one module each, with `add_parser(subparsers)` and `run(args)`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..user_errors import exit_code
from . import card, convert, inspect, sample
from .command import command_parser
from .time_limit import waiting_at_most


_COMMANDS = (card, convert, inspect, sample)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 2 after an error that the user can fix, which is one line on stderr."""
    parser, subparsers = command_parser()
    for command in _COMMANDS:
        command.add_parser(subparsers)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        # By the command's own parser, which shows the options that there are
        subparsers.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return exit_code(f"diffusers-dtr {args.command}", _run, args)


def _run(args: argparse.Namespace) -> None:
    with waiting_at_most(args.timeout):
        args.run(args)
