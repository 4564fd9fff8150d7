"""Values for a card's code and commands, which people paste: names are checked, values are quoted."""

from __future__ import annotations

import json
import keyword
import shlex
from typing import Any

from markupsafe import Markup
from safetensors import safe_open

from ..models.lora_header import file_routing
from ..models.routed_model import RoutedModelMixin
from ..run_record import LOCAL_PREFIX, LORA_FILE, RECORD_FILE
from .trained_model import Config, TrainedModel, is_class


def sampling_arguments(model: TrainedModel) -> dict[str, Any]:
    """Arguments of the pipeline's call: those of the images that the run itself sampled at its end, or an example."""
    example = {"prompt": "a prompt"} if model.is_text_to_image else {"class_labels": [0]} if model.num_classes else {}
    sampling = model.record.get("sampling", example)
    for name in sampling:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"`sampling` of {RECORD_FILE} must hold arguments of the pipeline, got {name!r:.60}.")
    return sampling


def adapter(model: TrainedModel) -> dict[str, Any] | None:
    """How LoRA weights are loaded, or None for a pipeline."""
    if not model.is_adapter:
        return None
    routed_class, path = model.config["_class_name"], model.folder / LORA_FILE
    if not is_class(routed_class, RoutedModelMixin):
        raise ValueError(
            f"`model: class` of {RECORD_FILE} must be a class of diffusers_dtr, got {routed_class!r:.60}."
        )
    component = "unet" if "UNet" in routed_class else "transformer"
    is_routed = bool(file_routing(path))
    with safe_open(path, framework="numpy") as weights:
        of_pipeline = any(key.startswith(f"{component}.") for key in weights.keys())  # noqa: SIM118 - not a dictionary
    known = sorted(name for name in Config.__annotations__ if name.startswith("routing_"))
    routing = {name: model.config[name] for name in known if name in model.config}
    base = model.hub_id("pretrained_model_name_or_path") or f"{LOCAL_PREFIX}base-model"
    return {"component": component, "base": base, "file": LORA_FILE, "routing": routing} | {
        "is_routed": is_routed,
        "of_pipeline": of_pipeline,
    }


def python_literal(value: Any) -> Markup:
    """A literal of Python: text in double quotes."""
    if isinstance(value, list):
        return Markup(f"[{', '.join(map(python_literal, value))}]")
    return Markup(json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value))


def wrap_command(command: str, width: int = 100) -> str:
    """A command over several lines of about `width` characters, broken before flags, still to be typed as it is."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"`command` must be quoted for a shell, got {command!r:.60}: {error}.") from error
    if command and words[:1] != ["python"] and words[:2] != ["accelerate", "launch"]:
        raise ValueError(f"`command` must begin with `accelerate launch` or `python`, got {command!r:.60}.")
    pieces: list[str] = []
    for word in words:
        if word.startswith("--") or not pieces:
            pieces.append(shlex.quote(word))
        else:
            pieces[-1] += f" {shlex.quote(word)}"
    lines = pieces[:1]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) < width:
            lines[-1] += f" {piece}"
        else:
            lines.append(f"  {piece}")
    return " \\\n".join(lines)
