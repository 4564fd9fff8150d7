"""The exponential moving average of a model's weights, of which every process averages what it holds."""

from __future__ import annotations

import torch

from .config import EMAConfig
from .engine import Engine


class WeightAverage:
    """An average with the decay of diffusers' EMAModel with warm-up: min(max decay, 1 − (1 + step / γ)^−power).

    Attributes:
        weights: Like [`Engine.weights`]; of an offloaded average on the CPU.
        num_steps: Optimizer steps that it is over.
    """

    def __init__(self, config: EMAConfig, engine: Engine):
        self.config, self.engine, self.num_steps = config, engine, 0
        # In bfloat16, most of its small steps would be rounded away.
        copies = [
            weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True) for weight in engine.weights()
        ]
        self.weights = [copy.to("cpu") for copy in copies] if config.offload_ema else copies

    @torch.no_grad()
    def step(self) -> None:
        """Take in the weights after an optimizer step."""
        config = self.config
        decay = min(config.ema_max_decay, 1 - (1 + self.num_steps / config.ema_inv_gamma) ** -config.ema_power)
        self.num_steps += 1
        current = self.engine.weights()
        average = [weight.to(new.device) for weight, new in zip(self.weights, current, strict=True)]
        current = [new.to(mean.dtype) for new, mean in zip(current, average, strict=True)]
        torch._foreach_sub_(average, torch._foreach_sub(average, current), alpha=1 - decay)
        if self.config.offload_ema:
            # Not `non_blocking`: a checkpoint may read it next.
            self.weights = [weight.to("cpu") for weight in average]
