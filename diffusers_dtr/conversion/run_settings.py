"""Settings of the run in checkpoint files of the original DiT, DTR and ANT code: numbers, strings and the like.

DTR's files hold all of its configuration under "config", ANT's the flags under "args" and the model under "config",
DiT's the flags alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


# The places of a training checkpoint that hold settings.
_PLACES = ("args", "config")
# DTR's configuration has about 50 settings, four levels deep; what goes on for longer refers to itself.
_MAX_SETTINGS = 10_000
_MAX_DEPTH = 16

# As the authors' code calls them, and diffusers.
_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "squaredcos_cap_v2": "squaredcos_cap_v2"}
_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}

Setting = str | int | float | bool | None


class Recorded:
    """Stand-in for an object other than a tensor: it keeps the object's state as data, and executes nothing."""

    state: Any = None

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


def read_settings(checkpoint: Mapping[str, Any]) -> dict[str, Setting]:
    """The settings of a training checkpoint by their paths, such as `config.general.schedule_name`."""
    settings: dict[str, Setting] = {}
    places = {name: checkpoint[name] for name in _PLACES if name in checkpoint}
    for number, (path, value) in enumerate(_leaves("", places, 0)):
        if number > _MAX_SETTINGS:
            raise ValueError(f"The settings in the file must be at most {_MAX_SETTINGS}, got more.")
        if value is None or type(value) in (str, int, float, bool):
            settings[path] = value
    return settings


def _leaves(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"The settings in the file must be at most {_MAX_DEPTH} levels deep, got more.")
    yield path, value  # containers count too: empty ones that hold each other would have no end
    if isinstance(value, Recorded):
        state = value.state if isinstance(value.state, dict) else {}
        # OmegaConf's containers and nodes; argparse's namespace is its state.
        value = state.get("_content", state.get("_val", state))
        yield from _leaves(path, value, depth + 1)
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{path}.{key}".lstrip("."), item, depth + 1)


@dataclass(frozen=True)
class OriginalRun:
    """What a file's settings say about its model, in the terms of diffusers; None where they do not."""

    noise_schedule: str | None = None
    reason: str | None = None
    num_train_timesteps: int | None = None
    image_size: int | None = None
    vae: str | None = None


def original_run(settings: Mapping[str, Setting]) -> OriginalRun:
    """Interpret the settings of a file."""
    # ANT's script for one GPU has another autoencoder than that for several.
    is_mtl = "args.mtl_method" in settings
    return OriginalRun(
        *_noise_schedule(settings),
        num_train_timesteps=_count(_named(settings, "diffusion_steps", "taskcount")),
        image_size=_count(_named(settings, "image_size")),
        vae="madebyollin/sdxl-vae-fp16-fix" if is_mtl else _VAES.get(str(_named(settings, "vae"))),
    )


def _noise_schedule(settings: Mapping[str, Setting]) -> tuple[str | None, str | None]:
    named = _named(settings, "schedule_name", "noise_schedule")
    if named is not None:
        if named not in _SCHEDULES:
            known = ", ".join(_SCHEDULES)
            raise ValueError(f"The noise schedule of the file must be one of {known} for diffusers, got {named!r}.")
        return _SCHEDULES[named], "as the file says"
    # Those who wrote the other two scripts left it to the default of `create_diffusion`.
    if "args.total_clusters" in settings:
        return "squaredcos_cap_v2", "the file is of ANT's code, whose runs have it"
    if str(settings.get("args.model")).startswith("DiT-"):
        return "linear", "the file is of DiT's code, whose runs have it"
    return None, None


def _named(settings: Mapping[str, Setting], *names: str) -> Setting:
    """The value of the first setting of one of these names, at any level."""
    found = (value for name in names for path, value in settings.items() if path.rpartition(".")[2] == name)
    return next((value for value in found if value is not None), None)


def _count(value: Setting) -> int | None:
    return value if type(value) is int and 0 < value <= 2**20 else None
