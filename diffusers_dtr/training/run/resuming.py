"""What a checkpoint stands for: the settings that a resumed run shares with it, and what it may change."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate import Accelerator
from diffusers import ModelMixin, SchedulerMixin

from ...caches import fingerprint
from ...config_types import read_object, shortened
from ...run_record import publishable
from ..config import GuidedValidationConfig, HubConfig, OptimizerConfig, TrainingConfig
from ..config.options import Options
from ..data.streaming import StreamedImages
from ..data.training_images import TrainingImages
from ..data.videos import TrainingVideos


logger = logging.getLogger(__name__)


def _flags(text: str, *parts: type[Options]) -> frozenset[str]:
    return frozenset(text.split()).union(item.name for part in parts for item in fields(part))


# Flags of outputs: another value is no other run.
_OUTPUT_FLAGS = _flags(
    """
    output_dir cache_dir resume_from_checkpoint allow_changed_settings checkpointing_steps checkpoints_total_limit
    validation_split validation_data_dir validation_prompts logging_steps logging_dir report_to tracker_project_name
    offload_ema dataloader_num_workers
    """,
    *(GuidedValidationConfig, HubConfig),
)
# Flags that a resumed run may change; the change is recorded. Of an affinity, the clusters are compared.
_ADJUSTABLE_FLAGS = _flags(
    """
    ema_type ema_sigma_rel ema_max_decay ema_inv_gamma ema_power max_train_steps num_train_epochs seed train_batch_size
    gradient_accumulation_steps mixed_precision allow_tf32 compile channels_last attention_backend
    gradient_checkpointing cache_latents cache_text_embeddings train_data_dir latents_dir routing_warmup_steps
    balancing_update_every affinity_path
    """,
    OptimizerConfig,
)
# Flags from which the denoiser's config is made, which is compared itself.
_MODEL_FLAGS = {"model_preset", "model_config", "transformer_config", "unet_config", "denoiser_config"}
_NOISE_FLAGS = {"beta_schedule": "noise_schedule"}

IMAGES_PER_STEP = "images per step"
# What the average, the optimizer, balancing and sampling have learned is of these.
_FIXED_FLAGS = _flags("use_ema optimizer num_clusters cluster_cost balancing timestep_sampling")
_FIXED = {f"--{name}" for name in _FIXED_FLAGS} | {"cluster boundaries"}
_ADJUSTABLE = {f"--{name}" for name in _ADJUSTABLE_FLAGS} - _FIXED | {IMAGES_PER_STEP, "processes"}
# The weights know classes by their numbers: another name would be learned into the same embedding.
_CLASS = re.compile(r"class \d+")
# Where a model was loaded from, and by which version
_WITHOUT_SOURCE = re.compile(r'"_(name_or_path|diffusers_version)": "[^"]*",? ?')


@dataclass
class RunState:
    """What a checkpoint tells of its run, beside tensors.

    Attributes:
        global_step: Optimizer steps done.
        settings: Of [`run_settings`].
        changes: What was changed in resuming, each with its `step`, `setting`, `before` and `after`.
        seconds: How long the steps took, validation and checkpoints included, over all resumptions.
        scaler: State of the scaler of float16 training.
        streams: Where the streams of all processes were, if data are streamed.
    """

    global_step: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    streams: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> RunState:
        """Read what [`write`] wrote."""
        types = get_type_hints(cls)
        values = read_object(path, str(path), types)
        values.pop("unreadable_images", None)  # of versions that passed over images
        unknown = values.keys() - types.keys()
        if unknown:
            raise ValueError(f"{path} must be the state of a training run, got {shortened(sorted(unknown))} in it.")
        state = cls(**values)
        if not 0 <= state.global_step < 2**53:
            raise ValueError(f"`global_step` in {path} must be at least 0, got {state.global_step}.")
        return state

    def write(self, path: Path) -> None:
        """Write all of it as JSON that may be published."""
        path.write_text(json.dumps(publishable(asdict(self)), indent=2, ensure_ascii=False), encoding="utf-8")

    def go_on(self, settings: dict[str, Any], allow_changes: bool = False) -> None:
        """Take on the settings of a run that resumes, and remember what they change."""
        changes = _changes(self.settings, settings)
        defining = [change for change in changes if change["setting"] not in _ADJUSTABLE]
        fixed = [change for change in defining if change["setting"] in _FIXED or _CLASS.fullmatch(change["setting"])]
        if fixed or (defining and not allow_changes):
            listed = "; ".join(_listed(defining))
            allow = ", or pass `--allow_changed_settings` to go on with the new ones, which the record will tell"
            raise ValueError(
                f"{listed}: the checkpoint is of a run with another objective, model or data. Resume with the "
                f"settings that it was made with, or start a run in another `--output_dir`{'' if fixed else allow}."
            )
        for change in changes:
            consequence = self._consequence(change)
            level = logging.WARNING if consequence or change in defining else logging.INFO
            logger.log(level, "%s.%s", _said(change), consequence)
        self.changes += [{"step": self.global_step, **change} for change in changes]
        self.settings = settings

    def _consequence(self, change: dict[str, Any]) -> str:
        if change["setting"] == "--seed":
            return " The order of the images, noise and timesteps are other ones from here on."
        if change["setting"] != IMAGES_PER_STEP:
            return ""
        before, after = (self.global_step * change[key] for key in ("before", "after"))
        what = f"{after - before} images are skipped" if after > before else f"{before - after} images are seen again"
        return f" The run had seen {before} images and goes on at image {after}: {what}."


def class_settings(id2label: Mapping[int, str] | None) -> dict[str, str]:
    """Which class has which number, as settings of a run."""
    return {f"class {label}": publishable(name) for label, name in (id2label or {}).items()}


def data_settings(images: TrainingImages | TrainingVideos) -> dict[str, Any]:
    """Which images a run learns, in which order, with which captions, and which class has which number, as settings.

    The order of an epoch is of rows: with others in their places, some would be seen again and some never. Of files
    only the names count, because a folder that has moved or was copied is the same data.
    """
    if isinstance(images, StreamedImages):  # flags alone tell which
        return class_settings(images.id2label)
    labels = [0] * len(images) if images.labels is None else images.labels.tolist()
    rows = json.dumps([images.file_names, labels])
    captions = {} if images.captions is None else {"fingerprint of captions": images.captions.fingerprint()}
    return {
        "number of images": len(images),
        "fingerprint of file names and labels": _digest(rows),
        **captions,
        **class_settings(images.id2label),
    }


def frozen_settings(**modules: torch.nn.Module) -> dict[str, str]:
    """Which frozen models a run learns with, as settings of the run: a folder of the same name may hold another.

    Of every tensor some values count, which takes no time for large models. They differ between precisions.
    """
    settings = {}
    for name, module in modules.items():
        tensors = module.state_dict().items()
        some = fingerprint((key, tensor.flatten()[:: max(1, tensor.numel() // 64)]) for key, tensor in tensors)
        config = json.dumps(dict(module.config), sort_keys=True, default=str) if isinstance(module, ModelMixin) else ""
        settings[f"fingerprint of the {name} in {module.dtype}"] = _digest(some + _WITHOUT_SOURCE.sub("", config))
    return settings


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_settings(
    config: TrainingConfig,
    model: ModelMixin,
    noise_scheduler: SchedulerMixin,
    accelerator: Accelerator,
    **others: Any,
) -> dict[str, Any]:
    """All that decides what a run learns, by the names that messages use: `--flag`, or in words.

    Flags that stand for a config value are given as that value, whether they were typed or not; paths as they may be
    published, because a folder that has moved is the same data.
    """
    flags = {name: value for name, value in config.options.items() if name not in _OUTPUT_FLAGS | _MODEL_FLAGS}
    configs = {}
    for kind, saved in (("noise scheduler", noise_scheduler.config), ("denoiser", model.config)):
        for name, value in saved.items():
            flag = _NOISE_FLAGS.get(name, name)
            if not name.startswith("_"):
                configs[f"--{flag}" if flag in flags else f"{name} of the {kind}"] = value
    settings = {
        **{f"--{name}": publishable(value, name) for name, value in flags.items()},
        **publishable(configs),
        "--gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "--mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "class of the denoiser": type(model).__name__,
        "class of the noise scheduler": type(noise_scheduler).__name__,
        **others,
    }
    # As they come back from a checkpoint
    return json.loads(json.dumps(settings, default=list))


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings that differ. One that a run of another version did not have is the same if off, or a fingerprint."""
    return [
        {"setting": name, "before": before.get(name), "after": after.get(name)}
        for name in dict.fromkeys([*before, *after])
        if name in before or not name.startswith("fingerprint")
        if (before[name] != after[name] if name in before and name in after else before.get(name, after.get(name)))
    ]


def _listed(changes: list[dict[str, Any]], most: int = 3) -> Iterator[str]:
    """Changes in words; there may be thousands of classes, of which the first are enough."""
    classes = [change for change in changes if _CLASS.fullmatch(change["setting"])]
    for change in changes:
        if change not in classes[most:]:
            yield _said(change)
    if len(classes) > most:
        yield f"… ({len(classes)} classes in all differ)"


def _said(change: dict[str, Any]) -> str:
    return f"`{change['setting']}` was {change['before']} and is {change['after']} now"
