"""Muon for matrices and AdamW for all else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon (kellerjordan.github.io/posts/muon) for matrices but embeddings, and AdamW for the rest.

    Muon's steps are scaled to be as large as AdamW's (arXiv 2502.16982), so that both have one learning rate.

    Args:
        model: Whose trained parameters are optimized.
        lr: Learning rate, at which both begin.
        weight_decay: Decoupled weight decay of both.
        **adam: What else AdamW takes.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, **adam: Any):
        embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim == 2 and parameter not in embeddings]
        rest = [parameter for parameter in trained if parameter.ndim != 2 or parameter in embeddings]
        common = {"lr": lr, "weight_decay": weight_decay}
        muon = (torch.optim.Muon, matrices, {"adjust_lr_fn": "match_rms_adamw"})
        self._parts = [
            kind([{"params": parameters, "initial_lr": lr}], **common, **options)
            for kind, parameters, options in (muon, (torch.optim.AdamW, rest, adam))
            if parameters
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], common)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Every time, because a loaded state is of new objects.
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss
