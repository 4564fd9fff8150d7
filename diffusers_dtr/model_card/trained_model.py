"""The files of a trained model's folder, which may come from anybody: every value is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub.utils import HFValidationError, validate_repo_id

import diffusers_dtr

from ..config_types import parse_cleaned, read_cleaned
from ..routing import DEFAULT_TIMESTEP_RANGE, check_routing
from ..run_record import (
    HISTORY_FILE,
    LOCAL_PREFIX,
    LORA_FILE,
    LOSSES_PICTURE,
    METRICS_FILE,
    PIPELINE_INDEX,
    RECORD_FILE,
    publishable,
)


def _each(names: str, types: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), types)


# The types of what is read, of which all may be missing.
Config = TypedDict(
    "Config",
    _each("_class_name routing_type", str)
    | _each("routing_alpha routing_beta", float)
    | _each("routing_seed num_embeds_ada_norm num_class_embeds", int)
    | {"routing_timestep_range": list[float]},
)
Arguments = TypedDict(
    "Arguments",
    _each("dataset_name pretrained_model_name_or_path hub_model_id validation_split caption_column", str)
    | _each("cluster_cost balancing loss_weighting timestep_sampling lr_scheduler", str)
    | _each("learning_rate snr_gamma ema_max_decay validation_guidance_scale", float)
    | _each("resolution train_batch_size gradient_accumulation_steps max_train_steps seed", int)
    | _each("routing_warmup_steps validation_num_inference_steps", int)
    | {"use_ema": bool},
)
Model = TypedDict(
    "Model",
    _each("num_parameters num_trained_parameters", int)
    | {"class": str, "config": Config, "adapter_routing": Config, "routed_widths": list[int]},
)
Record = TypedDict(
    "Record",
    _each("command mixed_precision hardware", str)
    | _each("num_images num_processes", int)
    | {
        "seconds": float,
        "arguments": Arguments,
        "model": Model,
        "clusters": TypedDict("Clusters", {"num_clusters": int, "boundaries": list[int], "timesteps": list[float]}),
        "results": dict[str, float],
        "held_out": dict[str, float | str],
        "sampling": dict[str, float | str | bool | list],
        "versions": dict[str, str],
        "changed_settings": list[TypedDict("Change", {"setting": str, "step": int})],
    },
)
Metric = TypedDict(
    "Metric",
    {**_each("name type command dataset", str), "value": float, "settings": dict[str, float | str | bool]},
)
Index = TypedDict("Index", {**_each("_class_name", str), "id2label": dict[str, str]})
Scheduler = TypedDict("Scheduler", _each("prediction_type", str))
Losses = TypedDict("Losses", _each("clusters weights", list[float | None]))


class TrainedModel:
    """The values in a folder's files: plain text and finite numbers of the right types, without nulls."""

    def __init__(self, folder: Path):
        files = (PIPELINE_INDEX, RECORD_FILE, LORA_FILE)
        if not any((folder / name).is_file() for name in files):
            raise ValueError(f"`folder` must hold one of {', '.join(files)}, got {str(folder)!r}.")
        self.folder = folder
        self.record = publishable(read_cleaned(folder / RECORD_FILE, Record, {}))
        self.metrics = publishable(read_cleaned(folder / METRICS_FILE, list[Metric], []))
        for metric in self.metrics:
            if not metric.keys() >= {"name", "type", "value"}:
                raise ValueError(f"{METRICS_FILE} must have a `name`, `type` and finite `value`, got {metric!r:.60}.")
        self.index = read_cleaned(folder / PIPELINE_INDEX, Index, {})
        self.scheduler = read_cleaned(folder / "scheduler" / "scheduler_config.json", Scheduler, {})
        self.arguments = self.record.get("arguments", {})
        self.model = self.record.get("model", {})
        self.component = next((name for name in ("transformer", "unet") if (folder / name).is_dir()), "")
        # Of adapters it is what the record has.
        recorded = {**self.model.get("config", {}), "_class_name": self.model.get("class", "")}
        self.config = {**recorded, **read_cleaned(folder / self.component / "config.json", Config, {})}
        history = folder / HISTORY_FILE
        lines = history.read_text(encoding="utf-8").splitlines() if history.is_file() else []
        self.losses = parse_cleaned(lines[-1], Losses, HISTORY_FILE) if lines else {}
        self.is_adapter = not self.index and (folder / LORA_FILE).is_file()
        self.pipeline_class = self.index.get("_class_name", "DTRPipeline")
        if not is_class(self.pipeline_class, DiffusionPipeline):
            raise ValueError(
                f"`_class_name` of {PIPELINE_INDEX} must be DTRPipeline or a pipeline of diffusers, got "
                f"{self.pipeline_class!r:.60}."
            )
        self.is_text_to_image = "tokenizer" in self.index or "caption_column" in self.arguments
        num_classes = self.config.get("num_embeds_ada_norm") or self.config.get("num_class_embeds")
        self.num_classes = None if self.is_text_to_image else num_classes
        names = self.index.get("id2label", {}).values() if self.num_classes else ()
        self.class_names = [name.split(",")[0] for name in names]
        self.is_routed = self.config.get("routing_type", "none") != "none" and self.config.get("routing_beta", 1) < 1
        self.widths = self.model.get("routed_widths", [])
        # A sliding window of a known width can be drawn.
        self.shows_masks = self.is_routed and bool(self.widths) and self.config["routing_type"] == "dtr"
        self.timestep_range = self.config.get("routing_timestep_range", DEFAULT_TIMESTEP_RANGE)
        check_routing(timestep_range=self.timestep_range)
        self.samples = max(folder.glob("samples/*.png"), default=None)
        self.has_losses_picture = (folder / LOSSES_PICTURE).is_file()

    def hub_id(self, argument: str) -> str | None:
        """The value of an argument if it may be the name of something on the Hub."""
        value = self.arguments.get(argument)
        return value if value and not value.startswith(LOCAL_PREFIX) and is_repo_id(value) else None

    @property
    def held_out_settings(self) -> dict[str, Any]:
        """How the held-out loss of a training script was evaluated."""
        settings = {
            **self.record.get("held_out", {}),
            "split": self.arguments.get("validation_split"),
            "loss": "mean squared error of the prediction",
            "prediction_type": self.scheduler.get("prediction_type"),
            "weights": "exponential moving average" if self.arguments.get("use_ema") else None,
        }
        return {key: value for key, value in settings.items() if value is not None}


def is_class(name: str, kind: type) -> bool:
    """Whether a name is a subclass of `kind` in diffusers or here."""
    found = getattr(diffusers_dtr, name, None) or getattr(diffusers, name, None)
    return isinstance(found, type) and issubclass(found, kind)


def is_repo_id(name: str) -> bool:
    """Whether a text is a valid name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
