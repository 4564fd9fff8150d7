"""The clusters, the loss and the way timesteps are drawn that a script's flags ask for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch._functorch.config
from accelerate import Accelerator
from diffusers import SchedulerMixin

from ..noise_levels import NoiseLevels
from ..objective.adaptive_sampling import AdaptiveTimestepSampler
from ..objective.balancing import BALANCINGS, Balancing
from ..objective.clustered_loss import ClusteredLoss, ClusteredLossOutput
from ..objective.clustering import TimestepClusters, cluster_timesteps
from ..objective.gradient_balancing import GradientBalancer
from .randomness import timestep_generator


@dataclass
class Objective:
    """What a training step needs between its clean samples and its loss.

    Attributes:
        clusters: The clusters of timesteps.
        loss_fn: The clustered loss.
        sampler: Draws timesteps by what the losses were; None where the draw does not depend on them.
        shares: `shares` of [`TimestepClusters.sample`].
    """

    clusters: TimestepClusters
    loss_fn: ClusteredLoss
    sampler: AdaptiveTimestepSampler | None
    shares: list[int] | None

    @property
    def levels(self) -> NoiseLevels:
        """Noise levels of the scheduler."""
        return self.loss_fn.levels

    def sample_timesteps(
        self, batch_size: int, seed: int, step: int, part: int, num_parts: int, device: torch.device
    ) -> torch.Tensor:
        """This micro-batch's part of the timesteps that are drawn for an optimizer step.

        Args:
            batch_size: Samples of the micro-batch.
            seed: The run's seed.
            step: Optimizer steps done.
            part: Number of the micro-batch among those of the step, over all processes.
            num_parts: How many there are.
            device: Where the result lies.

        Returns:
            `(batch_size,)`.
        """
        generator = timestep_generator(seed, step)
        parts = {"generator": generator, "device": device, "process_index": part, "num_processes": num_parts}
        if self.sampler is not None:
            return self.sampler.sample(batch_size, **parts)
        return self.clusters.sample(batch_size, shares=self.shares, **parts)

    def sample_weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """What corrects a loss for timesteps that were not drawn as they would be without fitting them to it."""
        return None if self.sampler is None else self.sampler.weights(timesteps)

    def observe(self, accelerator: Accelerator, timesteps: torch.Tensor, out: ClusteredLossOutput) -> None:
        """Let the draw of later timesteps follow these losses; all processes must call this."""
        if self.sampler is not None:
            self.sampler.update(*accelerator.gather((timesteps, out.per_sample.detach())))

    def describe(self) -> dict:
        """The clusters for the run's record."""
        return {"num_clusters": len(self.clusters), **self.clusters.to_dict()}


def build_objective(
    args: argparse.Namespace, noise_scheduler: SchedulerMixin, model: torch.nn.Module, accelerator: Accelerator
) -> Objective:
    """Clusters, loss and sampling of a run; their state is part of its checkpoints.

    Args:
        args: Parsed flags of [`add_objective_arguments`].
        noise_scheduler: Scheduler that is trained with.
        model: The denoiser, whose gradients gradient balancing compares.
        accelerator: Saves and loads the state.
    """
    clusters = cluster_timesteps(noise_scheduler, args.num_clusters, args.cluster_cost)
    loss_fn = ClusteredLoss(
        noise_scheduler,
        clusters,
        args.loss_weighting,
        _balancing(args, model, accelerator),
        snr_gamma=args.snr_gamma,
    ).to(accelerator.device)
    accelerator.register_for_checkpointing(loss_fn)
    sampling = args.timestep_sampling or ("uniform" if args.balancing == "uniform" else "clusters")
    sampler = None
    if sampling in ("loss", "variance"):
        statistic = "second_moment" if sampling == "loss" else "variance"
        sampler = AdaptiveTimestepSampler(clusters, statistic=statistic)
        accelerator.register_for_checkpointing(sampler)
    shares = [len(cluster) for cluster in clusters] if sampling == "uniform" else None
    return Objective(clusters, loss_fn, sampler, shares)


def _balancing(args: argparse.Namespace, model: torch.nn.Module, accelerator: Accelerator) -> str | Balancing:
    if args.balancing in BALANCINGS:
        return args.balancing
    if args.compile:
        # Its backward graph is run once per cluster, and must not give its buffers away the first time.
        torch._functorch.config.donated_buffer = False
    return GradientBalancer(
        model,
        args.balancing,
        num_clusters=args.num_clusters,
        update_every=args.balancing_update_every * args.gradient_accumulation_steps,
        scaler=accelerator.scaler,
        seed=args.seed,
    )
