"""What the commands' parsers share."""

from __future__ import annotations

import argparse


def new_parser(subparsers, name: str, summary: str, description: str, example: str) -> argparse.ArgumentParser:
    """Add the parser of a command.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.
        name: The command.
        summary: One line for the list of commands.
        description: What it does, for its own help.
        example: Command lines that show it, for the end of its help.

    Returns:
        The parser.
    """
    return subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary}\n\n{description}",
        epilog=f"examples:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for what is on the Hub."""
    group = parser.add_argument_group("Hub")
    group.add_argument("--revision", help="Branch, tag or commit of a repository. Its main branch by default.")
    group.add_argument(
        "--token",
        help="Access token. Better leave it out of the command line: `hf auth login` or the variable HF_TOKEN "
        "serve all commands.",
    )
