"""The same training with one process and with two, which import this file."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.nn.parallel import DistributedDataParallel

from diffusers_dtr.objective import Balancing, ClusteredLoss, GradientBalancer, cluster_timesteps


class LearnedScale(Balancing):
    """A balancing as a user would write it: one uncertainty for all clusters."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, losses):
        return (-self.log_scale).exp() * losses.contributions.sum() + self.log_scale


def train(
    balancing: str,
    update_every: int = 1,
    micro_batches: int = 1,
    prepare_loss: bool = False,
    sharded: bool = False,
    apart: bool = True,
) -> dict[str, Any]:
    """Three SGD steps on a fixed sequence of global batches, of which each process takes an equal part.

    Timesteps are drawn without strata, so that processes have unequal numbers of samples in the clusters. The global
    random states differ between processes.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(100 + rank)
    denoiser = small_denoiser(generator)
    wrapped = denoiser
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        wrapped = fully_shard(denoiser, mesh=mesh) if sharded else DistributedDataParallel(denoiser)
    scheduler = DDPMScheduler()
    clusters = cluster_timesteps(scheduler, num_clusters=4)
    if balancing == "own":
        balancing = LearnedScale()
    elif balancing in ("pcgrad", "nash_mtl"):
        balancing = GradientBalancer(wrapped, balancing, num_clusters=4, update_every=update_every)
    loss_fn = ClusteredLoss(scheduler, clusters, balancing=balancing)
    optimizer = torch.optim.SGD([{"params": denoiser.parameters(), "lr": 0.1}, *loss_fn.parameter_groups()])
    loss_module = DistributedDataParallel(loss_fn) if prepare_loss and world > 1 else loss_fn

    losses = []
    for _ in range(3):
        for micro_batch in range(micro_batches):
            batch = [part.chunk(world)[rank] for part in global_batch(generator)]
            last = micro_batch == micro_batches - 1
            with contextlib.nullcontext() if last or world == 1 or sharded else wrapped.no_sync():
                noisy = loss_fn.levels.add_noise(*batch)
                output = loss_fn.denoise(lambda some, *_: wrapped(some), noisy, batch[2]) if apart else wrapped(noisy)
                loss = loss_module(output, *batch).loss
                (loss / micro_batches).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return {
        "denoiser": {name: whole(value).clone() for name, value in denoiser.state_dict().items()},
        "loss_fn": {name: value.clone() for name, value in loss_fn.state_dict().items()},
        "losses": losses,
    }


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def small_denoiser(generator: torch.Generator) -> nn.Module:
    """65 parameters, which no two processes can share equally, near half the identity: clusters pull either way."""
    denoiser = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        for layer in denoiser:
            nn.init.dirac_(layer.weight).mul_(0.7)
            nn.init.zeros_(layer.bias)
        for parameter in denoiser.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def global_batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clean samples and noise `(16, 2, 4, 4)`, and timesteps in each of four clusters, but not in each half."""
    clean, noise = torch.randn(2, 16, 2, 4, 4, generator=generator)
    timesteps = torch.randint(1000, (16,), generator=generator)
    timesteps[[0, 5, 9, 14]] = torch.tensor([30, 370, 630, 900])
    return clean, noise, timesteps


def balance_sharded_denoiser() -> str:
    """The message with which a denoiser is refused whose parameters are DTensors, but not FSDP2's."""
    denoiser = distribute_module(small_denoiser(torch.Generator().manual_seed(0)), init_device_mesh("cpu", (2,)))
    scheduler = DDPMScheduler()
    clusters = cluster_timesteps(scheduler, num_clusters=4)
    loss_fn = ClusteredLoss(scheduler, clusters, balancing=GradientBalancer(denoiser, num_clusters=4))
    clean, noise, timesteps = global_batch(torch.Generator().manual_seed(0))
    try:
        loss_fn(clean.clone().requires_grad_(), clean, noise, timesteps)
    except TypeError as error:
        return str(error)
    raise AssertionError("the sharded denoiser was not refused")
