"""The commands of `diffusers-dtr`: one module each, with `add_parser(subparsers)` and `run(args)`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from huggingface_hub.errors import EntryNotFoundError, HTTPError, SafetensorsParsingError
from safetensors import SafetensorError

from diffusers_dtr_command import command_parser

from . import card, convert, inspect, sample
from .outputs import printable
from .time_limit import waiting_at_most


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
    parser, subparsers = command_parser()
    for command in _COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        with waiting_at_most(args.timeout):
            args.run(args)
    except USER_ERRORS as error:
        print(f"diffusers-dtr {args.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    cause: BaseException | None = error
    while cause is not None:
        # The transport's class for it is not always of one package.
        if isinstance(cause, HTTPError) and "Timeout" in type(cause).__name__:
            text = f"The Hub has not answered in time. Try again later, or give `--timeout` more seconds. ({text})"
            break
        cause = cause.__cause__ or cause.__context__
    return printable(text)
