"""Every number that a script, a command or a configuration takes has a range, which is checked at once."""

import argparse
import runpy
import sys
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from diffusers_dtr import training
from diffusers_dtr.cli import main
from diffusers_dtr.config_types import _leaves
from diffusers_dtr.ranges import Range
from diffusers_dtr.training.config.options import Options, _limits
from diffusers_dtr.training.config.training_config import _USUAL_PARTS


EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if "ArgumentParser(" in path.read_text(encoding="utf-8"))
TRAINING_SCRIPTS = sorted(
    path for path in EXAMPLES.rglob("*.py") if "parse_config(" in path.read_text(encoding="utf-8")
)

COUNT = ("1 1000000", "0 -1 1.0")
WHOLE = ("0 1000000", "-1 0.5")
SEED = ("0 9223372036854775807", "-1 9223372036854775808 0.5")
POSITIVE = ("1e-300 1e300", "0 -1e-300 inf")
NON_NEGATIVE = ("0 1e300", "-1e-300 inf")
FINITE = ("-1e300 0 1e300", "-inf inf")
SHARE = ("0 1", "-1e-300 1.0000001")

# Values that are allowed, and values that are not, on both sides of each border; where a flag of the same name has
# several ranges, by script.
FLAGS = {
    "adam_beta1": ("0 0.999999", "-1e-300 1"),
    "adam_beta2": ("0 0.999999", "-1e-300 1"),
    "adam_epsilon": POSITIVE,
    "adam_weight_decay": NON_NEGATIVE,
    "balancing_update_every": COUNT,
    "batch_size": COUNT,
    "checkpointing_steps": COUNT,
    "checkpoints": WHOLE,
    "checkpoints_total_limit": COUNT,
    "class_dropout_prob": ("0 0.999999", "-1e-300 1"),
    "cluster": COUNT,
    "dataloader_num_workers": WHOLE,
    "ema_inv_gamma": POSITIVE,
    "ema_max_decay": SHARE,
    "ema_power": POSITIVE,
    "gradient_accumulation_steps": COUNT,
    "frame_rate": POSITIVE,
    "frame_stride": COUNT,
    "guidance_interval": FINITE,
    "guidance_scale": NON_NEGATIVE,
    "height": COUNT,
    "input_perturbation": NON_NEGATIVE,
    "jobs": COUNT,
    "learning_rate": NON_NEGATIVE,
    "logging_steps": COUNT,
    "logit_mean": FINITE,
    "logit_std": POSITIVE,
    "lora_alpha": COUNT,
    "lr_num_cycles": COUNT,
    "lr_power": POSITIVE,
    "lr_warmup_steps": WHOLE,
    "max_batch_size": COUNT,
    "max_grad_norm": NON_NEGATIVE,
    "max_held_out_images": COUNT,
    "max_sequence_length": COUNT,
    "max_train_samples": COUNT,
    "max_train_steps": COUNT,
    "noise_offset": NON_NEGATIVE,
    "num_attention_heads": COUNT,
    "num_clusters": COUNT,
    "num_frames": COUNT,
    "num_images": COUNT,
    "num_inference_steps": COUNT,
    "num_loss_samples": COUNT,
    "num_per_digit": COUNT,
    "evaluate num_samples": ("4 1000000", "3 -1 4.0"),
    "num_samples": ("2 1000000", "1 -1 2.0"),
    "num_threads": COUNT,
    "num_timesteps": COUNT,
    "benchmark_task_affinity num_timesteps": ("2 1000", "1 -1 2.0"),
    "num_train_epochs": COUNT,
    "num_train_timesteps": COUNT,
    "num_validation_images": COUNT,
    "proportion_empty_prompts": SHARE,
    "rank": COUNT,
    "repeats": COUNT,
    "resolution": COUNT,
    "train_feature_extractor resolution": ("8 1000000", "7 -1 8.0"),
    "routing_alpha": POSITIVE,
    "routing_beta": ("1e-300 1", "0 1.0000001"),
    "routing_seed": ("0 4294967295", "-1 4294967296 0.5"),
    "routing_timestep_range": FINITE,
    "routing_warmup_steps": WHOLE,
    "seed": SEED,
    "seeds": SEED,
    "sketch_size": ("1 1073741824", "1073741825 -1 1.0"),
    "compute_task_affinity sketch_size": ("0 1073741824", "1073741825 -1 1.0"),
    "snr_gamma": POSITIVE,
    "steps": COUNT,
    "test_share": ("1e-300 0.999999", "0 1"),
    "timeout": POSITIVE,
    "timesteps": FINITE,
    "train_batch_size": COUNT,
    "train_cluster": WHOLE,
    "vae_steps": COUNT,
    "validation_epochs": COUNT,
    "validation_guidance_scale": NON_NEGATIVE,
    "validation_num_inference_steps": COUNT,
    "validation_steps": COUNT,
    "warmup": WHOLE,
    "width": COUNT,
}


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
        found |= {f"{name} {action.dest}": (parser, action) for action in actions}
    return found


def numeric_flags() -> dict[str, tuple[argparse.ArgumentParser, argparse.Action]]:
    return {name: pair for name, pair in flags().items() if isinstance(pair[1].type, Range)}


def numeric_options() -> dict[str, tuple[type[Options], str]]:
    return {
        f"{part.__name__} {name}": (part, name)
        for part in parts()
        for name, hint in get_type_hints(part).items()
        if {int, float} & {*_leaves(hint)}
    }


def entry(name: str) -> str:
    """Its name in the table."""
    return name if name in FLAGS else name.split()[1]


def range_of(part: type[Options], name: str) -> Range:
    (limit,) = _limits(get_type_hints(part, include_extras=True)[name])
    assert isinstance(limit, Range), name
    return limit


def test_every_number_has_a_range():
    types = {name: action.type for name, (_, action) in flags().items()}
    assert [name for name, kind in types.items() if kind in (int, float)] == []
    numbers = [name for name, (_, action) in flags().items() if type(action.default) in (int, float)]
    assert [name for name in numbers if not isinstance(types[name], Range)] == []
    for part, name in numeric_options().values():
        assert range_of(part, name).kind in {*_leaves(get_type_hints(part)[name])}, name


def test_the_table_has_every_number():
    assert {entry(name) for name in {**numeric_flags(), **numeric_options()}} == FLAGS.keys()


def test_values_on_both_sides_of_every_border_of_a_flag(capsys):
    for name, (parser, action) in numeric_flags().items():
        allowed, refused = (values.split() for values in FLAGS[entry(name)])
        assert [value for value in allowed if action.type(value) != action.type.kind(value)] == [], name
        for value in (*refused, "nan", "many", ""):
            if action.nargs == 2:  # which no single argument can give
                with pytest.raises(argparse.ArgumentTypeError, match="must be"):
                    action.type(value)
                continue
            with pytest.raises(SystemExit):
                parser.parse_args([f"{action.option_strings[0]}={value}"])
            error = capsys.readouterr().err
            assert f"argument {action.option_strings[0]}: must be {action.type}, got" in error, (name, value)


def refusal(part: type[Options], name: str, value: object) -> str:
    """Why a configuration refuses a value, if it does."""
    required = {item.name: "folder" for item in fields(part) if item.default is MISSING}
    pair = [value, value] if "list" in str(get_type_hints(part)[name]) else value
    try:
        part(**{**required, name: pair})
    except ValueError as error:
        return str(error)
    return ""


def number(text: str) -> object:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def test_values_on_both_sides_of_every_border_of_an_option():
    for where, (part, name) in numeric_options().items():
        message = f"`--{name}` must be {range_of(part, name)}, got "
        allowed, refused = (map(number, values.split()) for values in FLAGS[entry(where)])
        assert [value for value in allowed if refusal(part, name, value).startswith(message)] == [], where
        for value in (*refused, float("nan"), "many", "", True):
            assert refusal(part, name, value).startswith(message), (where, value)


def test_defaults_are_in_range():
    for name, (_, action) in numeric_flags().items():
        defaults = action.default if isinstance(action.default, list) else [action.default]
        assert all(value is None or value in action.type for value in defaults), name
    for where, (part, name) in numeric_options().items():
        (default,) = (item.default for item in fields(part) if item.name == name)
        assert default is None or default in range_of(part, name), where
