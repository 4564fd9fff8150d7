"""What the files of a trained model's folder say, which anybody may have written: every value is checked."""

from __future__ import annotations

import keyword
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

import diffusers_dtr

from ..config_types import read_cleaned
from ..models.lora_header import file_routing
from ..models.routed_model import RoutedModelMixin
from ..routing import DEFAULT_TIMESTEP_RANGE
from ..run_record import (
    LOCAL_PREFIX,
    LORA_FILE,
    LOSSES_PICTURE,
    METRICS_FILE,
    PIPELINE_INDEX,
    RECORD_FILE,
    publishable,
)


# The types of values that more is done with than to show them; all may be missing.
_ROUTING = {"routing_type": str, "routing_alpha": float, "routing_beta": float, "routing_seed": int}
_ROUTING |= {"routing_timestep_range": list[float]}
_CONFIG = _ROUTING | {"_class_name": str, "num_embeds_ada_norm": int, "num_class_embeds": int}
_NAMES = ("dataset_name", "pretrained_model_name_or_path", "hub_model_id")
_COUNTS = ("resolution", "train_batch_size", "gradient_accumulation_steps", "max_train_steps")
_RECORD = {
    "command": str,
    "num_images": int,
    "num_processes": int,
    "seconds": float,
    "arguments": dict.fromkeys(_NAMES, str) | dict.fromkeys(_COUNTS, int),
    "model": {
        **{"class": str, "config": _CONFIG, "adapter_routing": _CONFIG, "routed_widths": list[int]},
        **{"num_parameters": int, "num_trained_parameters": int},
    },
    "clusters": {"boundaries": list[int], "timesteps": list[float]},
    "results": dict[str, float],
    "held_out": dict,
    "sampling": dict,
    "versions": dict,
    "changed_settings": [{"setting": str}],
}
METRIC = {"name": str, "type": str, "value": float, "command": str, "dataset": str, "settings": dict}


class TrainedModel:
    """What a card says of a folder, by the template's names for it: without nulls and control characters."""

    def __init__(self, folder: Path):
        files = (PIPELINE_INDEX, RECORD_FILE, LORA_FILE)
        if not any((folder / name).is_file() for name in files):
            raise ValueError(f"`folder` must hold one of {', '.join(files)}, got {str(folder)!r}.")
        self.folder = folder
        self.record = publishable(read_cleaned(folder / RECORD_FILE, _RECORD, {}))
        self.metrics = publishable(read_cleaned(folder / METRICS_FILE, [METRIC], []))
        for metric in self.metrics:
            if not metric.keys() >= {"name", "type", "value"}:
                raise ValueError(f"{METRICS_FILE} must have a `name`, `type` and finite `value`, got {metric!r:.60}.")
        index = read_cleaned(folder / PIPELINE_INDEX, {"_class_name": str, "id2label": dict[str, str]}, {})
        self.scheduler = read_cleaned(folder / "scheduler" / "scheduler_config.json", {}, {})
        self.arguments, self.denoiser, self.clusters, self.results = (
            self.record.get(name, {}) for name in ("arguments", "model", "clusters", "results")
        )
        self.base, self.dataset = self._hub_id("pretrained_model_name_or_path"), self._hub_id("dataset_name")
        component = next((name for name in ("transformer", "unet") if (folder / name).is_dir()), "")
        # Of adapters it is what the record has.
        recorded = {**self.denoiser.get("config", {}), "_class_name": self.denoiser.get("class", "")}
        self.config = {**recorded, **read_cleaned(folder / component / "config.json", _CONFIG, {})}
        self.pipeline_class = index.get("_class_name", "DTRPipeline")
        what = f"`_class_name` of {PIPELINE_INDEX} must be DTRPipeline or a pipeline of diffusers"
        _check_class(self.pipeline_class, DiffusionPipeline, what)
        self.is_text_to_image = "tokenizer" in index or "caption_column" in self.arguments
        num_classes = self.config.get("num_embeds_ada_norm") or self.config.get("num_class_embeds")
        self.num_classes = None if self.is_text_to_image else num_classes
        names = index.get("id2label", {}).values() if self.num_classes else ()
        self.class_names = [name.split(",")[0] for name in names]
        self.is_routed = self.config.get("routing_type", "none") != "none" and self.config.get("routing_beta", 1) < 1
        self.widths = self.denoiser.get("routed_widths", [])
        # A sliding window of a known width can be drawn.
        self.shows_masks = self.is_routed and bool(self.widths) and self.config["routing_type"] == "dtr"
        self.timestep_range = self.config.get("routing_timestep_range", DEFAULT_TIMESTEP_RANGE)
        self.samples = max(folder.glob("samples/*.png"), default=None)
        self.has_losses_picture = (folder / LOSSES_PICTURE).is_file()
        held_out = self.record.get("held_out", {}) | {"loss": "mean squared error of the prediction"}
        said = {"split": self.arguments.get("validation_split"), **self.scheduler}
        said["weights"] = "exponential moving average" if self.arguments.get("use_ema") else None
        names = ("split", "prediction_type", "weights")
        self.held_out_settings = held_out | {name: said[name] for name in names if said.get(name)}
        self.is_adapter = not index and (folder / LORA_FILE).is_file()
        self.adapter = self._adapter(folder / LORA_FILE) if self.is_adapter else {}
        # Arguments of the images that the run itself sampled at its end, or an example.
        example = {"class_labels": [0]} if self.num_classes else {}
        self.sampling = self.record.get("sampling", {"prompt": "a prompt"} if self.is_text_to_image else example)
        drawn_for = self.sampling.get("class_labels", self.sampling.get("prompt"))
        # Each image of the run's grid has the seed of its place.
        self.num_samples = len(drawn_for) if isinstance(drawn_for, list) else self.sampling.get("num_images", 1)
        for name in self.sampling:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(f"`sampling` of {RECORD_FILE} must hold arguments of the pipeline, got {name!r:.60}.")

    def _hub_id(self, argument: str) -> str | None:
        """The value of an argument if it may be the name of something on the Hub."""
        value = self.arguments.get(argument)
        return value if value and not value.startswith(LOCAL_PREFIX) and is_repo_id(value) else None

    def _adapter(self, path: Path) -> dict[str, Any]:
        """How LoRA weights are loaded."""
        routed_class, what = self.config["_class_name"], f"`model: class` of {RECORD_FILE}"
        _check_class(routed_class, RoutedModelMixin, f"{what} must be a class of diffusers_dtr")
        component = "unet" if "UNet" in routed_class else "transformer"
        is_routed = bool(file_routing(path))
        with safe_open(path, framework="numpy") as weights:
            of_pipeline = any(key.startswith(f"{component}.") for key in weights.keys())  # noqa: SIM118 - not a dictionary
        routing = {name: self.config[name] for name in sorted(_ROUTING) if name in self.config}
        return {"component": component, "routing": routing, "is_routed": is_routed, "of_pipeline": of_pipeline}


def _check_class(name: str, kind: type, what: str) -> None:
    """Refuse what is no name of a subclass of `kind` in diffusers or here."""
    found = getattr(diffusers_dtr, name, None) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"{what}, got {name!r:.60}.")


def is_repo_id(name: str) -> bool:
    """Whether a text is a valid name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
