"""Model cards, written from what lies in a trained model's folder: its record, configs, losses and samples."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

from ..atomic_files import replace_text
from ..publishing import public_command, publishable
from ..run_folder import LOSSES_PICTURE, METRICS_FILE, RECORD_FILE
from . import prose, tables
from .edits import latest_edit, refresh_card, seal_card
from .figures import FIGURES, MASKS_FILE, SAMPLES_FILE, copy_drawing, draw_figures, shows_masks
from .metadata import card_metadata, held_out_settings
from .trained_model import TrainedModel


__all__ = [
    "CARD_FILE",
    "CARD_FILES",
    "build_model_card",
    "fetch_card",
    "refresh_card",
    "save_metrics",
    "save_model_card",
]

CARD_FILE = "README.md"
# The card, and what it shows and links to; patterns as `huggingface_hub` takes them.
CARD_FILES = (CARD_FILE, f"{FIGURES}/*.png", LOSSES_PICTURE, RECORD_FILE, METRICS_FILE)

_TEMPLATE = Path(__file__).with_name("template.md")


def build_model_card(
    folder: str | Path, *, repo_id: str | None = None, name: str | None = None, license: str | None = None
) -> ModelCard:
    """Write the card of a trained model, as it is without any edits.

    Args:
        folder: A pipeline or the output of a training script, LoRA weights too. What it does not have is left out of
            the card.
        repo_id: Repository on the Hub; the record's `hub_model_id` by default.
        name: What the model is called; by default like its repository, or else like its folder.
        license: License of the model, as the Hub names it.

    Returns:
        The card. Its pictures are drawn by [`save_model_card`].

    Raises:
        ValueError: If `folder` holds no model, or a file in it is not what it should be.
    """
    model = TrainedModel(Path(folder))
    repo_id = repo_id or model.arguments.get("hub_model_id")
    name = name or Path(repo_id or model.folder.resolve()).name
    loss = model.record.get("results", {}).get("validation_loss")
    card = ModelCard.from_template(
        card_metadata(model, name, license),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        model=model,
        name=name,
        overview=prose.overview(model),
        samples=SAMPLES_FILE if model.last_samples() else None,
        samples_caption=prose.samples_caption(model),
        loading=prose.loading_code(model, repo_id, name),
        masks=MASKS_FILE if shows_masks(model) else None,
        routing_rows=tables.routing_rows(model) if model.is_routed else [],
        objective_rows=tables.objective_rows(model) if model.record else [],
        cluster_rows=tables.cluster_rows(model),
        losses_picture=LOSSES_PICTURE if (model.folder / LOSSES_PICTURE).is_file() else None,
        held_out_loss=None if loss is None else f"{loss:.5g}",
        held_out_settings=tables.settings_text(held_out_settings(model)),
        held_out_rows=tables.held_out_rows(model),
        metric_rows=tables.metric_rows(model),
        metric_commands=[prose.wrap_command(command) for command in model.metric_commands],
        command=prose.wrap_command(model.record.get("command", "")),
        training_rows=tables.training_rows(model),
        resolution=model.arguments.get("resolution"),
        base_model=model.hub_id("pretrained_model_name_or_path"),
    )
    # What a template leaves where there is nothing to say.
    return ModelCard(seal_card(re.sub(r"\n{3,}", "\n\n", f"{card}\n")))


def save_model_card(
    folder: str | Path,
    *,
    card_dir: str | Path | None = None,
    repo_id: str | None = None,
    name: str | None = None,
    license: str | None = None,
    published: str | None = None,
) -> Path:
    """Write or renew a model's card, with the figures that it shows. What was edited by hand stays.

    Args:
        folder: As in [`build_model_card`].
        card_dir: Folder to write the card into, with copies of the files that it links to; `folder` by default.
        repo_id: As in [`build_model_card`].
        name: As in [`build_model_card`].
        license: As in [`build_model_card`].
        published: The card as it is in the repository that the result will be pushed to, where it may have been
            edited too.

    Returns:
        The card's path.

    Raises:
        ImportError: Without matplotlib.
        ValueError: As [`build_model_card`].
    """
    folder = Path(folder)
    card_dir = folder if card_dir is None else Path(card_dir)
    generated = str(build_model_card(folder, repo_id=repo_id, name=name, license=license))
    path = card_dir / CARD_FILE
    draw_figures(TrainedModel(folder), card_dir)
    if card_dir != folder:
        _copy_linked(TrainedModel(folder), card_dir)
    local = _read(path)
    card = latest_edit(_read(folder / CARD_FILE) if local is None else local, published)
    # As bytes, because the line endings of an edited card stay too.
    path.write_bytes((generated if card is None else refresh_card(card, generated)).encode())
    return path


def fetch_card(repo_id: str, *, token: str | None = None, revision: str | None = None) -> str | None:
    """The card in a repository, where it may have been edited, for [`save_model_card`].

    Args:
        repo_id: Model repository on the Hub.
        token: Token, or None for the one that is logged in.
        revision: Branch, tag or commit. Default `main`.

    Returns:
        The card, or None if the repository has none, or no such revision yet.

    Raises:
        OSError: If there is no such repository or the Hub cannot be reached.
    """
    try:
        path = hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None
    return _read(Path(path))


def save_metrics(folder: str | Path, metrics: Sequence[dict[str, Any]], argv: Sequence[str]) -> Path:
    """Write down what was measured of a model, for its card.

    Args:
        folder: The model's folder. What `metrics.json` there says of metrics with other names stays.
        metrics: For each its `name`, its `type` (as the Hub calls it: accuracy, fid, mse), its `value` and its
            `settings`, a dictionary, and optionally the `dataset` it was measured on.
        argv: The command that measured, as in `sys.argv`.

    Returns:
        The file's path.
    """
    path = Path(folder) / METRICS_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    new = [publishable({**metric, "command": public_command(argv, ["python"])}) for metric in metrics]
    names = {metric["name"] for metric in new}
    entries = [*(metric for metric in known if metric["name"] not in names), *new]
    _write_json(entries, path)
    return path


def _copy_linked(model: TrainedModel, card_dir: Path) -> None:
    if (model.folder / LOSSES_PICTURE).is_file():
        copy_drawing(model.folder / LOSSES_PICTURE, card_dir / LOSSES_PICTURE)
    for name, content in ((RECORD_FILE, model.record), (METRICS_FILE, model.metrics)):
        if content:
            _write_json(content, card_dir / name)


def _write_json(content: Any, path: Path) -> None:
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _read(path: Path) -> str | None:
    return path.read_bytes().decode() if path.is_file() else None
