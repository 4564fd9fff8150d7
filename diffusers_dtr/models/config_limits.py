"""Refuses configs with values that no model has, before anything is built of them.

A config comes with weights that were downloaded. One with 2**31 layers or a sample size of ten digits is damaged, or
was made to exhaust the memory of whoever loads it, and would do so before the weights could show that it is wrong.
What a value must be is read from the constructor's annotations. How large it may be depends on what it counts, with
room above the largest denoisers published (Flux, 12 and 32 billion parameters; Stable Diffusion 3.5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from numbers import Real
from typing import Any, get_args, get_type_hints


# The deepest published denoisers have about 60 layers.
MAX_LAYERS = 1024
# ImageNet-21k has 21 841 classes, and schedules have some thousand timesteps.
MAX_EMBEDDINGS = 2**20
# For widths, and sides of images: the widest published denoisers have 6 144 channels, and 8K images 7 680 pixels.
MAX_SIZE = 2**14
# Values of one tuple: a U-Net has about four levels.
MAX_VALUES = 128
# Of a table with one vector per patch: 4 GiB in float32. Stable Diffusion 3.5's, 384 patches a side, has 2**28.
MAX_TABLE = 2**30

_EMBEDDINGS = ("num_embeds_ada_norm", "num_class_embeds", "num_train_timesteps")
_KINDS = {int: Real, float: Real, bool: bool, str: str}


def check_config(model_class: type, config: Mapping[str, Any]) -> None:
    """Refuse values of the wrong type, not finite, negative, or beyond what any model has.

    Values of the routing are left to [`~diffusers_dtr.routing.check_routing`], and unknown names are ignored.

    Args:
        model_class: The model, with annotations of its constructor's arguments.
        config: Some or all of the arguments. None is allowed for all of them.

    Raises:
        ValueError: Naming the argument, what is allowed, and what came.
    """
    for name, kinds in _argument_kinds(model_class).items():
        for count, value in enumerate(_flat(config.get(name)), start=1):
            if count > MAX_VALUES:
                raise ValueError(f"`{name}` must have at most {MAX_VALUES} values, got more.")
            _check_value(name, value, kinds)


def check_size(config: Mapping[str, Any], width: int) -> None:
    """Refuse sizes that are products of values which are each allowed.

    Args:
        config: The whole config, which [`check_config`] has passed.
        width: The largest number of channels of the model's blocks.

    Raises:
        ValueError: Naming the arguments, what is allowed, and what came.
    """
    if width > MAX_SIZE:
        raise ValueError(
            f"`num_attention_heads` * `attention_head_dim` must be at most {MAX_SIZE} channels, got {width}."
        )
    nested = [name for name in config if name.endswith("layers_per_block")]
    layers = math.prod(max(_flat(config[name]), default=1) for name in nested)
    if layers > MAX_LAYERS:
        raise ValueError(f"{' * '.join(f'`{name}`' for name in nested)} must be at most {MAX_LAYERS}, got {layers}.")
    if config.get("patch_size") is not None and config.get("sample_size") is not None:
        _check_position_table(config, width)


def _check_position_table(config: Mapping[str, Any], width: int) -> None:
    if config["patch_size"] < 1:
        raise ValueError(f"`patch_size` must be at least 1, got {config['patch_size']}.")
    side = config.get("pos_embed_max_size") or config["sample_size"] // config["patch_size"]
    if side**2 * width > MAX_TABLE:
        raise ValueError(
            f"`sample_size` / `patch_size`, or `pos_embed_max_size`, must be at most {math.isqrt(MAX_TABLE // width)} "
            f"for {width} channels, got {side}: the table of positions would have {side} * {side} * {width} values."
        )


def _check_value(name: str, value: Any, kinds: frozenset[type]) -> None:
    # To Python, but not to a config, True is a number.
    if not any(isinstance(value, kind) and (kind is bool) == isinstance(value, bool) for kind in kinds):
        allowed = " or ".join(
            sorted({Real: "a number", bool: "true or false", str: "a string"}[kind] for kind in kinds)
        )
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
    most = MAX_LAYERS if "layers" in name else MAX_EMBEDDINGS if name in _EMBEDDINGS else MAX_SIZE
    # Not a number is not in any range.
    if isinstance(value, Real) and not 0 <= value <= most:
        raise ValueError(f"`{name}` must be a number from 0 to {most}, beyond which no model goes, got {value!r}.")


@cache
def _argument_kinds(model_class: type) -> dict[str, frozenset[type]]:
    """What the leaves of each argument may be, whatever tuples they are in."""
    hints = get_type_hints(model_class.__init__)
    return {name: frozenset(_kinds(hint)) for name, hint in hints.items() if not name.startswith("routing_")}


def _kinds(hint: Any) -> Iterator[type]:
    if hint in _KINDS:
        yield _KINDS[hint]
    for argument in get_args(hint):
        yield from _kinds(argument)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif value is not None:
        yield value
