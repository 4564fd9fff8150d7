"""Wrapped for distributed training, with gradient checkpointing, a model has the gradients of the whole batch."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from diffusers import ModelMixin
from process_pair import ProcessPair
from tiny_models import FAMILIES, in_double
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def in_replicas(model: ModelMixin) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def in_shards_of_blocks(model: ModelMixin) -> nn.Module:
    """As accelerate does with version 1 of FSDP."""
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(lambda module: is_block(module, model)),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def in_shards_of_parameters(model: ModelMixin) -> nn.Module:
    """As accelerate does with version 2 of FSDP."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in reversed(list(model.modules())):
        if is_block(module, model):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = (in_replicas, in_shards_of_blocks, in_shards_of_parameters)


def is_block(module: nn.Module, model: ModelMixin) -> bool:
    return type(module).__name__ in (model._no_split_modules or ())


def gradients(number: int, wrap=None) -> dict[str, torch.Tensor]:
    """Whole gradients of a family's mean loss by parameter, in float64; of a share of the batch if wrapped."""
    family = FAMILIES[number]
    model, inputs = family.routed().double(), in_double(family.inputs())
    called = model
    if wrap is not None:
        model.enable_gradient_checkpointing()
        called = wrap(model)
        for name, value in inputs.items():
            if torch.is_tensor(value) and len(value) == 4:
                inputs[name] = value.chunk(dist.get_world_size())[dist.get_rank()]
    called(**inputs).sample.square().mean().backward()
    with FullyShardedDataParallel.summon_full_params(called, with_grads=True):
        whole = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad.clone()
                whole[name.replace("_fsdp_wrapped_module.", "")] = grad
        return whole


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
