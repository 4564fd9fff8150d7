"""Python that loads a trained model, and its commands: code that people paste, of checked names and quoted values."""

from __future__ import annotations

import json
import keyword
import shlex
from typing import Any

from safetensors import SafetensorError, safe_open

from ..models.lora_files import file_routing
from ..models.routed_model import RoutedModelMixin
from ..run_record import LOCAL_PREFIX, LORA_FILE, RECORD_FILE
from .trained_model import Config, TrainedModel, is_class


def usage_code(model: TrainedModel, source: str) -> str:
    """Python that loads the model and samples it: the images that the run itself sampled at its end."""
    sampling = model.record.get("sampling")
    if sampling is None:
        kinds = {"prompt": "a prompt"}, {"class_labels": [0]}, {}
        sampling = kinds[0] if model.is_text_to_image else kinds[1] if model.num_classes else kinds[2]
    for name in sampling:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"`sampling` of {RECORD_FILE} must hold arguments of the pipeline, got {name!r:.60}.")
    lines = _load_adapter(model, _python(source)) if model.is_adapter else _load_pipeline(model, _python(source))
    arguments = [f"{name}={_python(value)}" for name, value in sampling.items()]
    arguments.append("generator=torch.Generator().manual_seed(0)")
    return "\n".join(["import torch", *lines, "images = pipe(", *(f"    {part}," for part in arguments), ").images"])


def _load_pipeline(model: TrainedModel, source: str) -> list[str]:
    name = model.pipeline_class
    load = ["", f"pipe = {name}.from_pretrained({source})"]
    if name == "DTRPipeline":
        return ["from diffusers_dtr import DTRPipeline", *load]
    return [f"from diffusers import {name}", "import diffusers_dtr  # lets diffusers find the routed model", *load]


def _load_adapter(model: TrainedModel, source: str) -> list[str]:
    base = model.hub_id("pretrained_model_name_or_path") or f"{LOCAL_PREFIX}base-model"
    routed_class = model.config["_class_name"]
    if not is_class(routed_class, RoutedModelMixin):
        raise ValueError(
            f"`model: class` of {RECORD_FILE} must be a class of diffusers_dtr, got {routed_class!r:.60}."
        )
    component = "unet" if "UNet" in routed_class else "transformer"
    routing = [
        f"{key}={_python(model.config[key])}"
        for key in sorted(Config.__annotations__)
        if key.startswith("routing_") and key in model.config
    ]
    try:
        adapter_is_routed = bool(file_routing(model.folder / LORA_FILE))
        with safe_open(model.folder / LORA_FILE, framework="numpy") as weights:
            of_pipeline = any(key.startswith(f"{component}.") for key in weights.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{LORA_FILE} must be safetensors: {error}") from error
    lines = [
        "from diffusers import DiffusionPipeline",
        f"from diffusers_dtr import {'load_routed_lora' if adapter_is_routed else 'route'}",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({_python(base)})",
    ]
    if not adapter_is_routed:
        lines.append(f"pipe.{component} = route(pipe.{component}, {', '.join(routing)})")
    if model.scheduler:  # with the prediction and the noise levels that were trained
        lines.append(f'pipe.scheduler = type(pipe.scheduler).from_pretrained({source}, subfolder="scheduler")')
    if adapter_is_routed:
        return [*lines, f"load_routed_lora({'pipe' if of_pipeline else f'pipe.{component}'}, {source})"]
    if of_pipeline:
        return [*lines, f"pipe.load_lora_weights({source})"]
    # What a pipeline without `load_lora_weights` has, such as PixArt's.
    return [*lines, f'pipe.{component}.load_lora_adapter({source}, weight_name="{LORA_FILE}", prefix=None)']


def _python(value: Any) -> str:
    """A literal of Python: text in double quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


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
