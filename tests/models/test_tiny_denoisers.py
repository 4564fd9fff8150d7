"""The tiny denoisers are what the tests of routing take them for: models that work and answer to their input."""

from __future__ import annotations

import inspect

import diffusers.models.transformers
import pytest
import torch
from diffusers import ModelMixin
from tiny_denoisers import DENOISERS, FLEX_ATTENTION, LEFT_OUT, build, inputs, run


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in sorted(FLEX_ATTENTION)]


@pytest.mark.parametrize("name", [*sorted(DENOISERS.keys() - FLEX_ATTENTION), *SLOW])
def test_output_is_finite_and_depends_on_the_input(name):
    model = build(name)
    with torch.no_grad():
        output = run(model, inputs(name, seed=0))
        other = run(model, inputs(name, seed=1))
    assert output.isfinite().all()
    assert output.shape[0] == 2
    assert (output - other).flatten(1).abs().amax(1).min() > 1e-3


def test_the_seed_decides_the_weights():
    first, same, other = (build("FluxTransformer2DModel", seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.skipif(not diffusers.__version__.startswith("0.42."), reason="the lists are those of diffusers 0.42")
def test_every_transformer_is_here_or_left_out_for_a_reason():
    exported = inspect.getmembers(diffusers.models.transformers, inspect.isclass)
    transformers = {name for name, cls in exported if issubclass(cls, ModelMixin)}
    assert transformers - DENOISERS.keys() == LEFT_OUT.keys()
