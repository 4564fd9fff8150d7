"""Task affinity: how much the gradients of two timesteps point the same way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic_files import replacing
from ..caches import fingerprint
from ..extras import require
from ..noise_levels import NoiseLevels
from ..objective.denoising_loss import DenoisingLoss
from .estimators import ESTIMATORS, cosines, reliability
from .gradient_projections import CountSketch, exact_blocks
from .measurement import Workspace
from .timestep_gradients import NUM_PARTS, TimestepGradients, checked_samples, named_tensors


_FORMAT = "diffusers-dtr task affinity 1"
_METADATA_KEY = "task_affinity"
_TENSORS = ("matrix", "timesteps", "training_timesteps", "log_snr")

# Schedulers make their schedules in float32, which machines and versions round differently.
_SAME_TIMESTEP = 1e-3
_SAME_LOG_SNR = 1e-2


@dataclass(frozen=True, eq=False)
class TaskAffinity:
    """Task affinity of n timesteps: cosines of their gradients, as in ANT (arXiv 2306.00354).

    [`measure`] makes one, [`save`] and [`load`] keep it, and [`full_matrix`] is what
    [`~diffusers_dtr.cluster_timesteps`] takes as `cost`.

    Attributes:
        matrix: float64 `(n, n)`, symmetric, ones on the diagonal: mean over the checkpoints.
        timesteps: float64 `(n,)`, increasing: what the denoiser was called with.
        training_timesteps: float64 `(T,)`, increasing: the training grid.
        log_snr: float64 `(n,)`: natural logarithm of the signal-to-noise ratio at `timesteps`.
        reliability: Split-half reliability of the matrix, see [`~diffusers_dtr.analysis.reliability`].
        estimator: "unbiased" or "plain", see [`~diffusers_dtr.analysis.cosines`].
        provenance: What else is known about the measurement, of JSON types.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from diffusers_dtr import DenoisingLoss, TaskAffinity, cluster_timesteps
        >>> scheduler = DDPMScheduler()
        >>> model = UNet2DModel(8, block_out_channels=(8, 8), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> clean, noise = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> affinity = TaskAffinity.measure(model, DenoisingLoss(scheduler), clean, noise, timesteps=8)
        >>> affinity.matrix.shape
        torch.Size([8, 8])
        >>> clusters = cluster_timesteps(scheduler, 4, cost=affinity.full_matrix())
    """

    matrix: Tensor
    timesteps: Tensor
    training_timesteps: Tensor
    log_snr: Tensor
    reliability: float
    estimator: str
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        models: nn.Module | Iterable[nn.Module],
        loss_fn: DenoisingLoss,
        clean: Tensor,
        noise: Tensor,
        conditions: Mapping[str, Any] | None = None,
        *,
        timesteps: int | Sequence[float] | Tensor | None = None,
        estimator: str = "unbiased",
        parameters: Callable[[str], bool] | None = None,
        sketch_size: int | None = 8192,
        seed: int = 0,
        batch_size: int | None = None,
        memory_limit: int = 2**30,
        workspace: Workspace | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> TaskAffinity:
        """Measure the affinity of a model, or its mean over several checkpoints of one.

        Every gradient is of the same images and noise. The model is called in eval mode, as
        `model(model_input, timestep=timesteps, **conditions, return_dict=False)[0]`.

        With a sketch, every gradient is projected to `sketch_size` numbers at once: memory is that of one gradient, 2
        bytes per parameter, 16 bytes for each of n · `sketch_size` numbers and 256 for each of the n² pairs (0.4 GB
        for n = 1000 at 8192). At 8192 the error of any cosine of gradients is at most 0.05 with 99 % confidence, see
        [`~diffusers_dtr.analysis.gradient_projections.CountSketch`]; of an "unbiased" cosine more, by how much longer
        the gradients of a part of the images are than the expected gradient. Without a sketch, cosines are exact, and
        computed block by block over the parameters, with all backward passes once more for every block.

        Args:
            models: The denoiser, or several checkpoints of one, which may be loaded while iterating.
            loss_fn: The loss, of the scheduler that the denoiser was trained with.
            clean: Clean samples `(N, C, ...)`, on any device; N is a multiple of 4, because the gradients of quarters
                of the images are compared.
            noise: Standard normal noise of the same shape.
            conditions: What else the denoiser is called with, by argument name: tensors `(N, ...)`, or mappings of
                these.
            timesteps: All training timesteps by default. A number n >= 2: as many, spread evenly over the training
                grid with both its ends. Or increasing timesteps themselves.
            estimator: "unbiased", free of the noise of finitely many images, or "plain": the cosines of the gradients
                over all images, as in the paper. See [`~diffusers_dtr.analysis.cosines`].
            parameters: Which parameters take part, by name; all by default. Frozen ones never do.
            sketch_size: Numbers in a sketch; None for exact cosines.
            seed: Seed of the sketch.
            batch_size: Images per forward call; N / 4 by default.
            memory_limit: Bytes that the gradients of a block may take, all timesteps and quarters together.
            workspace: Where what is measured is kept until the end, so that several processes can share the work and
                an interrupted measurement goes on. A temporary folder by default.
            settings: What else the workspace's measurement depends on, of JSON types; `provenance` holds it too.

        Raises:
            ValueError: For arguments out of range; for a workspace with a measurement of other settings; for gradients
                that are zero at some timestep, or for "unbiased" so noisy that their norm cannot be told from zero.
        """
        if estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}, got {estimator!r}.")
        samples = clean, noise, conditions = checked_samples(clean, noise, conditions)
        levels = loss_fn.levels
        measured = _measured_timesteps(levels, timesteps)
        given = {
            **(settings or {}),
            "timesteps": measured.tolist(),
            "images": len(clean),
            "samples_sha256": fingerprint(
                [("clean", clean), ("noise", noise), *sorted(named_tensors(conditions).items())]
            ),
            "sketch_size": sketch_size,
            "seed": seed,
            "memory_limit": None if sketch_size is not None else memory_limit,
        }
        all_products = []
        with TemporaryDirectory() as folder:
            workspace = workspace or Workspace(Path(folder))
            workspace.claim(given)
            for model in [models] if isinstance(models, nn.Module) else models:
                gradients = TimestepGradients(model, loss_fn, samples, parameters=parameters, batch_size=batch_size)
                if sketch_size is None:
                    projections = exact_blocks(gradients.parameters, _block_size(memory_limit, len(measured)))
                else:
                    projections = [CountSketch(gradients.parameters, sketch_size, seed)]
                all_products.append(workspace.products(gradients, levels.as_called(measured), projections))
        if not all_products:
            raise ValueError("`models` must have at least one model, got none.")
        return cls(
            matrix=torch.stack([_checked_cosines(products, estimator, measured) for products in all_products]).mean(0),
            timesteps=measured,
            training_timesteps=levels.timesteps.clone(),
            log_snr=levels.log_snr(measured),
            reliability=reliability(all_products, estimator),
            estimator=estimator,
            provenance={**given, "checkpoints": len(all_products)},
        )

    def full_matrix(self) -> Tensor:
        """The affinity of all T training timesteps: float64 `(T, T)`, symmetric, ones on the diagonal.

        Linear interpolation in the number of the timestep: bilinear between four measured values, and on the diagonal,
        along which the matrix has a ridge of ones, between the ridge and the value beside it. Timesteps before the
        first measured one have its affinities, those after the last the last one's.
        """
        grid = self.training_timesteps
        if torch.equal(self.timesteps, grid):
            return self.matrix.clone()
        below = (torch.searchsorted(grid, self.timesteps, right=True) - 1).clamp(0, len(grid) - 2)
        numbers = below + (self.timesteps - grid[below]) / (grid[below + 1] - grid[below])
        wanted = torch.arange(len(grid), dtype=torch.float64).clamp(numbers[0], numbers[-1])
        lower = (torch.searchsorted(numbers, wanted, right=True) - 1).clamp(max=len(numbers) - 2)
        share = (wanted - numbers[lower]) / (numbers[lower + 1] - numbers[lower])
        rows = torch.lerp(self.matrix[lower], self.matrix[lower + 1], share[:, None])
        full = torch.lerp(rows[:, lower], rows[:, lower + 1], share)
        beside = self.matrix.diagonal(1)[lower]
        ridge = 1 - (share[:, None] - share).abs() * (1 - beside[:, None])
        return torch.where(lower[:, None] == lower, ridge, (full + full.T) / 2)

    def with_provenance(self, **provenance: Any) -> TaskAffinity:
        """A copy with more provenance, of JSON types, added to what is known already."""
        return replace(self, provenance={**self.provenance, **provenance})

    def save(self, path: str | PathLike) -> None:
        """Save as one safetensors file, with everything but the tensors in its metadata: an atomic write."""
        description = {
            "format": _FORMAT,
            "estimator": self.estimator,
            "reliability": self.reliability,
            "provenance": self.provenance,
        }
        # Under one key: safetensors writes several in an order that changes from process to process.
        metadata = {_METADATA_KEY: json.dumps(description, sort_keys=True)}
        with replacing(path) as partial:
            save_file({name: getattr(self, name).contiguous() for name in _TENSORS}, partial, metadata)

    @classmethod
    def load(cls, path: str | PathLike) -> TaskAffinity:
        """Load a file of [`save`]; a ValueError if there is none, or it does not hold a task affinity."""
        try:
            with safe_open(path, framework="pt") as file:
                description = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
                if description.get("format") != _FORMAT:
                    raise ValueError(
                        f"`path` must be a task affinity file of `TaskAffinity.save` or compute_task_affinity.py, got "
                        f"{str(path)!r} of the format {description.get('format')!r}."
                    )
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"`path` must be a task affinity file, cannot read {str(path)!r}: {error}") from error
        return cls(**tensors, **{key: value for key, value in description.items() if key != "format"})


def load_task_affinity(path: str | PathLike, levels: NoiseLevels | None = None) -> Tensor:
    """Load the full affinity matrix of a file, float64 `(T, T)`, for `cluster_timesteps(scheduler, k, cost=...)`.

    Args:
        path: File of [`TaskAffinity.save`].
        levels: Noise levels that it must have been measured at; any by default.

    Raises:
        ValueError: If the file holds no task affinity, or one of other noise levels.
    """
    affinity = TaskAffinity.load(path)
    difference = None if levels is None else _difference(affinity, levels)
    if difference is not None:
        raise ValueError(
            f"`path`, {str(path)!r}, has the affinity of another noise schedule: {difference}. Measure it with the "
            "noise scheduler that is trained with, or train with the one that it was measured with."
        )
    return affinity.full_matrix()


def noise_distances(affinity: TaskAffinity) -> tuple[Tensor, Tensor]:
    """|Δ log SNR| and affinity of every pair of different timesteps, float64 `(pairs,)` each.

    Timesteps of infinite log SNR (pure noise, pure signal) are left out.
    """
    finite = affinity.log_snr.isfinite()
    log_snr, matrix = affinity.log_snr[finite], affinity.matrix[finite][:, finite]
    row, column = torch.triu_indices(len(log_snr), len(log_snr), offset=1)
    return (log_snr[row] - log_snr[column]).abs(), matrix[row, column]


def noise_distance_correlation(affinity: TaskAffinity) -> float:
    """Spearman's rank correlation of affinity and |Δ log SNR| over all pairs: the first observation of ANT.

    In [-1, 1]: -1 if affinity falls with every step apart, about 0 if distance says nothing.

    Raises:
        ImportError: Without SciPy.
        ValueError: For fewer than three timesteps of finite log SNR.
    """
    require("scipy", "analysis", "Rank correlations")
    from scipy import stats

    distances, affinities = noise_distances(affinity)
    if len(distances) < 2:
        raise ValueError("`affinity` must be of at least three timesteps of finite log SNR.")
    return float(stats.spearmanr(distances.numpy(), affinities.numpy()).statistic)


def _difference(affinity: TaskAffinity, levels: NoiseLevels) -> str | None:
    """How the noise levels of an affinity differ from these; None if they do not."""
    if len(affinity.training_timesteps) != len(levels.timesteps):
        return f"{len(affinity.training_timesteps)} training timesteps, not {len(levels.timesteps)}"
    shift = (affinity.training_timesteps - levels.timesteps).abs().max()
    if shift > _SAME_TIMESTEP:
        return f"training timesteps that lie up to {shift:.4g} elsewhere"
    expected = levels.log_snr(affinity.timesteps)
    # Equal infinities have no difference that is a number.
    distances = (affinity.log_snr - expected).abs().where(affinity.log_snr != expected, 0)
    worst = distances.argmax()
    if distances[worst] > _SAME_LOG_SNR:
        timestep, found = affinity.timesteps[worst], affinity.log_snr[worst]
        return f"a log SNR of {found:.4g} at timestep {timestep:.4g}, not {expected[worst]:.4g}"
    return None


def _measured_timesteps(levels: NoiseLevels, timesteps: int | Sequence[float] | Tensor | None) -> Tensor:
    grid = levels.timesteps
    if timesteps is None:
        return grid.clone()
    if isinstance(timesteps, int):
        if not 2 <= timesteps <= len(grid):
            raise ValueError(f"`timesteps`, as a number of timesteps, must be in [2, {len(grid)}], got {timesteps}.")
        return grid[torch.linspace(0, len(grid) - 1, timesteps, dtype=torch.float64).round().long()]
    given = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
    low, high = levels.timestep_range
    if given.ndim != 1 or len(given) < 2 or not ((given.diff() > 0).all() and low <= given[0] and given[-1] <= high):
        raise ValueError(
            f"`timesteps` must be at least two increasing numbers in [{low:g}, {high:g}], got {given.tolist()}."
        )
    return given


def _block_size(memory_limit: int, num_timesteps: int) -> int:
    size = memory_limit // (4 * NUM_PARTS * num_timesteps)
    if size < 1:
        raise ValueError(
            f"`memory_limit` must be at least {4 * NUM_PARTS * num_timesteps} bytes for one coordinate at "
            f"{num_timesteps} timesteps, got {memory_limit}."
        )
    return size


def _checked_cosines(products: Tensor, estimator: str, timesteps: Tensor) -> Tensor:
    matrix = cosines(products, estimator)
    missing = timesteps[matrix.diagonal().isnan()].tolist()
    if missing:
        zero = cosines(products, "plain").diagonal().isnan().any()
        reason = (
            "a layer that is initialised to zero passes no gradient to those before it: choose other `parameters`, or "
            "train the model first"
            if zero
            else "take more images, or `estimator='plain'`"
        )
        raise ValueError(
            f"`models` must have gradients whose norms are above zero{'' if zero else ' and noise'}, got none at the "
            f"timesteps {', '.join(f'{timestep:g}' for timestep in missing[:5])} ({len(missing)} of "
            f"{len(timesteps)}); {reason}."
        )
    return matrix
