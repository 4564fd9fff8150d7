"""What tiny pipelines are made of: a declaration, its scheduler, and prompts as embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, SCMScheduler
from diffusers.modular_pipelines import SequentialPipelineBlocks


@dataclass(frozen=True)
class TimedPipeline:
    """A pipeline of diffusers as checkpoints of a denoiser come in, without text encoders.

    Attributes:
        denoiser: Class of diffusers.
        scheduler: Class and settings of the checkpoint's scheduler, as far as they matter for time.
        call: Makes the arguments of a call beside the number of steps.
        components: Makes what the pipeline does not do without. Everything else is None.
        config: Of the denoiser, where it is not that of the tiny one.
        stand_ins: Attributes of the pipeline that stand in for its own: methods that encode, where it takes no
            embeddings, and sizes that it does not take.
        name: Of the component that is the denoiser.
        last: Share of the window's way at which it stands in the last step: some schedules end before clean.
        requires: A module that the pipeline imports and tests do not need otherwise.
        starts_known: Whether a part of the stream is clean from the first step on, such as the first frame.
    """

    denoiser: str
    scheduler: tuple[str, dict]
    call: Callable[[], dict]
    components: Callable[[], dict] = dict
    config: Mapping[str, Any] = field(default_factory=dict)
    stand_ins: Mapping[str, Any] = field(default_factory=dict)
    name: str = "transformer"
    last: float = 0.0
    requires: str | None = None
    starts_known: bool = False

    def run(self, pipeline: str, denoiser: ModelMixin) -> None:
        """Sample by the noisiest and the cleanest of five hundred steps."""
        pipe = self._build(getattr(diffusers, pipeline), denoiser)
        call = {"num_inference_steps": 500, "output_type": "latent", **self.call()}
        known = signature(pipe.__call__).parameters
        pipe(**{name: value for name, value in call.items() if name in known or name in self.call()})

    def _build(self, pipeline: type[DiffusionPipeline], denoiser: ModelMixin) -> DiffusionPipeline:
        scheduler, settings = self.scheduler
        required = [name for name, p in signature(pipeline).parameters.items() if p.default is p.empty]
        parts = {
            **dict.fromkeys(required),
            "scheduler": ends_only(getattr(diffusers, scheduler)(**settings)),
            self.name: denoiser,
            **self.components(),
        }
        pipe = pipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        for name, value in self.stand_ins.items():
            setattr(pipe, name, value)
        return pipe


@dataclass(frozen=True)
class TimedBlocks(TimedPipeline):
    """A pipeline that diffusers has in modular blocks only.

    Attributes:
        blocks: Makes those that denoise and what they need before, by name.
    """

    blocks: Callable[[], dict] = dict

    def run(self, pipeline: str, denoiser: ModelMixin) -> None:
        pipe = SequentialPipelineBlocks.from_blocks_dict(self.blocks()).init_pipeline()
        scheduler, settings = self.scheduler
        scheduler = ends_only(getattr(diffusers, scheduler)(**settings))
        pipe.update_components(**{self.name: denoiser}, scheduler=scheduler, **self.components())
        pipe(num_inference_steps=500, **self.call())


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


def flow(**settings) -> tuple[str, dict]:
    return "FlowMatchEulerDiscreteScheduler", settings


def flow_multistep(shift: float, scheduler: str = "UniPCMultistepScheduler", **settings) -> tuple[str, dict]:
    return scheduler, {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        **settings,
    }


def caption(*shape: int) -> torch.Tensor:
    """Embeddings of a caption of 5 tokens, or of another shape."""
    return torch.randn(1, *(shape or (5, 12)), generator=torch.Generator().manual_seed(0))


def whole(tokens: int = 5) -> torch.Tensor:
    """Mask of a caption without padding."""
    return torch.ones(1, tokens, dtype=torch.long)


def guided(**prompt: Any) -> dict:
    """A prompt and the same as its negative."""
    return {**prompt, **{f"negative_{name}": value for name, value in prompt.items()}}
