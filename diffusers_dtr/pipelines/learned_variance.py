"""The denoiser's channels that a scheduler's step takes: the prediction, with or without a learned variance."""

from __future__ import annotations

import inspect

from diffusers import ModelMixin, SchedulerMixin

from ..noise_levels import uses_learned_variance


def check_channels(denoiser: ModelMixin, scheduler: SchedulerMixin) -> None:
    """Refuse a denoiser whose output is not the prediction, with a variance that the scheduler uses or drops."""
    config = denoiser.config
    name, variance_type = type(scheduler).__name__, scheduler.config.get("variance_type")
    channels = config.in_channels
    predicted = channels if config.out_channels is None else config.out_channels
    allowed = [2 * channels] if uses_learned_variance(scheduler) else [channels, 2 * channels]
    if predicted not in allowed:
        raise ValueError(
            f"The denoiser must predict {' or '.join(map(str, allowed))} channels, from {channels}, for {name} "
            f"with `variance_type`={variance_type!r}, got {predicted}."
        )


def scheduler_of_chosen_channels(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler, or a copy whose step keeps all of the channels that it is given."""
    if not _keeps_three_channels(scheduler):
        return scheduler
    return type(scheduler).from_config(scheduler.config, variance_type=None)


def _keeps_three_channels(scheduler: SchedulerMixin) -> bool:
    """Whether the step drops a learned variance by taking three channels, as DPM-Solvers and SASolver do."""
    # Others can have the value in their config from the scheduler that theirs was made of, but no such argument.
    if "variance_type" not in inspect.signature(type(scheduler).__init__).parameters:
        return False
    is_learned = scheduler.config.variance_type in ("learned", "learned_range")
    return is_learned and scheduler.config.prediction_type == "epsilon" and not uses_learned_variance(scheduler)
