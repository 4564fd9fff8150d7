"""The moving average of a model's trained weights, of which every process averages what it holds."""

from __future__ import annotations

import numpy as np
import torch

from .config import EMAConfig
from .engine import Engine


class WeightAverage:
    """An average of the weights after every step, with a decay that grows.

    As in diffusers' EMAModel with warm-up it is min(max decay, 1 − (1 + step / inverse gamma)^−power). By the power
    function of EDM2 (arXiv 2312.02696, section 3.1) it is (1 − 1 / step)^(γ + 1), without a bound: the window that is
    averaged over is always as large a share of the steps so far, as its relative standard deviation tells.

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
        decay = self._decay()
        self.num_steps += 1
        current = self.engine.weights()
        average = [weight.to(new.device) for weight, new in zip(self.weights, current, strict=True)]
        current = [new.to(mean.dtype) for new, mean in zip(current, average, strict=True)]
        torch._foreach_sub_(average, torch._foreach_sub(average, current), alpha=1 - decay)
        if self.config.offload_ema:
            # Not `non_blocking`: a checkpoint may read it next.
            self.weights = [weight.to("cpu") for weight in average]

    def _decay(self) -> float:
        config, step = self.config, self.num_steps
        if config.ema_type == "power":
            return (1 - 1 / (step + 1)) ** (power_function_exponent(config.ema_sigma_rel or 0.1) + 1)
        return min(config.ema_max_decay, 1 - (1 + step / config.ema_inv_gamma) ** -config.ema_power)


def power_function_exponent(sigma_rel: float) -> float:
    """The γ of a window with a relative standard deviation in (0, 12^−½) (arXiv 2312.02696, appendix C)."""
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())
