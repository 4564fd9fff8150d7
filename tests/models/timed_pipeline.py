"""Pipelines around tiny denoisers, without text encoders, of whose steps the first and the last are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin, SCMScheduler
from diffusers.modular_pipelines import SequentialPipelineBlocks


def caption(*shape: int) -> torch.Tensor:
    """Embeddings of a caption of 5 tokens, or of another shape."""
    return torch.randn(1, *(shape or (5, 12)), generator=torch.Generator().manual_seed(0))


def whole(tokens: int = 5) -> torch.Tensor:
    """Mask of a caption without padding."""
    return torch.ones(1, tokens, dtype=torch.long)


def guided(**prompt: Any) -> dict:
    """A prompt and the same as its negative."""
    return {**prompt, **{f"negative_{name}": value for name, value in prompt.items()}}


# What a pipeline is called with, as far as its call has the argument.
_CALL = {
    **guided(prompt_embeds=caption(), prompt_attention_mask=whole(), prompt_embeds_mask=whole()),
    **guided(pooled_prompt_embeds=caption(10)),
    **{"negative_prompt": None, "use_resolution_binning": False},
    **{"num_inference_steps": 500, "height": 64, "width": 64, "num_frames": 9, "output_type": "latent"},
}


@dataclass(frozen=True)
class TimedPipeline:
    """A pipeline of diffusers as checkpoints of a denoiser come in.

    Attributes:
        denoiser: Class of diffusers.
        scheduler: Class and settings of the checkpoint's scheduler, as far as they matter for time.
        call: Arguments of a call that are not by rule.
        components: Makes what the pipeline does not do without. Everything else is None.
        config: Of the denoiser, where it is not that of the tiny one.
        stand_ins: Attributes of the pipeline that stand in for its own: methods that encode, where it takes no
            embeddings, and sizes that it does not take.
        last: Share of the window's way at which it stands in the last step: some schedules end before clean.
        requires: A module that the pipeline imports and tests do not need otherwise.
        starts_known: Whether a part of the stream is clean from the first step on, such as the first frame.
        blocks: Makes the blocks that denoise, and what they need before, where diffusers has modular blocks only.
    """

    denoiser: str
    scheduler: tuple[str, dict]
    call: Mapping[str, Any] = field(default_factory=dict)
    components: Callable[[], dict] = dict
    config: Mapping[str, Any] = field(default_factory=dict)
    stand_ins: Mapping[str, Any] = field(default_factory=dict)
    last: float = 0.0
    requires: str | None = None
    starts_known: bool = False
    blocks: Callable[[], dict] | None = None

    def run(self, pipeline: str, denoiser: ModelMixin) -> None:
        """Sample by the noisiest and the cleanest of five hundred steps."""
        scheduler, settings = self.scheduler
        parts = {"scheduler": ends_only(getattr(diffusers, scheduler)(**settings)), **self.components()}
        if self.blocks:
            pipe = SequentialPipelineBlocks.from_blocks_dict(self.blocks()).init_pipeline()
            pipe.update_components(transformer=denoiser, **parts)
            pipe(num_inference_steps=500, **self.call)
            return
        pipeline_class = getattr(diffusers, pipeline)
        parameters = signature(pipeline_class).parameters
        name = next(name for name in ("transformer", "unet", "prior") if name in parameters)
        required = dict.fromkeys(name for name, p in parameters.items() if p.default is p.empty)
        pipe = pipeline_class(**{**required, **parts, name: denoiser})
        pipe.set_progress_bar_config(disable=True)
        for attribute, value in self.stand_ins.items():
            setattr(pipe, attribute, value)
        known = signature(pipe.__call__).parameters
        pipe(**{name: value for name, value in _CALL.items() if name in known} | self.call)


def ends_only(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Of the steps that a scheduler is set to, only the first and the last are taken."""
    plain = type(scheduler)

    @wraps(plain.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        plain.set_timesteps(self, *args, **kwargs)
        for name in ("timesteps", "sigmas"):
            values = getattr(self, name, None)
            if values is not None:
                # Where there is one more than there are steps, it is the end of the last step.
                ends_clean = name == "sigmas" or plain is SCMScheduler
                setattr(self, name, values[[0, -2, -1] if ends_clean else [0, -1]])

    # A bound method is copied with the scheduler, which some pipelines do.
    scheduler.set_timesteps = MethodType(set_timesteps, scheduler)
    return scheduler
