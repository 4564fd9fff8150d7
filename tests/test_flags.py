"""Every number that a script, a command or a configuration takes has a range, which is checked at once."""

import argparse
import runpy
import sys
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from diffusers_dtr import training
from diffusers_dtr.cli import main
from diffusers_dtr.config_types import _leaves
from diffusers_dtr.ranges import COUNT, FINITE, NON_NEGATIVE, POSITIVE, SEED, SHARE, WHOLE, Range
from diffusers_dtr.training.config.options import Options, _limits
from diffusers_dtr.training.config.training_config import _USUAL_PARTS


EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if "ArgumentParser(" in path.read_text(encoding="utf-8"))
TRAINING_SCRIPTS = sorted(
    path for path in EXAMPLES.rglob("*.py") if "parse_config(" in path.read_text(encoding="utf-8")
)

# The range of every number by name; where a flag of the same name has several, by script.
RANGES = {
    FINITE: "guidance_interval logit_mean routing_timestep_range timesteps",
    Range("[0.001, 0.28]"): "ema_sigma_rel",
    Range("(0, 1)"): "test_share",
    Range("(0, 1]"): "routing_beta",
    POSITIVE: "adam_epsilon ema_inv_gamma ema_power frame_rate logit_std lr_power routing_alpha snr_gamma timeout",
    Range("[0, 1)"): "adam_beta1 adam_beta2 class_dropout_prob",
    SHARE: "ema_max_decay proportion_empty_prompts",
    NON_NEGATIVE: "adam_weight_decay guidance_scale input_perturbation learning_rate max_grad_norm noise_offset "
    "validation_guidance_scale",
    Range("[0, 2^30]", int): "compute_task_affinity.sketch_size",
    Range("[1, 2^30]", int): "sketch_size",
    Range("[0, 2^32)", int): "routing_seed",
    SEED: "seed seeds",
    WHOLE: "checkpoints dataloader_num_workers lr_warmup_steps routing_warmup_steps train_cluster warmup",
    COUNT: "balancing_update_every batch_size checkpointing_steps checkpoints_total_limit cluster frame_stride "
    "gradient_accumulation_steps height jobs logging_steps lora_alpha lr_num_cycles max_batch_size "
    "max_held_out_images max_sequence_length max_train_samples max_train_steps num_attention_heads num_classes "
    "num_clusters num_frames num_images num_inference_steps num_loss_samples num_per_digit num_timesteps "
    "num_train_epochs num_train_timesteps num_validation_images rank repeats resolution rounds shard_size shrink "
    "shuffle_buffer_size train_batch_size vae_steps vae_width validation_epochs validation_num_inference_steps "
    "validation_steps width",
    Range("[2, inf)", int): "benchmark_task_affinity.num_timesteps num_samples",
    Range("[4, inf)", int): "evaluate.num_samples",
    Range("[8, inf)", int): "train_feature_extractor.resolution",
}
FLAGS = {name: numbers for numbers, names in RANGES.items() for name in names.split()}


class _Parsed(Exception):
    """Carries what a script would have parsed with out of it."""


def parsed_by(path: Path, patch: pytest.MonkeyPatch) -> object:
    patch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(_Parsed) as parsed:
        runpy.run_path(str(path), run_name="__main__")
    return parsed.value.args[0]


@cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parsers of all scripts and commands, by name."""

    def capture(parser, *arguments, **options):
        raise _Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        found = {path.stem: parsed_by(path, patch) for path in SCRIPTS}
        with pytest.raises(_Parsed) as parsed:
            main([])
    (commands,) = (action for action in parsed.value.args[0]._actions if action.choices)
    return {**found, **commands.choices}


@cache
def parts() -> set[type[Options]]:
    """The parts of the configurations of all training scripts."""

    def capture(*arguments, description, **parts):
        raise _Parsed(parts.values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "parse_config", capture)
        return {*_USUAL_PARTS.values()}.union(*(parsed_by(path, patch) for path in TRAINING_SCRIPTS))


def flags() -> dict[str, tuple[argparse.ArgumentParser, argparse.Action]]:
    """Those that are no options of a configuration."""
    found = {}
    for name, parser in parsers().items():
        options = {item.name for part in getattr(parser, "dataclass_types", ()) for item in fields(part)}
        actions = (action for action in parser._actions if action.dest not in options)
        found |= {f"{name}.{action.dest}": (parser, action) for action in actions}
    return found


def numeric_options() -> dict[str, tuple[type[Options], str]]:
    return {
        f"{part.__name__}.{name}": (part, name)
        for part in parts()
        for name, hint in get_type_hints(part).items()
        if {int, float} & {*_leaves(hint)}
    }


def all_ranges() -> dict[str, Range]:
    """Of what takes numbers; whatever else is declared for one fails the comparison with the table."""
    found = {
        name: action.type
        for name, (_, action) in flags().items()
        if action.type in (int, float) or isinstance(action.type, Range) or type(action.default) in (int, float)
    }
    for name, (part, option) in numeric_options().items():
        (found[name],) = _limits(get_type_hints(part, include_extras=True)[option])
    return found


def entry(name: str) -> str:
    """Its name in the table."""
    return name if name in FLAGS else name.split(".")[1]


def test_every_number_has_the_range_of_the_table():
    found = all_ranges()
    assert found == {name: FLAGS.get(entry(name)) for name in found}
    assert {entry(name) for name in found} == FLAGS.keys()


def refusal(part: type[Options], name: str, value: object) -> str:
    """Why a configuration refuses a value, if it does."""
    required = {item.name: "folder" for item in fields(part) if item.default is MISSING}
    pair = [value, value] if "list" in str(get_type_hints(part)[name]) else value
    try:
        part(**{**required, name: pair})
    except ValueError as error:
        return str(error)
    return ""


def test_a_configuration_refuses_what_is_not_in_the_range_of_an_option_and_takes_what_is():
    for where, (part, name) in numeric_options().items():
        numbers = FLAGS[entry(where)]
        message = f"`--{name}` must be {numbers}, got "
        allowed = {"int": 8, "float": 0.25}[numbers.kind.__name__]
        assert not refusal(part, name, allowed).startswith(message), where
        for value in (float("nan"), float("-inf"), "many", "", True):
            assert refusal(part, name, value).startswith(message), (where, value)


def test_defaults_are_in_range():
    for name, (_, action) in flags().items():
        if isinstance(action.type, Range):
            defaults = action.default if isinstance(action.default, list) else [action.default]
            assert all(value is None or value in action.type for value in defaults), name
    for where, (part, name) in numeric_options().items():
        (default,) = (item.default for item in fields(part) if item.name == name)
        assert default is None or default in FLAGS[entry(where)], where
