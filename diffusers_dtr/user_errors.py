"""An error that the user can fix is one line on stderr and exit code 2; anything else is a bug, with a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.errors import EntryNotFoundError, HTTPError, SafetensorsParsingError
from safetensors import SafetensorError


__all__ = ["run_script"]

# Arguments, files, the network, missing extras, a run that diverges. `HTTPError` is that of the Hub client's
# transport, whose package depends on the client's version.
USER_ERRORS = (
    *(ValueError, OSError, ImportError, FloatingPointError),
    *(HTTPError, EntryNotFoundError, SafetensorsParsingError, SafetensorError),
)


def run_script(main: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    """Run the main function of a script, and exit.

    Args:
        main: Called with the other arguments. What it raises and is none of `USER_ERRORS` is raised.
        *args: Passed on.
        **kwargs: Passed on.

    Raises:
        SystemExit: With what [`exit_code`] returns.
    """
    sys.exit(exit_code(Path(sys.argv[0]).name, main, *args, **kwargs))


def exit_code(program: str, main: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Run a program's main function; 0, or 2 after an error of its user, which becomes one line on stderr."""
    try:
        main(*args, **kwargs)
    except USER_ERRORS as error:
        print(f"{program}: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def printable(text: str) -> str:
    """A text without what a terminal would take for commands: files may hold anything."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _one_line(error: BaseException) -> str:
    text = str(error)
    if "\nOriginal Traceback (most recent call last):\n" in text:
        # What a process that loads data has raised: its traceback, and `ValueError: message` in the last line
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return printable(" ".join(text.split()) or type(error).__name__)
