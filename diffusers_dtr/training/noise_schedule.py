"""The noise schedule of a run: the scheduler that it trains with, and the one that its result is sampled with."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ..noise_levels import NoiseLevels, is_discrete, uses_learned_variance
from .config import NoiseConfig, TrainingConfig
from .pretrained import pretrained_scheduler


logger = logging.getLogger(__name__)

# The largest beta that diffusers makes of a cosine schedule: 1 would leave nothing of the image to be denoised.
_MAX_BETA = 0.999
_FLAGS = {
    "beta_schedule": "--noise_schedule",
    "num_train_timesteps": "--num_train_timesteps",
    "prediction_type": "--prediction_type",
}
# Sampling begins at pure noise. The noisiest timestep of the usual schedules has 0.004 (cosine) to 0.07 (Stable
# Diffusion) of the image left.
_MAX_NOISIEST_ALPHA = 0.1
# Where zero terminal SNR is asked for, Euler's and DPM-Solver's schedulers have this much left of the image.
_LOWEST_LOG_SNR = math.log(2**-24)


def load_noise_scheduler(config: TrainingConfig) -> SchedulerMixin:
    """The scheduler to train with, by the flags: a DDPMScheduler, or flow matching's where the pretrained has that.

    Raises:
        ValueError: If neither has the noise levels of the pretrained pipeline's scheduler, a flag does not go with it,
            or the flags leave an image at the noisiest timestep.
        TypeError: If nothing is known about the noise levels of that scheduler.
    """
    original = pretrained_scheduler(config.model)
    if original is None:
        scheduler = DDPMScheduler(**_changes(config.noise, DDPMScheduler().config))
    else:
        flow = NoiseLevels(original).prediction_type == "flow"
        scheduler_class = FlowMatchEulerDiscreteScheduler if flow else DDPMScheduler
        changed = _with_flags(original, config.noise)
        # What flow matching's own scheduler calls a shift is a `flow_shift` to solvers of its equation.
        shift = {"shift": changed.config.flow_shift} if changed.config.get("use_flow_sigmas") else {}
        scheduler = scheduler_class.from_config(changed.config, **shift)
        if not _same_noise_levels(changed, scheduler):
            raise ValueError(
                "`pretrained_model_name_or_path` must be a pipeline with the noise levels of a DDPMScheduler or a "
                f"FlowMatchEulerDiscreteScheduler, got a {type(original).__name__} with others."
            )
    _check_noisiest(config.noise, scheduler)
    return scheduler


def sampling_scheduler(config: TrainingConfig, *, latents: bool) -> SchedulerMixin:
    """The trained pipeline's scheduler: the pretrained one with what the flags change, or a DDPMScheduler."""
    original = pretrained_scheduler(config.model) or DDPMScheduler(clip_sample=not latents)
    scheduler = _with_flags(original, config.noise)
    _check_validation_steps(config, scheduler)
    return scheduler


def _with_flags(original: SchedulerMixin, config: NoiseConfig) -> SchedulerMixin:
    """A scheduler of the same class and config, but for what flags ask for."""
    changes = _changes(config, original.config)
    if NoiseLevels(original).prediction_type == "flow":
        given = [_FLAGS[name] for name in changes if name in _FLAGS] + ["--learn_sigma"] * config.learn_sigma
        if given:
            raise ValueError(f"`{'`, `'.join(given)}` must be left out: the pretrained pipeline has flow matching.")
    elif config.learn_sigma and isinstance(original, DDPMScheduler) and not uses_learned_variance(original):
        changes["variance_type"] = "learned_range"
    try:
        return type(original).from_config(original.config, **changes)
    except NotImplementedError as error:  # not all classes know all names
        raise ValueError(f"`--noise_schedule` must be one of {type(original).__name__}'s: {error}") from error


def _changes(options: NoiseConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags of the noise schedule change in the config of a scheduler."""
    flags = {name: getattr(options, flag.removeprefix("--")) for name, flag in _FLAGS.items()}
    changes = {name: value for name, value in flags.items() if value is not None and value != config.get(name)}
    if config.get("trained_betas") is not None and changes.keys() & {"beta_schedule", "num_train_timesteps"}:
        raise ValueError(
            "`--noise_schedule` and `--num_train_timesteps` must be left out: the pretrained one has `trained_betas`."
        )
    if "num_train_timesteps" in changes and config.get("beta_start") is not None:
        # Fewer timesteps have larger steps, so that the noisiest is as noisy (as Nichol and Dhariwal, arXiv
        # 2102.09672, do in their code).
        scale = config["num_train_timesteps"] / changes["num_train_timesteps"]
        changes |= {name: min(config[name] * scale, _MAX_BETA) for name in ("beta_start", "beta_end")}
    return changes


def _same_noise_levels(one: SchedulerMixin, other: SchedulerMixin) -> bool:
    """Whether a denoiser that was trained with one of them is told and asked the same by the other."""
    one, other = NoiseLevels(one), NoiseLevels(other)
    timesteps = other.timesteps
    return (
        one.prediction_type == other.prediction_type
        and torch.equal(one.timesteps, timesteps)
        and torch.allclose(*(levels.log_snr(timesteps).clamp(min=_LOWEST_LOG_SNR) for levels in (one, other)))
    )


def _check_noisiest(config: NoiseConfig, scheduler: SchedulerMixin) -> None:
    levels = NoiseLevels(scheduler)
    alpha = levels.alpha(levels.timesteps[-1:]).item()
    if alpha <= _MAX_NOISIEST_ALPHA:
        return
    message = (
        f"At the noisiest of the {levels.num_train_timesteps} timesteps {alpha:.2f} of the image is left, but "
        f"sampling begins at noise alone: it should be at most {_MAX_NOISIEST_ALPHA}."
    )
    if config.noise_schedule is None and config.num_train_timesteps is None:
        logger.warning(f"{message} The pretrained pipeline has it so.")
        return
    raise ValueError(f"{message} Choose another `--noise_schedule` or more `--num_train_timesteps`.")


def _check_validation_steps(config: TrainingConfig, scheduler: SchedulerMixin) -> None:
    levels, steps = NoiseLevels(scheduler), config.validation.validation_num_inference_steps
    if not is_discrete(levels.timesteps):
        return  # any number of steps fits between real-valued timesteps
    if steps <= levels.num_train_timesteps:
        trial = type(scheduler).from_config(scheduler.config)
        trial.set_timesteps(steps)
        if trial.timesteps.max() <= levels.timestep_range[1]:
            return
    raise ValueError(
        f"`--validation_num_inference_steps` must be at most the {levels.num_train_timesteps} timesteps of the noise "
        f"schedule, less the `steps_offset` of {type(scheduler).__name__}, got {steps}."
    )
