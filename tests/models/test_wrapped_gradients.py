"""Wrapped for distributed training, with gradient checkpointing, a model has the gradients of the whole batch."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from process_pair import ProcessPair
from tiny_models import FAMILIES
from wrapped_gradients import WRAPPERS, gradients


every_family = pytest.mark.parametrize(
    "number", range(len(FAMILIES)), ids=[family.routed_class.__name__ for family in FAMILIES]
)
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS)


def assert_same(found, expected):
    """They differ by the order of summation, so in float64 by next to nothing.

    The absolute tolerance is for the biases of keys. These shift all of a query's scores alike, which a softmax does
    not see, so that their gradients are zero but for rounding and have no digit in common.
    """
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=1e-9, atol=1e-14)


@contextmanager
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@every_family
@every_wrapper
def test_one_process_has_those_of_the_model_itself(number, wrap):
    with one_process_group():
        found = gradients(number, wrap)
    assert_same(found, gradients(number))


@pytest.fixture(scope="module")
def pair():
    pair = ProcessPair()
    yield pair
    pair.close()


@pytest.mark.slow
@every_family
@every_wrapper
def test_two_processes_with_half_a_batch_each_have_those_of_the_whole(pair, number, wrap):
    expected = gradients(number)
    for found in pair.run(gradients, number, wrap):
        assert_same(found, expected)
