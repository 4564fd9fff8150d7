"""The command `diffusers-dtr`, whose help and version import nothing large.

An installation has this file as a module of its own beside the package, because importing that takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version


COMMANDS = {
    "card": "Write the model card of a pipeline or training run, or renew it.",
    "convert": "Convert checkpoints of the original DiT, DTR and ANT code to pipelines, and back.",
    "inspect": "Say what a saved model is: routing, clusters, parameters, scheduler.",
    "sample": "Draw a grid of images from a class-conditional or unconditional pipeline.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, as [`diffusers_dtr.cli.main`] does."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        parser, subparsers = command_parser()
        for command, summary in COMMANDS.items():
            subparsers.add_parser(command, help=summary)
        parser.parse_args(argv)
    from diffusers_dtr import cli

    return cli.main(argv)


def command_parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    """The command's parser, and the subparsers action that its commands are added to."""
    parser = argparse.ArgumentParser(
        prog="diffusers-dtr",
        description="Denoising Task Routing for diffusers: convert, sample and look at routed models.",
        epilog="`diffusers-dtr COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"diffusers-dtr {version('diffusers-dtr')}")
    return parser, parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
