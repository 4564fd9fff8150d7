"""Model cards: a template filled in from the files of a trained model's folder. Text that a user wrote stays.

Whatever comes out of a file is data. The template's environment escapes every value for Markdown and HTML; in code,
which people paste, names are checked and values are quoted.
"""

from __future__ import annotations

import html
import json
import logging
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import yaml_dump
from markupsafe import Markup

from ..atomic_files import replace_text, replacing
from ..config_types import built_from_file, read_cleaned, without_controls
from ..hub import check_token
from ..run_record import LOCAL_PREFIX, LOSSES_PICTURE, METRICS_FILE, RECORD_FILE, public_command, publishable
from ..visualization import copy_drawing, draw_routing_masks, spaced_grid
from .trained_model import METRIC, TrainedModel, is_repo_id


logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
_MASKS, _SAMPLES = "figures/routing_masks.png", "figures/samples.png"
# The card, and what it shows and links to; patterns as `huggingface_hub` takes them.
CARD_FILES = (CARD_FILE, "figures/*.png", LOSSES_PICTURE, RECORD_FILE, METRICS_FILE)

_SECTION = re.compile("<!-- diffusers-dtr:begin .*?<!-- diffusers-dtr:end -->", re.DOTALL)
_METADATA = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


def build_model_card(
    folder: str | Path, *, repo_id: str | None = None, name: str | None = None, license: str | None = None
) -> ModelCard:
    """Build a new card for a trained model; its pictures are drawn by [`save_model_card`].

    Args:
        folder: A pipeline or the output of a training script, LoRA weights too. What it does not have is left out of
            the card.
        repo_id: Repository on the Hub; the record's `hub_model_id` by default.
        name: What the model is called; by default like its repository, or else like its folder.
        license: License of the model, as the Hub names it.

    Raises:
        ValueError: If `folder` holds no model, or a file in it is not what it should be.
    """
    model = TrainedModel(Path(folder))
    repo_id = repo_id or model.arguments.get("hub_model_id")
    if repo_id is not None and not is_repo_id(repo_id):
        raise ValueError(f"`repo_id` must be the name of a repository such as owner/model, got {repo_id!r:.60}.")
    name = _one_line(without_controls(name or Path(repo_id or model.folder.resolve()).name))
    with built_from_file("A card"):
        text = _template().render(
            vars(model),
            name=name,
            metadata=Markup(yaml_dump(_metadata(model, name, license), sort_keys=False)),
            source=repo_id or f"{LOCAL_PREFIX}{name}",
            active_channels=", ".join(f"{int(model.config.get('routing_beta', 1) * w)} of {w}" for w in model.widths),
            masks_picture=Markup(_MASKS),
            samples_picture=Markup(_SAMPLES),
        )
    return ModelCard(text)


def save_model_card(
    folder: str | Path,
    *,
    card_dir: str | Path | None = None,
    repo_id: str | None = None,
    name: str | None = None,
    license: str | None = None,
    published: str | None = None,
) -> Path:
    """Write a model's card, or renew its metadata and its generated section, draw its figures, and return its path.

    Everything outside the section stays, and so do keys of the metadata that a new card would not have, and the title,
    whatever the `name`. `card_dir` is the folder to write the card into, with copies of the files that it links to;
    `folder` by default. `published` is the card in the repository that the result will be pushed to: its text stays,
    unless the one in the folder was edited. The other arguments are those of [`build_model_card`].

    Raises:
        ImportError: Without matplotlib.
        ValueError: As [`build_model_card`], or if the metadata of an existing card are not a YAML dictionary.
    """
    folder = Path(folder)
    card_dir = folder if card_dir is None else Path(card_dir)
    card = str(build_model_card(folder, repo_id=repo_id, name=name, license=license))
    there = next((path for path in (card_dir / CARD_FILE, folder / CARD_FILE) if path.is_file()), None)
    existing = [there.read_bytes().decode()] if there else []
    existing += [] if published is None else [published]
    card = _renewed(existing, card, [card, str(build_model_card(folder, repo_id=repo_id))])
    _write_figures(TrainedModel(folder), card_dir)
    with replacing(card_dir / CARD_FILE) as partial:
        partial.write_bytes(card.encode())  # as bytes, because line endings stay too
    return card_dir / CARD_FILE


def fetch_card(repo_id: str, *, token: str | None = None, revision: str | None = None) -> str | None:
    """The card in a repository, where it may have been edited; None if there is none, or no such revision yet.

    Args:
        repo_id: Model repository on the Hub.
        token: Token, or None for the one that is logged in.
        revision: Branch, tag or commit. Default `main`.

    Raises:
        OSError: If there is no such repository or the Hub cannot be reached.
        ValueError: For an invalid `token`.
    """
    check_token(token)
    try:
        path = hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_bytes().decode()


def save_metrics(folder: str | Path, metrics: Sequence[dict[str, Any]], argv: Sequence[str]) -> Path:
    """Save an evaluation's metrics of a model, for its card, and return the file's path.

    Args:
        folder: The model's folder. What `metrics.json` there says of metrics with other names stays.
        metrics: For each its `name`, its `type` (as the Hub calls it: accuracy, fid, mse), its `value` and its
            `settings`, a dictionary, and optionally the `dataset` it was measured on.
        argv: The command that measured, as in `sys.argv`.
    """
    path = Path(folder) / METRICS_FILE
    new = [publishable({**metric, "command": public_command(argv, ["python"])}) for metric in metrics]
    names = {metric["name"] for metric in new}
    known = [metric for metric in read_cleaned(path, [METRIC], []) if metric.get("name") not in names]
    _write_json([*known, *new], path)
    return path


def _metadata(model: TrainedModel, name: str, license: str | None) -> dict[str, Any]:
    """What the Hub indexes."""
    task = "text-to-image" if model.is_text_to_image else "unconditional-image-generation"  # the Hub has no other
    tags = ["diffusers", "diffusers-dtr", "denoising-task-routing"]
    tags += ["class-conditional-image-generation"] if model.num_classes else []
    tags += ["lora"] if model.is_adapter else []
    measured = model.metrics
    if "validation_loss" in model.results:
        held_out = {"name": "Held-out denoising loss", "type": "mse", "settings": model.held_out_settings}
        measured = [{**held_out, "value": round(model.results["validation_loss"], 5)}, *measured]
    results = []
    for metric in measured:
        dataset = metric.get("dataset") or model.dataset
        named = {"name": dataset or "a folder of images", "type": dataset or "imagefolder"}
        value = {"type": metric["type"], "value": metric["value"], "name": metric["name"]}
        value |= {"args": metric["settings"]} if metric.get("settings") else {}
        results.append({"task": {"type": task}, "dataset": named, "metrics": [value]})
    metadata = {
        "license": license,
        "library_name": "diffusers",
        "pipeline_tag": task,
        "base_model": model.base,
        "base_model_relation": model.base and ("adapter" if model.is_adapter else "finetune"),
        "datasets": model.dataset and [model.dataset],
        "tags": tags,
        "metrics": sorted({metric["type"] for metric in measured}),
        "model-index": [{"name": name, "results": results}] if results else None,
    }
    return {key: value for key, value in metadata.items() if value}


# ---- an existing card


def _renewed(existing: list[str], card: str, pristine: list[str]) -> str:
    """The first text of `existing` that a user edited, or else the last, with metadata and section of `card`."""
    untouched = [_own_text(text) for text in pristine]
    edited = [text for text in existing if _own_text(text) not in untouched]
    if len({_own_text(text) for text in edited}) > 1:
        logger.warning(
            "The card was edited both here and in its repository: what was written here stays, and the repository's "
            "history has the other."
        )
    kept = [*edited[:1], *existing[::-1], card][0]
    metadata = {}
    for text in [*existing[::-1], card]:
        new = _read_metadata(text)
        tags = [*(new.get("tags") or []), *(metadata.get("tags") or [])]
        metadata |= {**new, "tags": list(dict.fromkeys(tags))}
    section = _SECTION.search(card)[0]
    body = _SECTION.sub(lambda _: section, _METADATA.sub("", kept.replace("\r\n", "\n")), count=1)
    if section not in body:
        logger.warning("The card has no `diffusers-dtr:begin` and `:end` any more: only its metadata were renewed.")
    text = f"---\n{yaml_dump(metadata, sort_keys=False)}---\n{body}"
    return text.replace("\n", "\r\n") if "\r\n" in kept else text


def _own_text(text: str) -> str:
    return _SECTION.sub("", _METADATA.sub("", text.replace("\r\n", "\n")), count=1).strip()


def _read_metadata(card: str) -> dict[str, Any]:
    block = _METADATA.match(card.replace("\r\n", "\n"))
    try:
        metadata = yaml.safe_load(block[1]) or {} if block else {}
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of {CARD_FILE} must be YAML: {_one_line(str(error))}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"The metadata of {CARD_FILE} must be a dictionary, got {metadata!r:.60}.")
    return metadata


# ---- what the template does with values


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        loader=jinja2.PackageLoader("diffusers_dtr.model_card", ""),
    )
    environment.filters |= {"code": _code_span, "fenced": _fenced, "link": _link}
    environment.filters |= {"python": _python_literal, "wrapped": _wrapped}
    return environment.get_template("template.md.jinja")


# All that Markdown or the Hub's renderer would take for more than text.
_SPECIAL = re.compile(r"[\\`*{}\[\]#|~$!@^]|(?<![^\W_])_|_(?![^\W_])|^[-+=]|:(?=/)|(?<=www)\.", re.IGNORECASE)


def _escaped(value: Any) -> Any:
    """Text in one line that stays text in Markdown and HTML; floats with four digits."""
    if isinstance(value, Markup):
        return value
    text = _one_line(f"{value:.4g}" if isinstance(value, float) else str(value))
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", text))  # and numbers of a list
    return Markup(html.escape(text, quote=False))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _code_span(text: str) -> Markup:
    return Markup("`{}`").format(Markup(_one_line(text).replace("`", "").replace("|", "\\|")))


def _fenced(text: str, language: str) -> Markup:
    """A block of code that nothing in it ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def _link(repo_id: str, prefix: str = "") -> Markup:
    """A link to a repository, whose name was checked."""
    return Markup(f"[{_escaped(repo_id)}](https://huggingface.co/{prefix}{repo_id})")


def _python_literal(value: Any) -> Markup:
    """A literal of Python: text in double quotes."""
    if isinstance(value, list):
        return Markup(f"[{', '.join(map(_python_literal, value))}]")
    return Markup(json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value))


def _wrapped(command: str) -> str:
    """A command with a line for every flag, still to be typed as it is."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"`command` must be quoted for a shell, got {command!r:.60}: {error}.") from error
    if words[:1] != ["python"] and words[:2] != ["accelerate", "launch"]:
        raise ValueError(f"`command` must begin with `accelerate launch` or `python`, got {command!r:.60}.")
    return "".join((" \\\n  " if word.startswith("--") else " ") + shlex.quote(word) for word in words).strip()


# ---- files


def _write_figures(model: TrainedModel, card_dir: Path) -> None:
    (card_dir / _MASKS).parent.mkdir(parents=True, exist_ok=True)
    if model.shows_masks:
        figure = draw_routing_masks(
            model.widths[:1],
            alpha=model.config.get("routing_alpha", 4.0),
            beta=model.config["routing_beta"],
            timestep_range=model.timestep_range,
        )
        figure.savefig(card_dir / _MASKS, dpi=100)
    if model.samples is not None:
        spaced_grid(model.samples, model.arguments.get("resolution")).save(card_dir / _SAMPLES, optimize=True)
    if card_dir != model.folder:
        if model.has_losses_picture:
            copy_drawing(model.folder / LOSSES_PICTURE, card_dir / LOSSES_PICTURE)
        for name, content in ((RECORD_FILE, model.record), (METRICS_FILE, model.metrics)):
            if content:
                _write_json(content, card_dir / name)


def _write_json(content: Any, path: Path) -> None:
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
