"""All of a run's configuration: put together in Python, or parsed from flags and a YAML or JSON file."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import HfArgumentParser

from ...atomic_files import replace_text
from ...config_types import shortened
from .data import DataConfig, LoraConfig, ModelConfig, SourceConfig, TextConfig, VideoConfig
from .learning import EMAConfig, NoiseConfig, ObjectiveConfig, OptimizerConfig, RoutingConfig
from .options import Options
from .running import GuidedValidationConfig, HubConfig, RunConfig, ValidationConfig


# Where diffusers' polynomial schedule ends; it must begin above.
_POLYNOMIAL_END = 1e-7
_NOT_SAVED = ("hub_token", "resume_from_checkpoint", "allow_changed_settings")


@dataclass(frozen=True)
class TrainingConfig:
    """The configuration of a run, in parts, of which no two have the same option.

    Raises:
        ValueError: If parts do not fit each other.
    """

    run: RunConfig
    data: SourceConfig | VideoConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    validation: ValidationConfig = field(default_factory=GuidedValidationConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    text: TextConfig | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for item in fields(self):
            part, hint = getattr(self, item.name), hints[item.name]
            if not isinstance(part, hint):
                names = str(getattr(hint, "__name__", hint)).replace(f"{__package__}.", "")
                raise ValueError(f"`{item.name}` must be of {names}, got {shortened(part)}.")
        self._check_folders()
        self._check_learning()
        self._check_adapters()
        if getattr(self.data, "streaming", False):
            self._check_streaming()
        if self.run.report_to == "wandb" and self.hub.hub_token is not None:
            raise ValueError("`--report_to wandb` uploads the command line with --hub_token: use `hf auth login`.")

    def _check_folders(self) -> None:
        output, pretrained = self.run.output_dir, self.model.pretrained_model_name_or_path
        sources = [source for source in (pretrained, self.model.vae_name_or_path) if source]
        if Path(output).resolve() in [Path(source).resolve() for source in sources]:
            raise ValueError(f"`--output_dir` must not be the folder of a pretrained model, got {output}.")
        for flag in ("cache_latents", "latents_dir"):
            if getattr(self.data, flag, None) and not sources:
                raise ValueError(f"`--{flag}` needs --vae_name_or_path, or a pretrained pipeline that has one.")
        for flag in ("train_data_dir", "validation_data_dir"):
            folder = getattr(self.data, flag, None)
            if folder is not None and Path(output).resolve().is_relative_to(Path(folder).resolve()):
                raise ValueError(f"`--output_dir` must not be in --{flag}, as it would add images, got {output}.")

    def _check_learning(self) -> None:
        optimizer, steps = self.optimizer, self.run.max_train_steps
        warmup, routing = optimizer.lr_warmup_steps, self.routing.routing_warmup_steps
        if steps is not None and warmup >= steps:
            raise ValueError(f"`--lr_warmup_steps` must be below the {steps} steps of the run, got {warmup}.")
        if steps is not None and routing > steps:
            raise ValueError(f"`--routing_warmup_steps` must be at most the {steps} steps of the run, got {routing}.")
        lowest = _POLYNOMIAL_END / (self.run.train_batch_size if optimizer.scale_lr else 1)
        if optimizer.lr_scheduler == "polynomial" and optimizer.learning_rate <= lowest:
            raise ValueError(
                f"`--learning_rate` must be above {lowest:g}, where --lr_scheduler polynomial ends, got "
                f"{optimizer.learning_rate:g}."
            )

    def _check_streaming(self) -> None:
        if self.run.max_train_steps is None:
            raise ValueError("`--streaming` needs --max_train_steps: a stream does not say how long an epoch is.")
        if self.validation.validation_epochs is not None:
            raise ValueError("`--streaming` needs --validation_steps in place of --validation_epochs, for the same.")
        if self.text is not None and self.text.cache_text_embeddings:
            raise ValueError("`--cache_text_embeddings` does not go with --streaming: captions come by in training.")
        if self.text is not None and self.text.validation_prompts is None:
            raise ValueError("`--streaming` needs --validation_prompts: captions come by in training.")

    def _check_adapters(self) -> None:
        if self.lora.rank is None:
            return
        if self.lora.route_lora and self.routing.routing_warmup_steps:
            raise ValueError("`--routing_warmup_steps` is of the denoiser, which --route_lora leaves unrouted.")
        if getattr(self.model, "denoiser_config", None) is not None:
            raise ValueError("`--rank` does not go with --denoiser_config: adapters need a trained denoiser.")

    @property
    def options(self) -> dict[str, Any]:
        """All options by name, of all parts."""
        return {name: getattr(part, name) for part in self._parts().values() for name in part.names()}

    def replace(self, **changes: Any) -> TrainingConfig:
        """The same configuration with other values of some options."""
        parts = self._parts()
        for kind, part in parts.items():
            mine = {name: changes.pop(name) for name in part.names() if name in changes}
            parts[kind] = replace(part, **mine) if mine else part
        if changes:
            raise TypeError(f"A run has no options {', '.join(changes)}.")
        return TrainingConfig(**parts)

    def with_max_train_steps(self, num_images: int | None, images_per_step: int) -> TrainingConfig:
        """The same configuration with a number of steps: that of its epochs, unless it has one, as streams have."""
        steps = self.run.max_train_steps
        if steps is None:
            steps = math.ceil(self.run.num_train_epochs * num_images / images_per_step)
        return self.replace(max_train_steps=steps)

    def save(self, path: Path) -> None:
        """Write what is not the default as JSON that [`parse_config`] reads; no token, and no resumption."""
        given = {
            name: getattr(part, name)
            for part in self._parts().values()
            for name in part.names()
            if name not in _NOT_SAVED and not part.is_default(name)
        }
        replace_text(path, json.dumps(given, indent=2, ensure_ascii=False) + "\n")

    def _parts(self) -> dict[str, Options]:
        return {kind: part for kind, part in vars(self).items() if part is not None}


def parse_config(
    argv: Sequence[str] | None = None, *, description: str | None = None, **parts: type[Options]
) -> TrainingConfig:
    """Parse a script's flags and the file that its `--config` names, or exit with a message.

    `parts` are classes of parts of [`TrainingConfig`] by its names, where they are not the usual ones. Captions and
    adapters have flags only if they are given.
    """
    parts = _USUAL_PARTS | parts
    parser = HfArgumentParser(
        list(parts.values()),
        usage="%(prog)s [--config FILE] [options; --help lists them]",  # else a screen of flags before every error
        description=description,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", help="YAML or JSON file of options, such as a run's run_config.json. Flags take precedence."
    )
    try:
        _take_defaults(parser, _options_of_file(argv), parts.values())
        unknown = parser.parse_known_args(argv)[1]
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        values = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        return TrainingConfig(**dict(zip(parts, values, strict=False)))
    except ValueError as error:
        parser.error(str(error))


def _options_of_file(argv: Sequence[str] | None) -> dict[str, Any]:
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    paths = finder.parse_known_args(argv)[0].config
    if not paths:
        return {}
    if len(paths) > 1:
        raise ValueError(f"`--config` must be given once, got {', '.join(paths)}.")
    path = Path(paths[0])
    try:
        text = path.read_text(encoding="utf-8")
        # YAML would read some numbers and characters of JSON otherwise.
        is_json = path.suffix == ".json"
        values = json.loads(text, object_pairs_hook=_given_once) if is_json else yaml.load(text, _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"`--config` must be a YAML or JSON file of options, got {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`--config` must be a file of options by name, got {path} with {shortened(values)}.")
    return values


def _given_once(pairs: list[tuple[Any, Any]]) -> dict:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key!r} is given twice")
    return dict(pairs)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        _given_once([(key.value, None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def _take_defaults(parser: ArgumentParser, values: dict[str, Any], parts: Iterable[type[Options]]) -> None:
    known = {name for part in parts for name in part.names()}
    unknown = sorted(map(str, values.keys() - known))
    if unknown:
        raise ValueError(f"`--config` must be a file of this script's options, got {shortened(unknown)} in it.")
    # YAML reads a bare `no`, which is a choice of `mixed_precision`, as false.
    words = {action.dest for action in parser._actions if "no" in (action.choices or ())}
    values = {name: "no" if value is False and name in words else value for name, value in values.items()}
    parser.set_defaults(**values)
    for action in parser._actions:  # argparse has no public way to what is required
        action.required = action.required and action.dest not in values


_USUAL_PARTS: dict[str, type[Options]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "run": RunConfig,
    "optimizer": OptimizerConfig,
    "ema": EMAConfig,
    "noise": NoiseConfig,
    "objective": ObjectiveConfig,
    "routing": RoutingConfig,
    "validation": GuidedValidationConfig,
    "hub": HubConfig,
}
