"""The command `diffusers-dtr`: one module per subcommand, each with `add_parser(subparsers)` and `run(args)`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from huggingface_hub.errors import EntryNotFoundError, HTTPError, SafetensorsParsingError
from safetensors import SafetensorError

from . import card, convert, inspect, sample


_COMMANDS = (card, convert, inspect, sample)

# What users can do something about: arguments, files, the network, missing extras. Anything else is a bug, and shows
# as one. `HTTPError` is that of the Hub client's transport, whose package depends on the client's version.
USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    HTTPError,
    EntryNotFoundError,
    SafetensorsParsingError,
    SafetensorError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments, without the program's name. Those of the process by default.

    Returns:
        Exit code: 0, or 2 after an error that is the user's to mend, which is one line on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="diffusers-dtr",
        description="Denoising Task Routing for diffusers: convert, sample and look at routed models.",
        epilog="`diffusers-dtr COMMAND --help` explains a command.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except USER_ERRORS as error:
        print(f"diffusers-dtr {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
