"""The clusters, the loss, and the way timesteps and noise are drawn that a run's flags ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from accelerate import Accelerator
from diffusers import SchedulerMixin

from ..analysis import load_task_affinity
from ..noise_levels import NoiseLevels
from ..objective.adaptive_sampling import AdaptiveTimestepSampler
from ..objective.balancing import BALANCINGS, Balancing
from ..objective.clustered_loss import ClusteredLoss, ClusteredLossOutput
from ..objective.clustering import cluster_timesteps
from ..objective.clusters import TimestepClusters
from ..objective.gradient_balancing import GradientBalancer
from ..objective.weighting import WEIGHTINGS, LogitNormal
from .config import ObjectiveConfig, TrainingConfig
from .optimizer import load_named_state, named_state
from .randomness import Draw, generator_for


@dataclass
class Objective:
    """What a training step needs between its clean samples and its loss.

    Attributes:
        clusters: The clusters of timesteps.
        loss_fn: The clustered loss.
        draw: As [`TimestepClusters.sample`].
        sampler: Whose the draw is, where it depends on what the losses were.
        parts_per_draw: How many micro-batches share one stratified draw; None for all those of an optimizer step.
        settings: What the state depends on, by the names of [`~diffusers_dtr.training.run.resuming.run_settings`].
        optimizer: Of what balancing learns, if anything: no engine shards it.
    """

    clusters: TimestepClusters
    loss_fn: ClusteredLoss
    draw: Callable[..., torch.Tensor]
    sampler: AdaptiveTimestepSampler | None
    parts_per_draw: int | None
    settings: dict[str, Any]
    optimizer: torch.optim.Optimizer | None = field(default=None, init=False)
    _observed: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, init=False)

    @property
    def levels(self) -> NoiseLevels:
        """Noise levels of the scheduler."""
        return self.loss_fn.levels

    def sample_timesteps(
        self, batch_size: int, seed: int, step: int, part: int, num_parts: int, device: torch.device
    ) -> torch.Tensor:
        """Timesteps `(batch_size,)` of micro-batch `part` of a step's `num_parts`, over all processes."""
        parts_per_draw = self.parts_per_draw or num_parts
        draw, part = divmod(part, parts_per_draw)
        generator = generator_for(Draw.TIMESTEPS, seed, step * (num_parts // parts_per_draw) + draw)
        parts = {"process_index": part, "num_processes": parts_per_draw}
        return self.draw(batch_size, generator=generator, device=device, **parts)

    def sample_weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """What corrects a loss for timesteps that were not drawn as they would be without fitting them to it."""
        return None if self.sampler is None else self.sampler.weights(timesteps)

    def observe(self, accelerator: Accelerator, timesteps: torch.Tensor, out: ClusteredLossOutput) -> None:
        """Let the draw of later steps' timesteps follow these losses; all processes must call this."""
        if self.sampler is None:
            return
        self._observed.append((timesteps, out.per_sample.detach()))
        # Not in the middle of a step, whose micro-batches are parts of one draw.
        if accelerator.sync_gradients:
            timesteps, losses = (torch.cat(parts) for parts in zip(*self._observed, strict=True))
            self._observed.clear()
            self.sampler.update(*accelerator.gather((timesteps, losses)))

    def step(self, scaler: torch.amp.GradScaler | None) -> None:
        """Take the optimizer's step, before the denoiser's one updates the scaler."""
        if self.optimizer is not None:
            self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
            self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that balancing and sampling have learned and counted, for an exact resume, as safetensors takes it."""
        sampler = {} if self.sampler is None else self.sampler.state_dict()
        state = {f"loss_fn.{name}": value for name, value in self.loss_fn.state_dict().items()}
        state |= {f"sampler.{name}": value for name, value in sampler.items()}
        state |= {f"optimizer.{name}": value for name, value in named_state(self.loss_fn, self.optimizer).items()}
        return {name: torch.as_tensor(value).contiguous() for name, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned; a `ValueError` if clusters, balancing or sampling are others."""
        loss_fn, sampler, optimizer = (
            {name.removeprefix(part): value for name, value in state_dict.items() if name.startswith(part)}
            for part in ("loss_fn.", "sampler.", "optimizer.")
        )
        try:
            self.loss_fn.load_state_dict(loss_fn)
        except RuntimeError as error:
            raise ValueError(f"`state_dict` must be of a loss with this balancing, got another's: {error}") from error
        load_named_state(self.loss_fn, self.optimizer, partial(_fill, optimizer))
        if (self.sampler is None) != (not sampler):
            raise ValueError("`state_dict` must be of the same timestep sampling, got that of another.")
        if self.sampler is not None:
            self.sampler.load_state_dict(
                {name: value.tolist() if name == "boundaries" else value for name, value in sampler.items()}
            )


def _fill(source: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    if source.keys() != tensors.keys():
        raise ValueError(f"`state_dict` must have the optimizer state {sorted(tensors)}, got {sorted(source)}.")
    for name, tensor in tensors.items():
        tensor.copy_(source[name])


def build_objective(
    config: TrainingConfig, noise_scheduler: SchedulerMixin, model: torch.nn.Module, accelerator: Accelerator
) -> Objective:
    """Clusters, loss and sampling of a run."""
    levels, options = NoiseLevels(noise_scheduler), config.objective
    if options.loss_weighting == "logit_normal" and levels.prediction_type != "flow":
        raise ValueError(
            f"`--loss_weighting logit_normal` is for flow matching, got {levels.prediction_type} prediction: use "
            "another one, such as min_snr."
        )
    cost = options.cluster_cost
    if cost == "affinity":
        cost = load_task_affinity(options.affinity_path, levels)
    clusters = cluster_timesteps(noise_scheduler, options.num_clusters, cost)
    weighting = WEIGHTINGS[options.loss_weighting]
    if options.snr_gamma is not None:
        weighting = replace(weighting, gamma=options.snr_gamma)
    loss_fn = ClusteredLoss(noise_scheduler, clusters, weighting, _balancing(config, model, accelerator))
    sampling = options.timestep_sampling or ("uniform" if options.balancing == "uniform" else "clusters")
    sampler, draw = None, partial(clusters.sample, **_distribution(options, sampling, clusters))
    if sampling in ("loss", "variance"):
        sampler = AdaptiveTimestepSampler(clusters, statistic="second_moment" if sampling == "loss" else "variance")
        draw = sampler.sample
    settings = {f"--{name}": getattr(options, name) for name in ("num_clusters", "cluster_cost", "balancing")}
    return Objective(
        clusters,
        loss_fn.to(accelerator.device),
        draw,
        sampler,
        # Gradients are compared within a forward call, which should then have samples of every cluster.
        parts_per_draw=None if options.balancing in BALANCINGS else accelerator.num_processes,
        settings={**settings, "--timestep_sampling": sampling, "cluster boundaries": list(clusters.boundaries)},
    )


def _distribution(config: ObjectiveConfig, sampling: str, clusters: TimestepClusters) -> dict[str, Any]:
    """Arguments of [`TimestepClusters.sample`], for draws that are not fitted to the loss."""
    widths = [len(cluster) for cluster in clusters]
    if config.train_cluster is not None:
        return {"shares": [width * (number == config.train_cluster) for number, width in enumerate(widths)]}
    if sampling == "uniform":
        return {"shares": widths}
    if sampling == "logit_normal":
        given = {"mean": config.logit_mean, "std": config.logit_std}
        distribution = LogitNormal(**{name: value for name, value in given.items() if value is not None})
        probabilities = distribution.probabilities(clusters.num_train_timesteps)
        shares = torch.stack([part.sum() for part in probabilities.split(widths)])
        return {"shares": shares, "importance": probabilities}
    return {}


def _balancing(config: TrainingConfig, model: torch.nn.Module, accelerator: Accelerator) -> str | Balancing:
    options = config.objective
    if options.balancing in BALANCINGS:
        return options.balancing
    samples = config.run.train_batch_size * accelerator.num_processes
    if samples < options.num_clusters:
        raise ValueError(
            f"`--balancing {options.balancing}` compares the gradients of all {options.num_clusters} clusters in a "
            f"forward call, which needs at least as many samples, got {samples}: use a larger `--train_batch_size` or "
            "fewer `--num_clusters`."
        )
    if config.run.compile:
        # Its backward graph is run once per cluster, and must not give its buffers away the first time.
        torch._functorch.config.donated_buffer = False
    return GradientBalancer(
        model,
        options.balancing,
        num_clusters=options.num_clusters,
        update_every=(options.balancing_update_every or 1) * accelerator.gradient_accumulation_steps,
        scaler=accelerator.scaler,
        seed=config.run.seed,
    )


def draw_noise(
    shape: torch.Size, generator: torch.Generator, noise_offset: float = 0.0, input_perturbation: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise to learn and the noise to add, which are the same without `input_perturbation` (arXiv 2301.11706).

    An offset is one number per sample and channel (crosslabs.org/blog/diffusion-with-offset-noise).
    """

    def draw(size: torch.Size) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    noise = draw(shape)
    if noise_offset:
        noise = noise + noise_offset * draw((*shape[:2], *(1 for _ in shape[2:])))
    added = noise + input_perturbation * draw(shape) if input_perturbation else noise
    return noise, added
