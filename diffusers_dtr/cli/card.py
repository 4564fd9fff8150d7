"""`diffusers-dtr card`: write or renew the card of a trained model."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import snapshot_download

from ..hub import push_folder
from ..model_card.card import CARD_FILES, fetch_card, save_model_card
from .options import add_hub_arguments, new_parser


# All that a card is written from: no weights.
_SOURCES = (*CARD_FILES, "*.json", "*.jsonl", "samples/*.png", "*lora_weights.safetensors")

_EXAMPLE = """\
  diffusers-dtr card ./demo/pipeline --license mit
  diffusers-dtr card ./demo/pipeline --push --hub_model_id owner/digits
  diffusers-dtr card owner/digits --output digits-card"""


def add_parser(subparsers) -> None:
    """Add the command's parser."""
    parser = new_parser(
        subparsers,
        "card",
        "The card is README.md, with pictures in figures/. It is written from the training record, the configs, the\n"
        "losses and samples of the run, and metrics.json. Renewing it renews its metadata and the section between\n"
        "its two comments; the text around them, and keys of the metadata that are yours, stay as they are.",
        _EXAMPLE,
    )
    parser.add_argument("model", metavar="FOLDER_OR_HUB_ID", help="A model's folder, or its repository on the Hub.")
    parser.add_argument(
        "--name", help="What a new card calls the model. Default: the name of its repository or folder."
    )
    parser.add_argument("--license", help="License of the model, as the Hub names it, such as apache-2.0.")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="Write the card and what it shows into this folder. By default into that of the model; needed for a "
        "repository that is not pushed to.",
    )
    parser.add_argument("--push", action="store_true", help="Upload the card and what it shows, in one commit.")
    parser.add_argument(
        "--hub_model_id",
        metavar="ID",
        help="Repository that the card is for, and is pushed to. By default the one given, or that of the record.",
    )
    add_hub_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the card."""
    remote = not Path(args.model).is_dir()
    if remote and args.output is None and not args.push:
        raise ValueError(
            f"{args.model!r} is not a folder. For a repository's card, give `--output FOLDER` or `--push`."
        )
    if args.push and not remote and args.hub_model_id is None:
        raise ValueError("`--push` of a folder's card needs the repository's name: `--hub_model_id owner/name`.")
    repo_id = args.hub_model_id or (args.model if remote else None)
    with TemporaryDirectory() as temporary:
        folder = Path(args.model)
        if remote:
            folder = Path(temporary, folder.name)
            snapshot_download(
                args.model, revision=args.revision, token=args.token, local_dir=folder, allow_patterns=list(_SOURCES)
            )
        card = save_model_card(
            folder,
            card_dir=args.output,
            repo_id=repo_id,
            name=args.name,
            license=args.license,
            published=fetch_card(repo_id, token=args.token, revision=args.revision) if remote or args.push else None,
        )
        if args.push:
            print(_push(card.parent, Path(temporary, "push"), repo_id, args.token, args.revision))
        else:
            print(card)


def _push(card_dir: Path, staging: Path, repo_id: str, token: str | None, revision: str | None) -> str:
    for source in (path for pattern in CARD_FILES for path in card_dir.glob(pattern)):
        target = staging / source.relative_to(card_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return push_folder(staging, repo_id, "Renew the model card", token=token, revision=revision).commit_url
