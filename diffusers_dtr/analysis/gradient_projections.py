"""Projections of gradients that preserve inner products: random sketches, or exact blocks of coordinates."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..ranges import Range


# Sums in rows, which run on several threads. Their number is fixed, so that results do not depend on the machine's.
_LANES = 8
# Of a row at a time: indices, which are kept in 2 bytes and used in 8, then take 8 MB at most.
_COLUMNS = 2**17


class CountSketch:
    r"""A random projection to m numbers: every coordinate is added to, or taken from, a random one of them.

    CountSketch (Charikar, Chen and Farach-Colton, 2002), the "hashing trick" of Weinberger et al. (arXiv 0902.2206).
    Coordinate i has an independent bucket $h_i$, uniform in [0, m), and an independent sign $s_i = \pm 1$, and
    $(Sx)_b = \sum_{i : h_i = b} s_i x_i$. Both are functions of the seed and the parameter's name alone, so that the
    sketch of a gradient is the same in every process, and the sum of the sketches of any parts of it.

    **Error of a cosine.** For gradients of cosine ρ it is, to first order in S − I, $(1 - ρ^2) Z$ with
    $Z = \langle Sp, Sq \rangle$ for two orthonormal vectors p and q in their plane. Z has mean 0,
    $E Z^2 = \frac{1}{m}(1 - 2 \sum_i p_i^2 q_i^2)$ (one standard error is at most 0.011 at m = 8192), and, where only
    products survive in which every coordinate occurs an even number of times,
    $E Z^4 \le \frac{1}{m^2}(3 + 8 m \|p\|_4^4 \|q\|_4^4 + 12/m)$. By Markov's inequality
    $P(|Z| > ε) \le E Z^4 / ε^4$, **the error of any cosine is at most 0.05 with 99 % confidence, at m = 8192, for
    gradients that are spread over at least 235 coordinates** (a unit vector p is spread over $1 / \|p\|_4^4$ of them).
    When it is spread over thousands, Z is close to normal, and 99 % of the errors are below 0.029. How neighbouring
    coordinates are correlated makes no difference.

    What a gradient is concentrated on lies in small parameters: biases, the first and the last layer. So each
    coordinate of a parameter of n is first copied, $\min(16, 2^{16} / n)$ times over, and divided by the root of that
    number, which is an isometry. On a trained transformer of 1.3 M parameters the gradients were spread over 108 to
    450 coordinates, and over 1 700 and more with the copies.

    A sketch takes about 1.7 ns per parameter on one CPU core. 2 bytes per parameter are kept (4 beyond m = 16384).

    Args:
        parameters: The parameters by name; their sizes and devices are used.
        size: m, in [1, 2**30].
        seed: Seed of buckets and signs.

    Raises:
        ValueError: For a `size` outside this range.
    """

    def __init__(self, parameters: Mapping[str, Tensor], size: int, seed: int):
        Range("[1, 2^30]", int).check(sketch_size=size)
        self.names = tuple(parameters)
        self.size = size
        # A code in [0, 2m): below m, the bucket to add to; from m on, the one to take from.
        dtype = torch.int16 if 2 * size <= 2**15 else torch.int32
        self._codes = {}
        for name, value in parameters.items():
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
            shape = (value.numel() * _copies(value),)
            self._codes[name] = torch.randint(2 * size, shape, generator=generator, dtype=dtype).to(value.device)

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Sketch the gradients of all parameters: float32 `(m,)`, on their device."""
        device = gradients[self.names[0]].device
        lanes = torch.zeros(_LANES, 2 * self.size, device=device)
        for name, codes in self._codes.items():
            copies = _copies(gradients[name])
            values = gradients[name].flatten()
            values = values if copies == 1 else values.float().repeat(copies) / copies**0.5
            whole = len(values) // _LANES * _LANES
            columns = (part[:whole].view(_LANES, -1).split(_COLUMNS, dim=1) for part in (codes, values))
            for indices, addends in zip(*columns, strict=True):
                lanes.scatter_add_(1, indices.long(), addends.float())
            lanes[0].scatter_add_(0, codes[whole:].long(), values[whole:].float())
        signed = lanes.sum(0)
        return signed[: self.size] - signed[self.size :]


class CoordinateBlock:
    """Slices of some flattened parameters: inner products add up exactly over all blocks."""

    def __init__(self, slices: Mapping[str, slice]):
        self.names = tuple(slices)
        self._slices = dict(slices)

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The coordinates of the block, float32."""
        return torch.cat([gradients[name].flatten()[own].float() for name, own in self._slices.items()])


# What it projects are the gradients of its `names`, to float32 `(size,)` on their device.
Projection = CountSketch | CoordinateBlock


def exact_blocks(parameters: Mapping[str, Tensor], size: int) -> list[CoordinateBlock]:
    """Cut parameters, by name, into blocks of at most `size` >= 1 coordinates, in order; the last may be smaller."""
    blocks: list[dict[str, slice]] = [{}]
    room = size
    for name, value in parameters.items():
        start = 0
        while start < value.numel():
            if room == 0:
                blocks.append({})
                room = size
            stop = min(value.numel(), start + room)
            blocks[-1][name] = slice(start, stop)
            room -= stop - start
            start = stop
    return [CoordinateBlock(slices) for slices in blocks]


def _copies(parameter: Tensor) -> int:
    """How often each coordinate is copied."""
    return max(1, min(16, 2**16 // max(1, parameter.numel())))
