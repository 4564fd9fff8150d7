"""Gradients of a routed model that is wrapped for several processes. Processes of a test's own import this file."""

from __future__ import annotations

import torch
import torch.distributed as dist
from diffusers import ModelMixin
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


def share_of(inputs: dict, rank: int, world_size: int) -> dict:
    """The part of a batch that one of the processes sees."""
    return {
        name: value.chunk(world_size)[rank] if torch.is_tensor(value) and len(value) == 4 else value
        for name, value in inputs.items()
    }


def gradients(number: int, wrap=None) -> dict[str, torch.Tensor]:
    """Whole gradients of the mean loss of a batch by parameter, in float64; wrapped ones with checkpointing.

    Args:
        number: Of the model's family.
        wrap: One of `WRAPPERS`, in each process of a group; or None for the whole batch here.
    """
    family = FAMILIES[number]
    model, inputs = family.routed().double(), in_double(family.inputs())
    called = model
    if wrap is not None:
        model.enable_gradient_checkpointing()
        called = wrap(model)
        inputs = share_of(inputs, dist.get_rank(), dist.get_world_size())
    called(**inputs).sample.square().mean().backward()
    with FullyShardedDataParallel.summon_full_params(called, with_grads=True):
        return {
            name.replace("_fsdp_wrapped_module.", ""): whole(parameter.grad)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
