"""Denoising Task Routing (arXiv 2310.07138): channel masks from timesteps, and the residual block routed through them.

The window is that of the authors' released code; their project page shows another, whose width varies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .noise_levels import scalar_dtype
from .ranges import FINITE, POSITIVE, Range


ROUTING_TYPES = ("dtr", "random", "none")
DEFAULT_TIMESTEP_RANGE = (0, 999)
ALPHA_RANGE, BETA_RANGE, SEED_RANGE = POSITIVE, Range("(0, 1]"), Range("[0, 2^32)", int)

_SETTINGS = ("alpha", "beta", "routing_type", "seed", "timestep_range")

_Integers = TypeVar("_Integers", int, torch.Tensor)

# Random routing tells at least this many timesteps apart, however narrow the range (flow matching's is [0, 1]).
_MIN_RANDOM_LEVELS = 1000


def routing_mask(
    timestep: torch.Tensor | float,
    num_channels: int,
    *,
    alpha: float = 4.0,
    beta: float = 0.8,
    timestep_range: Sequence[float] = DEFAULT_TIMESTEP_RANGE,
) -> torch.Tensor:
    r"""Which channels a residual block sees at a timestep (DTR, arXiv 2310.07138, Section 4).

    With C channels, $C_\beta = \lfloor \beta C \rfloor$ of them active and
    $\tau = \mathrm{clamp}((t - t_{min}) / (t_{max} - t_{min}), 0, 1)$, channel c is active if
    $s(t) \le c < s(t) + C_\beta$ for $s(t) = \mathrm{round}((C - C_\beta) \tau^\alpha)$, where halves round to even.

    Args:
        timestep: Scalar or `(batch,)`, of any real type: what the denoiser is called with, low meaning nearly clean.
            Timesteps outside `timestep_range` count as its nearest end.
        num_channels: C, the width of the block.
        alpha: How late the window starts to slide, > 0. At 1 it slides evenly; the larger, the more of the slide
            happens at high noise levels.
        beta: Share of the channels that are active, in (0, 1].
        timestep_range: (t_min, t_max), the timesteps at which the window stands at the first and last channels. It may
            run downwards: (1.0, 0.0) where the timestep 1.0 means clean.

    Returns:
        Bool tensor `(batch, num_channels)` on the device of `timestep`; batch is 1 for a scalar.

    Raises:
        ValueError: For an argument outside these ranges, a window of zero channels, or a timestep that is NaN.
    """
    check_routing(alpha=alpha, beta=beta, timestep_range=timestep_range, num_channels=num_channels)
    timestep = _as_batch(timestep)
    return _sliding_window(timestep, num_channels, alpha, beta, timestep_range)


def random_routing_mask(
    timestep: torch.Tensor | float,
    num_channels: int,
    *,
    seed: int = 0,
    beta: float = 0.8,
    timestep_range: Sequence[float] = DEFAULT_TIMESTEP_RANGE,
) -> torch.Tensor:
    r"""Random channels for every timestep: the baseline that DTR is compared with (arXiv 2310.07138, Section 5).

    A timestep's $\lfloor \beta C \rfloor$ active channels are those of the smallest hash of (seed, timestep, channel),
    so they are the same on every platform and no table is kept. Real-valued timesteps are first rounded to
    max(t_max - t_min, 999) + 1 equidistant levels over `timestep_range`.

    Arguments, result and errors are those of [`routing_mask`], and `seed` is an integer in [0, 2**32).
    """
    check_routing(beta=beta, timestep_range=timestep_range, seed=seed, num_channels=num_channels)
    timestep = _as_batch(timestep)
    return _random_channels(timestep, num_channels, seed, beta, timestep_range)


def routed_residual(
    block: Callable[..., torch.Tensor], hidden_states: torch.Tensor, mask: torch.Tensor | None, *args, **kwargs
) -> torch.Tensor:
    """Apply a residual block to the masked channels and carry the others past it: Block(m ⊙ x) + (1 − m) ⊙ x.

    Args:
        block: Called as `block(masked, *args, **kwargs)`. It keeps its own residual connections.
        hidden_states: Input of any shape that `mask` broadcasts to.
        mask: Bool tensor, true where a channel is active, or None for the unrouted block.
        *args: Passed on to `block`.
        **kwargs: Passed on to `block`.
    """
    if mask is None:
        return block(hidden_states, *args, **kwargs)
    output = block(hidden_states * mask, *args, **kwargs)
    return torch.addcmul(output, hidden_states, (~mask).to(hidden_states.dtype))


@dataclass(eq=False, repr=False)
class ChannelRouting:
    """The routing of one model: computes the masks of a forward call from its timesteps.

    Args:
        alpha: As in [`routing_mask`].
        beta: As in [`routing_mask`]. At 1 there is no mask, and the model is the unrouted one.
        routing_type: "dtr" (the sliding window), "random" (the paper's baseline) or "none".
        seed: Seed of random routing.
        timestep_range: (t_min, t_max), or None for (0, 999).
        widths: Widths of the blocks to route; in each, the window must hold at least one channel.

    Raises:
        ValueError: For any value that [`check_routing`] refuses.
    """

    alpha: float = 4.0
    beta: float = 0.8
    routing_type: str = "dtr"
    seed: int = 0
    timestep_range: Sequence[float] | None = None
    widths: Collection[int] = ()

    def __post_init__(self):
        if self.timestep_range is None:
            self.timestep_range = DEFAULT_TIMESTEP_RANGE
        check_routing(**{name: getattr(self, name) for name in _SETTINGS})
        _check_widths(self.beta, self.widths)
        self.timestep_range = tuple(self.timestep_range)
        self.widths = frozenset(self.widths)
        self._beta_override: torch.Tensor | None = None

    def set_beta(self, beta: float | None) -> None:
        """Change the share of active channels, in (0, 1]; None restores the configured one.

        Meant for a warm-up: in a compiled model the value may change without a new graph. A ValueError for what a
        configured share is refused for.
        """
        if beta is not None:
            check_routing(beta=beta)
            _check_widths(beta, self.widths)
        # A tensor, because a compiler would bake a Python number into the graph; a new one each time, because a
        # backward pass may still need the old.
        self._beta_override = None if beta is None else torch.tensor(beta, dtype=torch.float64)

    @property
    def config(self) -> dict[str, Any]:
        """The settings, by their names in a model's config."""
        return {f"routing_{name.removeprefix('routing_')}": getattr(self, name) for name in _SETTINGS}

    @property
    def is_active(self) -> bool:
        """Whether blocks are routed at all."""
        return self.routing_type != "none" and (self.beta < 1 or self._beta_override is not None)

    def mask(self, timestep: torch.Tensor, num_channels: int) -> torch.Tensor | None:
        """The mask for blocks of one width in one forward call.

        Args:
            timestep: `(batch,)`, or `(batch, n)` with one per frame or token, of any real type. On a CPU a NaN is an
                error; elsewhere it is not looked for, because that would wait for the device, and shows as NaN in the
                model's own timestep embedding.
            num_channels: Width of the blocks, one of `widths`.

        Returns:
            Bool tensor `(batch, num_channels)` or `(batch, n, num_channels)` on the device of `timestep`, or None
            where nothing is routed.
        """
        if not self.is_active:
            return None
        if timestep.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_no_nan(timestep)
        beta = self.beta if self._beta_override is None else self._beta_override
        if self.routing_type == "random":
            mask = _random_channels(timestep, num_channels, self.seed, beta, self.timestep_range)
        else:
            mask = _sliding_window(timestep, num_channels, self.alpha, beta, self.timestep_range)
        if torch.compiler.is_compiling():
            # The same, but it has to be in memory for that. Left to itself, the compiler computes the mask once more
            # for every element that it is applied to, which cost a compiled U-Net 5 % of its time.
            mask = mask.as_strided(mask.shape, mask.stride())
        return mask


def warmed_up_beta(step: int, warmup_steps: int, target: float) -> float:
    """Share of active channels after some steps of a linear warm-up from the unrouted model: from 1 to the target."""
    return target if step >= warmup_steps else 1.0 - (1.0 - target) * step / warmup_steps


def check_routing(
    *,
    alpha: float = 4.0,
    beta: float = 0.8,
    routing_type: str = "dtr",
    seed: int = 0,
    timestep_range: Sequence[float] = DEFAULT_TIMESTEP_RANGE,
    num_channels: int | None = None,
) -> None:
    """Raise a ValueError for invalid settings, or a share that leaves none of `num_channels` channels active."""
    ALPHA_RANGE.check(routing_alpha=alpha)
    BETA_RANGE.check(routing_beta=beta)
    if routing_type not in ROUTING_TYPES:
        raise ValueError(f"`routing_type` must be one of {', '.join(ROUTING_TYPES)}, got {routing_type!r}.")
    SEED_RANGE.check(routing_seed=seed)
    pair = isinstance(timestep_range, Sequence) and len(timestep_range) == 2
    if not pair or any(end not in FINITE for end in timestep_range) or timestep_range[0] == timestep_range[1]:
        raise ValueError(
            "`routing_timestep_range` must be (cleanest, noisiest), two different finite timesteps, got "
            f"{timestep_range!r}."
        )
    if num_channels is not None and int(beta * num_channels) < 1:
        raise ValueError(
            f"`routing_beta`={beta} leaves none of {num_channels} channels active: int({beta} * {num_channels}) = 0. "
            "It must come to at least one channel."
        )


def _check_widths(beta: float, widths: Collection[int]) -> None:
    for width in widths:
        check_routing(beta=beta, num_channels=width)


def _as_batch(timestep: torch.Tensor | float) -> torch.Tensor:
    timestep = torch.as_tensor(timestep, dtype=None if torch.is_tensor(timestep) else torch.float64)
    if timestep.ndim > 1:
        raise ValueError(f"`timestep` must be a scalar or of shape (batch,), got shape {tuple(timestep.shape)}.")
    timestep = timestep.reshape(-1)
    _check_no_nan(timestep)
    return timestep


def _check_no_nan(timestep: torch.Tensor) -> None:
    if timestep.is_floating_point() and timestep.isnan().any():
        index = int(timestep.isnan().nonzero()[0])
        raise ValueError(f"`timestep` must be a number everywhere, got NaN at index {index}.")


def _position(timestep: torch.Tensor, timestep_range: Sequence[float]) -> torch.Tensor:
    """τ in [0, 1], `(batch, 1)` or `(batch, n, 1)`."""
    # float32 moves the window of some timesteps by a channel.
    wide = timestep.to(scalar_dtype(timestep.device))
    low, high = timestep_range
    return ((wide - low) / (high - low)).clamp(0, 1)[..., None]


def _num_active(beta: float | torch.Tensor, num_channels: int) -> int | torch.Tensor:
    num_active = beta * num_channels
    return num_active.long() if torch.is_tensor(num_active) else int(num_active)


def _sliding_window(timestep, num_channels, alpha, beta, timestep_range) -> torch.Tensor:
    num_active = _num_active(beta, num_channels)
    start = torch.round((num_channels - num_active) * _position(timestep, timestep_range) ** alpha)
    channels = torch.arange(num_channels, device=timestep.device)
    return (start <= channels) & (channels < start + num_active)


def _random_channels(timestep, num_channels, seed, beta, timestep_range) -> torch.Tensor:
    num_active = _num_active(beta, num_channels)
    steps = max(abs(timestep_range[1] - timestep_range[0]), _MIN_RANDOM_LEVELS - 1)
    level = torch.round(_position(timestep, timestep_range) * steps).long()
    channels = torch.arange(num_channels, device=timestep.device)
    # The seed is mixed first: else (seed, timestep) and (0, seed ^ timestep) would have the same channels.
    key = _hash(_hash(level ^ _hash(seed)) ^ channels)
    # Ties between hashes go to the lower channel, so that the rank of a channel is well defined everywhere.
    order = (key * num_channels + channels).argsort(dim=-1)
    return order.argsort(dim=-1) < num_active


def _hash(value: _Integers) -> _Integers:
    """Mix 32-bit integers, held in int64, by two multiply-xorshift rounds (the finaliser of MurmurHash3)."""
    value = value & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return value ^ (value >> 16)
