"""The commands of `diffusers-dtr`: one module each, with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..user_errors import exit_code
from . import card, convert, inspect, sample
from .command import COMMANDS, command_parser
from .options import add_hub_arguments
from .time_limit import waiting_at_most


_MODULES = {"card": card, "convert": convert, "inspect": inspect, "sample": sample}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 2 after an error that the user can fix, which is one line on stderr."""
    parser, subparsers = command_parser()
    for name, module in _MODULES.items():
        command = subparsers.add_parser(
            name,
            help=COMMANDS[name],
            description=f"{COMMANDS[name]}\n\n{module.DESCRIPTION}",
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        add_hub_arguments(command)
        command.set_defaults(run=module.run)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        # By the command's own parser, which shows the options that there are
        subparsers.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return exit_code(f"diffusers-dtr {args.command}", _run, args)


def _run(args: argparse.Namespace) -> None:
    with waiting_at_most(args.timeout):
        args.run(args)
