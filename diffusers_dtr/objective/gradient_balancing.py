"""Gradient balancing: clusters weighed by how their gradients agree. The weightings are torchjd's."""

from __future__ import annotations

import warnings
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ranges import COUNT
from .balancing import Balancing, ClusterLosses, num_processes
from .gramian_weighting import MEMORY, gramian_weighting, stateful_parts


if TYPE_CHECKING:
    from torchjd.aggregation import WeightedAggregator, Weighting


class GradientBalancer(Balancing):
    r"""Balancing by the Gramian of the clusters' gradients: PCGrad, NashMTL and other weightings of torchjd.

    Let $c_i = n_i L_i / B$ be the contribution of cluster i to the mean loss. Every `update_every` training steps
    the gradients $g_i$ of $c_i$ are computed, and the weighting turns their Gramian
    $G_{ij} = \langle g_i, g_j \rangle$ into weights. The loss is $\sum_i w_i c_i$: one backward pass of it gives the
    weighted sum of the gradients, in `.grad`, through hooks and accumulation like any other loss.

    Call the denoiser by [`ClusteredLoss.denoise`]: once per cluster in these steps, so that each of k backward passes
    has the samples of its cluster only, and all of them cost as much as one. Without it each is of the whole batch.

    * **Several processes**: $g_i$ are the gradients of the global batch, so one step on N processes equals the step
      on one. Each process adds up an N-th of every gradient. All of them have to call the loss in the same steps.
      FSDP2 shards gradients itself: `module` is then the whole denoiser, and accumulation reduces every micro-batch.
    * **Gradient accumulation**: weights are of the current micro-batch. With `update_every` a multiple of the
      micro-batches in an optimizer step, all of them are weighed alike.
    * **Mixed precision**: with `scaler`, gradients are of scaled losses, as in training, and the Gramian of unscaled
      ones. A Gramian that overflowed leaves the weights as they were; the scaler skips that step.
    * **Clusters without samples** in the global batch have no gradient to balance: that step leaves all weights as
      they were, and warns. `TimestepClusters.sample` draws from every cluster if the global batch has k samples.
    * **Cost** of an update: a backward pass in k parts, a few waits for the device, and with P parameters in `module`
      and N processes 4·k·P/N bytes for the gradients (float32), once P for the current one, and with N > 1 once more
      for sending it. A part of the denoiser for `module`, such as its last block, makes it cheaper: the Gramian is
      then of the gradients in this part, while all of the denoiser is trained.

    Weights are torchjd's as they are: PCGrad's are 1 where no gradients conflict, MGDA's sum to 1, and NashMTL's are
    scaled down where the update's norm would exceed 1. In evaluation mode, and without gradients, the last weights are
    used; they are ones at first. Models compiled with `torch.compile` need
    `torch._functorch.config.donated_buffer = False`, since their graph is used repeatedly.

    Args:
        module: The denoiser, before or after `accelerator.prepare`, or a part of it: the gradients are those of its
            trainable parameters.
        weighting: "pcgrad" (arXiv 2001.06782), "nash_mtl" (arXiv 2202.01017), "aligned_mtl" (arXiv 2305.19000),
            "imtl_g" (Liu et al., ICLR 2021), "mgda" (arXiv 1810.04650); or an instance of a torchjd weighting or
            weighted aggregator, if it is a function of the Gramian.
        num_clusters: k, at least 1.
        update_every: Number of training steps (calls with gradients, in training mode) that use the same weights.
        scaler: The scaler of float16 training, `accelerator.scaler`.
        seed: Seed of random weightings (the order of PCGrad's projections); the same on all processes.

    Attributes:
        weights: `(k,)`, the current weights.

    Raises:
        ImportError: Without torchjd, or what the weighting needs of its extras.
        TypeError: If `weighting` is neither a name nor such an instance.
        ValueError: If another argument is out of its range.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_dtr.objective import ClusteredLoss, GradientBalancer, cluster_timesteps
        >>> scheduler, denoiser = DDPMScheduler(), torch.nn.Conv2d(3, 3, 1)
        >>> clusters = cluster_timesteps(scheduler, num_clusters=4)
        >>> balancer = GradientBalancer(denoiser, "pcgrad", num_clusters=4)
        >>> loss_fn = ClusteredLoss(scheduler, clusters, balancing=balancer)
        >>> clean, noise = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> timesteps = clusters.sample(8, generator=torch.Generator().manual_seed(0))
        >>> noisy = loss_fn.levels.add_noise(clean, noise, timesteps)
        >>> outputs = loss_fn.denoise(lambda noisy, timesteps, conditions: denoiser(noisy), noisy, timesteps)
        >>> loss_fn(outputs, clean, noise, timesteps).loss.backward()
    """

    weights: Tensor

    def __init__(
        self,
        module: nn.Module,
        weighting: str | Weighting | WeightedAggregator = "pcgrad",
        num_clusters: int = 8,
        *,
        update_every: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        seed: int = 0,
    ):
        super().__init__()
        COUNT.check(num_clusters=num_clusters, update_every=update_every)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError("`module` must have trainable parameters, got none.")
        self.num_clusters = num_clusters
        self.update_every = update_every
        self.seed = seed
        self.scaler = scaler
        # In tuples, because modules in attributes become part of the state dict.
        self._module = (module,)
        self._weighting = (gramian_weighting(weighting, num_clusters),)
        self._step = 0
        self.register_buffer("weights", torch.ones(num_clusters))
        self.register_state_dict_post_hook(_save)
        self.register_load_state_dict_pre_hook(_load)

    def forward(self, losses: ClusterLosses) -> Tensor:
        """See [`Balancing`]."""
        if self.compares_gradients:
            self._update(losses)
        if self._is_training():
            self._step += 1
        return (self.weights * losses.contributions).sum()

    @property
    def compares_gradients(self) -> bool:
        """Whether the next loss updates the weights; see [`Balancing`]."""
        return self._is_training() and self._step % self.update_every == 0

    def _is_training(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def cluster_weights(self, log_snr: Tensor) -> Tensor:
        """See [`Balancing`]."""
        return self.weights.clone()

    def _update(self, losses: ClusterLosses) -> None:
        gramian = self._gramian(losses)
        if not gramian.isfinite().all():
            return
        without_gradient = (gramian.diagonal() == 0).nonzero()[:, 0].tolist()
        if without_gradient:
            warnings.warn(
                f"The clusters {without_gradient} had no samples with a gradient: the weights are not updated. "
                f"Draw timesteps with TimestepClusters.sample, in global batches of at least {self.num_clusters}.",
                stacklevel=2,
            )
            return
        weights = self._solve(gramian).to(self.weights)
        if num_processes() > 1:
            # Solvers of machines that round differently may stop at different weights.
            dist.broadcast(weights, src=0)
        self.weights = weights

    def _gramian(self, losses: ClusterLosses) -> Tensor:
        """Gramian of the clusters' gradients in the global batch, float64 `(k, k)` on the CPU."""
        # Not torchjd's autogram engine, which avoids keeping gradients: gradients of the global batch have inner
        # products across processes, of which it computes only those within one. It also runs modules a second time
        # under vmap, which routing masks that belong to the call, label dropout and checkpointing do not survive.
        contributions, outputs = losses.contributions, losses.outputs
        scale = 1 if self.scaler is None else self.scaler.scale(contributions.new_ones(()))
        processes = num_processes()
        sharded = processes > 1 and _is_sharded(self._module[0])
        parameters = _shards(self._module[0]) if sharded else _trainable(self._module[0])
        size = sum(parameter.to_local().numel() if sharded else parameter.numel() for parameter in parameters)
        size, shares = (size, 1) if sharded else (-(-size // processes), processes)
        dtype = reduce(torch.promote_types, (parameter.dtype for parameter in parameters), torch.float32)
        rows = torch.empty(self.num_clusters, size, dtype=dtype, device=parameters[0].device)
        gramian = torch.zeros(self.num_clusters, self.num_clusters, dtype=dtype, device=rows.device)
        scaled = contributions * scale
        if outputs is None:
            starts = zip(scaled.unbind(), [None] * self.num_clusters, strict=True)
        else:
            # A cluster's output enters its own loss only, so that one pass has all clusters' first gradients.
            kept = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            starts = zip(outputs, torch.autograd.grad(scaled.sum(), outputs, **kept), strict=True)
        for i, start in enumerate(starts):
            if sharded:
                torch.cat(_sharded_gradient(*start, parameters), out=rows[i])
            else:
                _write_gradient(*start, parameters, rows[i])
            with torch.autocast(rows.device.type, enabled=False):
                gramian[i, : i + 1] = torch.mv(rows[: i + 1], rows[i])  # unlike matrix products, never in TF32
        if processes > 1:
            dist.all_reduce(gramian)
        gramian = (gramian / (scale * shares) / (scale * shares)).to("cpu").double()
        return gramian + gramian.tril(-1).T

    def _solve(self, gramian: Tensor) -> Tensor:
        # torchjd draws from the global generator, whose state differs between processes and is not ours to advance.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed + self._step)
            return self._weighting[0](gramian)


def _write_gradient(start: Tensor, gradient: Tensor | None, parameters: list[nn.Parameter], out: Tensor) -> None:
    """Write this process's part of what a tensor's gradient leads to, summed over processes, as a flat vector.

    `torch.autograd.grad` reaches no parameter's `.grad`, and so none of the hooks with which
    `DistributedDataParallel` counts gradients that are ready.
    """
    kept = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    flat = [part.reshape(-1) for part in torch.autograd.grad(start, parameters, gradient, **kept)]
    if num_processes() == 1:
        torch.cat(flat, out=out)
        return
    padded = out.new_zeros(len(out) * num_processes())
    torch.cat(flat, out=padded[: sum(map(len, flat))])
    # Its name until torch 2.12, which warns of it from 2.13 on.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(out, padded)


def _sharded_gradient(start: Tensor, gradient: Tensor | None, shards: list[nn.Parameter]) -> list[Tensor]:
    """This process's shards of what a tensor's gradient leads to, averaged over processes, flat.

    FSDP2 puts gradients together in backward passes alone, and leaves them in `.grad`.
    """
    kept = [shard.grad for shard in shards]
    for shard in shards:
        shard.grad = None
    start.backward(gradient, retain_graph=True)
    flat = []
    for shard, before in zip(shards, kept, strict=True):
        local = shard.to_local() if shard.grad is None else shard.grad.to_local()
        flat.append(torch.zeros_like(local).flatten() if shard.grad is None else local.flatten())
        shard.grad = before
    return flat


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _shards(module: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of a module that FSDP2 shards, as this process has them between forward calls."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return _trainable(module)


def _is_sharded(module: nn.Module) -> bool:
    # Needed in process groups only, and slow to import.
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if isinstance(module, FSDPModule):
        return True
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()) or any(
        isinstance(part, FullyShardedDataParallel) for part in module.modules()
    ):
        raise TypeError(
            "`module` must hold its parameters whole on every process, as with DistributedDataParallel, or be sharded "
            "as a whole by FSDP2 (`fully_shard`): gradients of other shards cannot be balanced."
        )
    return False


def _save(balancer: GradientBalancer, state_dict: dict[str, Any], prefix: str, local_metadata: dict) -> None:
    """State dict hook: the step, and what the weighting remembers, as tensors."""
    state_dict[f"{prefix}step"] = torch.tensor(balancer._step, device="cpu")
    for name, (part, attribute) in _memory(balancer).items():
        if getattr(part, attribute) is not None:
            state_dict[f"{prefix}memory.{name}"] = torch.as_tensor(getattr(part, attribute)).clone()


def _load(balancer: GradientBalancer, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
    """The hook that reads what `_save` wrote. Keys that it leaves in the state dict are reported as unexpected."""
    _, _, missing, *_ = arguments
    if f"{prefix}step" not in state_dict:
        missing.append(f"{prefix}step")
        return
    balancer._step = int(state_dict.pop(f"{prefix}step"))
    memory = _memory(balancer)
    saved = {
        name: state_dict.pop(f"{prefix}memory.{name}") for name in memory if f"{prefix}memory.{name}" in state_dict
    }
    for part in stateful_parts(balancer._weighting[0]):
        part.reset()
    if saved:
        # A weighting prepares its state in its first call, and would do so over whatever was put there before.
        balancer._solve(torch.eye(balancer.num_clusters, dtype=torch.float64, device="cpu"))
    for name, value in saved.items():
        part, attribute = memory[name]
        is_tensor = isinstance(getattr(part, attribute), Tensor)
        setattr(part, attribute, value.cpu().clone() if is_tensor else value.cpu().numpy().copy())


def _memory(balancer: GradientBalancer) -> dict[str, tuple[nn.Module, str]]:
    """Where the weighting remembers earlier calls: the module and its attribute, by name."""
    return {
        f"{path}.{attribute}" if path else attribute: (part, attribute)
        for path, part in balancer._weighting[0].named_modules()
        for attribute in MEMORY.get(type(part).__name__, ())
    }
