"""What the files of a trained model's folder tell about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..models.without_weights import model_without_weights
from ..pipelines.model_index import pipeline_class_name
from ..publishing import LOCAL_PREFIX, publishable
from ..run_folder import HISTORY_FILE, LORA_FILE, METRICS_FILE, PIPELINE_INDEX, RECORD_FILE


@dataclass(frozen=True)
class TrainedModel:
    """Reads the files of a folder when they are asked for. What the folder does not tell is None, or empty.

    Args:
        folder: A pipeline, or the output of a training script.

    Raises:
        ValueError: If there is nothing in the folder that tells of a model.
    """

    folder: Path

    def __post_init__(self):
        files = (PIPELINE_INDEX, RECORD_FILE, LORA_FILE)
        if not any((self.folder / name).is_file() for name in files):
            raise ValueError(f"`folder` must hold one of {', '.join(files)}, got {str(self.folder)!r}.")

    @cached_property
    def record(self) -> dict[str, Any]:
        """The training record."""
        # Records of older versions hold arguments as they were typed.
        return publishable(self._json(RECORD_FILE) or {})

    @property
    def arguments(self) -> dict[str, Any]:
        """The run's arguments."""
        return self.record.get("arguments", {})

    @cached_property
    def index(self) -> dict[str, Any]:
        """The pipeline's `model_index.json`."""
        return self._json(PIPELINE_INDEX) or {}

    @property
    def pipeline_class(self) -> str | None:
        """Name of the pipeline's class."""
        return pipeline_class_name(self.index)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What was measured after training: see [`~diffusers_dtr.model_card.save_metrics`]."""
        return publishable(self._json(METRICS_FILE) or [])

    @property
    def metric_commands(self) -> list[str]:
        """The commands that measured, each once."""
        return list(dict.fromkeys(metric["command"] for metric in self.metrics if "command" in metric))

    @cached_property
    def last_losses(self) -> dict[str, Any]:
        """The last line of the loss history."""
        path = self.folder / HISTORY_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return json.loads(lines[-1]) if lines else {}

    @property
    def denoiser_name(self) -> str | None:
        """The pipeline's component that denoises."""
        return next((name for name in ("transformer", "unet") if self.index.get(name, [None])[0]), None)

    @cached_property
    def denoiser(self) -> dict[str, Any]:
        """The denoiser's config, and its class as `_class_name`; of adapters, those that the record has."""
        described = self.record.get("model", {})
        config = {**described.get("config", {}), **({"_class_name": described["class"]} if described else {})}
        return {**config, **self._saved_denoiser}

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config."""
        return self._json("scheduler/scheduler_config.json") or {}

    @property
    def is_adapter(self) -> bool:
        """Whether this is LoRA weights for another model rather than a pipeline."""
        return not self.index and (self.folder / LORA_FILE).is_file()

    @property
    def is_text_to_image(self) -> bool:
        """Whether images are made from prompts."""
        return "tokenizer" in self.index or "caption_column" in self.arguments

    @property
    def num_classes(self) -> int | None:
        """Number of classes that images are made of, or None where they have none."""
        if self.is_text_to_image:
            return None
        return self.denoiser.get("num_embeds_ada_norm") or self.denoiser.get("num_class_embeds")

    @cached_property
    def routed_widths(self) -> Sequence[int]:
        """Channels of the routed blocks; of adapters, those that the record has, which older ones lack."""
        recorded = self.record.get("model", {}).get("routed_widths")
        if recorded is not None:
            return recorded
        model = model_without_weights(self._saved_denoiser)
        return () if model is None else model.routed_widths

    @property
    def is_routed(self) -> bool:
        """Whether the denoiser's blocks see some of their channels only."""
        config = self.denoiser
        return config.get("routing_type", "none") != "none" and config.get("routing_beta", 1) < 1

    def hub_id(self, argument: str) -> str | None:
        """The value of an argument, unless it is something on the machine that trained."""
        value = self.arguments.get(argument)
        return None if value is None or value.startswith(LOCAL_PREFIX) else value

    def last_samples(self) -> Path | None:
        """The last grid of samples."""
        return max(self.folder.glob("samples/*.png"), default=None)

    @property
    def _saved_denoiser(self) -> dict[str, Any]:
        return (self._json(f"{self.denoiser_name}/config.json") if self.denoiser_name else None) or {}

    def _json(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name} must be JSON: {error}") from error
