"""The clustered loss: the denoising loss of every sample, and the balancing of the clusters they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from .balancing import BALANCINGS, Balancing, ClusterLosses, balance
from .clusters import TimestepClusters
from .denoising_loss import DenoisingLoss, DenoisingLossOutput
from .weighting import Weighting


# Of the balancing's own parameters, as in the released code of ANT.
_LEARNING_RATE = 0.025


@dataclass(frozen=True)
class ClusteredLossOutput(DenoisingLossOutput):
    """Losses of one process's batch. Its `loss` is balanced; the mean over processes is that of the global batch.

    Attributes:
        per_cluster: `(k,)`, mean of `per_sample` in each cluster, without gradient; 0 where `counts` is 0.
        counts: int64 `(k,)`, samples in each cluster. Means over several batches or processes are those of
            `per_cluster` weighted with `counts`.
    """

    per_cluster: Tensor
    counts: Tensor


class ClusteredLoss(nn.Module):
    """Denoising loss with balanced clusters of timesteps.

    A module, because balancing may learn parameters and keep state: give the optimizer its `parameter_groups()`, move
    it to the device and save its `state_dict` with the denoiser's (`accelerator.register_for_checkpointing(loss_fn)`,
    or `accelerator.prepare(loss_fn)` after the groups were taken). One step on N processes equals the step on one with
    the same global batch.

    A batch may lack some clusters, and have unequal numbers of samples in others: each sample counts 1/B.

    Args:
        noise_scheduler: The scheduler whose `add_noise` or `scale_noise` the training uses.
        clusters: Clusters of its training timesteps, from [`cluster_timesteps`].
        weighting: How squared errors are weighted by noise level, see [`DenoisingLoss`].
        balancing: "uniform" (the plain mean), "uncertainty" ([`UncertaintyWeighting`]), "continuous_uncertainty"
            ([`ContinuousUncertainty`]), or a [`Balancing`], such as a [`GradientBalancer`] of the denoiser.

    Attributes:
        levels: The [`NoiseLevels`] of the scheduler, for noisy samples and model inputs.
        clusters, balancing: As given; the balancing of a name is made.

    Raises:
        TypeError: If the scheduler cannot be trained with, or `balancing` is neither a name nor a balancing.
        ValueError: For clusters of other timesteps, a balancing for another number of them, or an unknown name.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler
        >>> from diffusers_dtr.objective import ClusteredLoss, cluster_timesteps
        >>> scheduler = DDPMScheduler()
        >>> clusters = cluster_timesteps(scheduler, num_clusters=2)
        >>> loss_fn = ClusteredLoss(scheduler, clusters, weighting="min_snr", balancing="uncertainty")
        >>> clean, noise = torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)
        >>> timesteps = clusters.sample(4, generator=torch.Generator().manual_seed(0))
        >>> noisy = loss_fn.levels.add_noise(clean, noise, timesteps)
        >>> model_output = torch.zeros(4, 3, 8, 8)  # of the denoiser, for levels.model_input(noisy, timesteps)
        >>> out = loss_fn(model_output, clean, noise, timesteps)
        >>> out.counts
        tensor([2, 2])
        >>> bool(torch.isclose(out.loss, out.per_sample.mean() / 2))
        True
    """

    def __init__(
        self,
        noise_scheduler: SchedulerMixin,
        clusters: TimestepClusters,
        weighting: str | Weighting = "constant",
        balancing: str | Balancing = "uniform",
    ):
        super().__init__()
        self._denoising_loss = DenoisingLoss(noise_scheduler, weighting)
        self.levels = self._denoising_loss.levels
        self.clusters = clusters
        num_timesteps = self.levels.num_train_timesteps
        if (
            clusters.num_train_timesteps != num_timesteps
            or TimestepClusters(clusters.boundaries, self.levels.timesteps) != clusters
        ):
            raise ValueError(
                f"`clusters` must be of the {num_timesteps} training timesteps of `noise_scheduler`, got {clusters}: "
                "make them with cluster_timesteps(noise_scheduler, ...)."
            )
        if isinstance(balancing, str):
            if balancing not in BALANCINGS:
                names = ", ".join(BALANCINGS)
                raise ValueError(
                    f"`balancing` must be one of {names}, or a Balancing (GradientBalancer), got {balancing!r}."
                )
            balancing = BALANCINGS[balancing](len(clusters))
        if not isinstance(balancing, Balancing):
            raise TypeError(f"`balancing` must be a name or a Balancing, got {type(balancing).__name__}.")
        if balancing.num_clusters not in (None, len(clusters)):
            raise ValueError(
                f"`balancing` must be for the {len(clusters)} clusters of `clusters`, "
                f"got one for {balancing.num_clusters}: pass it `num_clusters={len(clusters)}`."
            )
        self.balancing = balancing

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups for what the balancing learns, if anything: learning rate 0.025, no weight decay."""
        parameters = list(self.parameters())
        return [{"params": parameters, "lr": _LEARNING_RATE, "weight_decay": 0.0}] if parameters else []

    def denoise(
        self,
        denoiser: Callable[[Tensor, Tensor, dict[str, Any]], Tensor],
        model_input: Tensor,
        timesteps: Tensor,
        conditions: Mapping[str, Any] | None = None,
    ) -> Tensor | list[Tensor]:
        """Call a denoiser in the way that is cheapest for the balancing.

        That is once, or where a [`GradientBalancer`] is about to compare gradients once per cluster, with its samples:
        the backward passes of all clusters then cost together what one of the batch does.

        Args:
            denoiser: Called as `denoiser(model_input, timesteps, conditions)`, with some of the rows; returns
                `(rows, C, ...)`.
            model_input: `(B, C, ...)`.
            timesteps: `(B,)`.
            conditions: What else it is told: tensors, lists and dictionaries of them with B rows, or None.

        Returns:
            The output `(B, C, ...)`, or a list of one per cluster; the loss takes either.

        Raises:
            ValueError: If a condition has not B rows.
            TypeError: If a condition is none of these, or the denoiser returns no tensor with a row for each of its
                samples.
        """
        conditions = dict(conditions or {})
        _check_rows(conditions, len(timesteps))
        if not self.balancing.compares_gradients:
            return _checked_output(denoiser(model_input, timesteps, conditions), len(timesteps))
        outputs = []
        for rows in self._rows_by_cluster(timesteps):
            # Forward calls may be collective: all processes make k, one of row 0 where a cluster has no sample.
            rows = rows if len(rows) else rows.new_zeros(1)
            output = denoiser(model_input[rows], timesteps[rows], _select(conditions, rows))
            outputs.append(_checked_output(output, len(rows)))
        return outputs

    def forward(
        self,
        model_output: Tensor | list[Tensor],
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        sample_weights: Tensor | None = None,
    ) -> ClusteredLossOutput:
        """Loss of a batch; the first four arguments and errors are those of [`DenoisingLoss.__call__`].

        `model_output` may be what [`denoise`] returned. `sample_weights` `(B,)`, which enter `loss` only, are
        importance weights for timesteps that are not drawn uniformly, such as [`AdaptiveTimestepSampler.weights`].
        """
        outputs = None
        if isinstance(model_output, list):
            outputs, rows = model_output, self._rows_by_cluster(timesteps)
            ordered = torch.cat([output[: len(own)] for output, own in zip(outputs, rows, strict=True)])
            model_output = ordered[torch.cat(rows).argsort()]
        losses = self._denoising_loss(model_output, clean, noise, timesteps)
        assignment = self.clusters.assign(timesteps), self.levels.log_snr(timesteps), len(self.clusters)
        observed = ClusterLosses(losses.per_sample.detach(), *assignment)
        if sample_weights is not None and sample_weights.shape != timesteps.shape:
            raise ValueError(
                f"`sample_weights` must have the shape of `timesteps`, {tuple(timesteps.shape)}, "
                f"got {tuple(sample_weights.shape)}."
            )
        balanced = losses.per_sample if sample_weights is None else losses.per_sample * sample_weights
        loss = balance(self.balancing, ClusterLosses(balanced, *assignment, outputs))
        return ClusteredLossOutput(
            **{**vars(losses), "loss": loss}, per_cluster=observed.means, counts=observed.counts
        )

    def cluster_weights(self) -> Tensor:
        """Current weight of each cluster's losses, `(k,)`, for logging; 1 in the plain mean."""
        middles = torch.tensor([(cluster.start + cluster.stop - 1) // 2 for cluster in self.clusters])
        log_snr = self.levels.log_snr(self.levels.timesteps[middles]).float()
        device = next((tensor.device for tensor in [*self.parameters(), *self.buffers()]), log_snr.device)
        return self.balancing.cluster_weights(log_snr.to(device))

    def _rows_by_cluster(self, timesteps: Tensor) -> tuple[Tensor, ...]:
        assignment = self.clusters.assign(timesteps)
        counts = assignment.bincount(minlength=len(self.clusters)).tolist()
        return assignment.argsort(stable=True).split(counts)

    def get_extra_state(self) -> Tensor:
        """The clusters' boundaries."""
        return torch.tensor(self.clusters.boundaries, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Raise a ValueError if the saved boundaries are those of other clusters."""
        if tuple(state.tolist()) != self.clusters.boundaries:
            raise ValueError(
                f"`state_dict` must be of clusters with the boundaries {list(self.clusters.boundaries)}, "
                f"got {state.tolist()}."
            )


def _check_rows(conditions: Mapping[str, Any], num_rows: int) -> None:
    for name, value in conditions.items():
        if isinstance(value, Mapping):
            _check_rows(value, num_rows)
        elif not (value is None or isinstance(value, (Tensor, list))):
            raise TypeError(
                f"`conditions` must be tensors, lists, dictionaries of them or None, got {type(value).__name__} in "
                f"{name!r}: give what is the same for all samples in `denoiser` itself."
            )
        elif value is not None and (len(value) if isinstance(value, list) or value.ndim else None) != num_rows:
            found = tuple(value.shape) if isinstance(value, Tensor) else f"a list of {len(value)}"
            raise ValueError(f"`conditions` must have {num_rows} rows, one per sample, got {found} in {name!r}.")


def _checked_output(output: Any, num_rows: int) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != num_rows:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"`denoiser` must return a tensor with {num_rows} rows, got {found}: of a model of diffusers it is "
            "`.sample`, or the first item with `return_dict=False`."
        )
    return output


def _select(value: Any, rows: Tensor) -> Any:
    """Some rows of tensors, lists and dictionaries of them."""
    if isinstance(value, Mapping):
        return {name: _select(item, rows) for name, item in value.items()}
    if isinstance(value, Tensor):
        return value[rows]
    return value if value is None else [value[row] for row in rows.tolist()]
