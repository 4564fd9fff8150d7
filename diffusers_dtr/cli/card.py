"""`diffusers-dtr card`: write or renew the card of a trained model."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import snapshot_download

from ..hub import push_folder
from ..model_card.card import CARD_FILES, fetch_card, save_model_card


DESCRIPTION = """\
The card is README.md, with pictures in figures/. It is written from the training record, the configs, the
losses and samples of the run, and metrics.json. Renewing it renews its metadata and the section between
its two comments; the text around them, and keys of the metadata that are yours, stay as they are."""
EXAMPLES = """\
  diffusers-dtr card ./demo/pipeline --license mit
  diffusers-dtr card ./demo/pipeline --push --hub_model_id owner/digits
  diffusers-dtr card owner/digits --output digits-card"""

# All that a card is written from: no weights.
_SOURCES = [*CARD_FILES, "*.json", "*.jsonl", "samples/*.png", "*lora_weights.safetensors"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add = parser.add_argument
    add("model", metavar="FOLDER_OR_HUB_ID", help="A model's folder, or its repository on the Hub.")
    add("--name", help="What a new card calls the model. Default: the name of its repository or folder.")
    add("--license", help="License of the model, as the Hub names it, such as apache-2.0.")
    where = "Write the card and what it shows into this folder. By default into that of the model; needed for a "
    add("--output", metavar="FOLDER", help=f"{where}repository that is not pushed to.")
    add("--push", action="store_true", help="Upload the card and what it shows, in one commit.")
    repository = "Repository that the card is for, and is pushed to. By default the one given, or that of the record."
    add("--hub_model_id", metavar="ID", help=repository)


def run(args: argparse.Namespace) -> None:
    """Write the card."""
    folder = Path(args.model)
    remote = not folder.is_dir()
    if remote and args.output is None and not args.push:
        raise ValueError(
            f"{args.model!r} is not a folder. For a repository's card, give `--output FOLDER` or `--push`."
        )
    if args.push and not remote and args.hub_model_id is None:
        raise ValueError("`--push` of a folder's card needs the repository's name: `--hub_model_id owner/name`.")
    repo_id = args.hub_model_id or (args.model if remote else None)
    where = {"token": args.token, "revision": args.revision}
    with TemporaryDirectory() as temporary:
        if remote:
            folder = Path(temporary, folder.name)
            snapshot_download(args.model, **where, local_dir=folder, allow_patterns=_SOURCES)
        published = fetch_card(repo_id, **where) if remote or args.push else None
        texts = {"name": args.name, "license": args.license}
        card = save_model_card(folder, card_dir=args.output, repo_id=repo_id, published=published, **texts)
        if not args.push:
            print(card)
            return
        staging = Path(temporary, "push")
        for source in (path for pattern in CARD_FILES for path in card.parent.glob(pattern)):
            target = staging / source.relative_to(card.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        print(push_folder(staging, repo_id, "Renew the model card", **where).commit_url)
