"""Parts shared by the commands' parsers."""

from __future__ import annotations

import argparse

from ..hub import check_token
from ..ranges import POSITIVE
from .command import COMMANDS


def new_parser(subparsers, name: str, description: str, example: str) -> argparse.ArgumentParser:
    """Add the parser of a command, whose help ends with example command lines."""
    return subparsers.add_parser(
        name,
        help=COMMANDS[name],
        description=f"{COMMANDS[name]}\n\n{description}",
        epilog=f"examples:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for access to the Hub."""
    group = parser.add_argument_group("Hub")
    group.add_argument("--revision", help="Branch, tag or commit of a repository. Its main branch by default.")
    group.add_argument(
        "--token",
        type=token,
        help="Access token. Better leave it out of the command line: `hf auth login` or the variable HF_TOKEN "
        "serve all commands.",
    )
    group.add_argument(
        "--timeout",
        type=POSITIVE,
        default=60.0,
        metavar="SECONDS",
        help="Give up when the Hub has not answered for this long. Default: %(default)g.",
    )


def token(text: str) -> str:
    """Parse an access token; argparse would repeat it in the error after a ValueError."""
    try:
        return check_token(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
