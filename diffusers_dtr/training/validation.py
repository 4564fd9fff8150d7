"""Validation that is the same for every model and every run: fixed images, noise, timesteps and seeds."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import SchedulerMixin
from diffusers.utils import make_image_grid
from PIL import Image

from ..noise_levels import NoiseLevels
from ..objective.clustering import cluster_timesteps
from ..objective.clusters import TimestepClusters
from ..user_errors import USER_ERRORS
from .config import TrainingConfig
from .data.loading import TrainingData, held_out_samples
from .engine import Engine
from .pipelines import ClassPipeline, TextPipeline, whole_autoencoder
from .randomness import derive_seed
from .run.losses import MeanLosses


logger = logging.getLogger(__name__)

# Not the run's seed: two runs are compared on the same noise.
_SEED = 0
_SAMPLING_FLAGS = (
    *("resolution", "num_validation_images", "validation_num_inference_steps", "validation_guidance_scale"),
    "max_sequence_length",
)


class HeldOutLoss:
    """Denoising loss on fixed held-out images with fixed noise, at timesteps that cover the schedule evenly.

    Which timestep an image gets is drawn once and for all, so that the same numbers come back for the same model,
    whatever the batch size or number of processes.

    Args:
        levels: Noise levels that the denoiser was trained for.
        clusters: Clusters of timesteps to average over.
        clean: Held-out images or latents, `(images, channels, height, width)`.
        batch: What else a batch of these samples has, one entry per image: labels, captions.
        evaluations_per_image: Noised copies of every image.
        batch_size: Samples per forward call.

    Raises:
        ValueError: If there are fewer samples than clusters.
    """

    def __init__(
        self,
        levels: NoiseLevels,
        clusters: TimestepClusters,
        clean: torch.Tensor,
        batch: dict[str, torch.Tensor | list] | None = None,
        evaluations_per_image: int = 1,
        batch_size: int = 64,
    ):
        self.levels = levels
        self.clusters = clusters
        self.clean = clean
        self.batch = batch or {}
        self.batch_size = batch_size
        self.num_samples = len(clean) * evaluations_per_image
        if self.num_samples < len(clusters):
            raise ValueError(
                f"Held-out loss over {len(clusters)} clusters needs at least as many samples, got {self.num_samples}: "
                "raise `evaluations_per_image`."
            )
        generator = torch.Generator().manual_seed(derive_seed(_SEED, self.num_samples))
        places = (torch.randperm(self.num_samples, generator=generator) + 0.5) / self.num_samples
        grid = levels.timesteps
        self.timesteps = levels.as_called(grid[(places * len(grid)).long()])

    @classmethod
    def by_eighths(
        cls, noise_scheduler: SchedulerMixin, clean: torch.Tensor, batch: dict[str, torch.Tensor | list]
    ) -> HeldOutLoss:
        """The loss that runs report, over every eighth of the timesteps."""
        eighths = cluster_timesteps(noise_scheduler, num_clusters=8, cost="uniform")
        return cls(NoiseLevels(noise_scheduler), eighths, clean, batch, math.ceil(len(eighths) / len(clean)))

    def describe(self) -> dict[str, int | str]:
        """The settings of this evaluation, for a record."""
        return {
            "images": len(self.clean),
            "noised_samples": self.num_samples,
            "timesteps": "one per sample, evenly over the schedule",
            "seed": _SEED,
        }

    def __call__(
        self,
        denoise: Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor | list]], torch.Tensor],
        accelerator: Accelerator,
    ) -> MeanLosses:
        """Measure a denoiser, in eval mode; all processes must call this, and share the work.

        `denoise` returns the model output for the model input and timesteps of some samples and the rest of their
        batch, which stays on the CPU.
        """
        totals = torch.zeros(2, len(self.clusters), dtype=torch.float64, device=accelerator.device)
        batches = torch.arange(self.num_samples).split(self.batch_size)
        for number in _share(len(batches), accelerator):
            indices = batches[number % len(batches)]
            timesteps = self.timesteps[indices].to(accelerator.device)
            losses = self._losses(denoise, indices, timesteps, accelerator.device)
            if number >= len(batches):
                continue
            cluster = self.clusters.assign(timesteps)
            totals[0].index_add_(0, cluster, losses.double())
            totals[1].index_add_(0, cluster, torch.ones_like(losses, dtype=torch.float64))
        return MeanLosses.of(accelerator.reduce(totals, "sum"))

    def try_out(self, denoise: Callable[..., torch.Tensor], device: torch.device) -> None:
        """Measure one sample, to see that nothing fails."""
        self._losses(denoise, torch.arange(1), self.timesteps[:1].to(device), device)

    @torch.no_grad()
    def _losses(self, denoise, indices, timesteps, device) -> torch.Tensor:
        images = indices % len(self.clean)
        clean = self.clean[images]
        noise = torch.stack([self._noise(index, clean.shape[1:]) for index in indices.tolist()])
        clean, noise = clean.to(device), noise.to(device)
        batch = {name: _select(values, images) for name, values in self.batch.items()}
        noisy = self.levels.add_noise(clean, noise, timesteps)
        output = denoise(self.levels.model_input(noisy, timesteps), timesteps, batch)[:, : clean.shape[1]]
        return (output.float() - self.levels.target(clean, noise, timesteps)).square().flatten(1).mean(1)

    def _noise(self, index: int, shape: Sequence[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(_SEED, self.num_samples, index))
        return torch.randn(*shape, generator=generator)


class Validation:
    """The held-out loss of a run and its sample grids, of which every process takes a share."""

    def __init__(
        self,
        config: TrainingConfig,
        engine: Engine,
        data: TrainingData,
        pipeline: ClassPipeline | TextPipeline,
        noise_scheduler: SchedulerMixin,
    ):
        self.config, self.engine, self.pipeline = config, engine, pipeline
        self.accelerator, self.model = engine.accelerator, engine.model
        self.held_out_loss = None
        if data.held_out is not None:
            num_images, batch_size = config.validation.max_held_out_images, config.run.train_batch_size
            with whole_autoencoder(pipeline) as vae:
                samples = held_out_samples(data.held_out, vae, num_images, batch_size, engine.accelerator.device)
            self.held_out_loss = HeldOutLoss.by_eighths(noise_scheduler, *samples)

    def __call__(self, step: int) -> dict[str, float]:
        """As [`Trainer.validate`]."""
        values = {}
        self.model.eval()
        if self.held_out_loss is not None:
            losses = self.held_out_loss(self._denoise, self.accelerator)
            values = losses.values("validation_loss", "eighth")
            logger.info(f"Step {step}: held-out loss {losses.mean:.5f}")
        images = self._sample()
        if self.accelerator.is_main_process:
            path = Path(self.config.run.output_dir) / "samples" / f"step-{step:08d}.png"
            log_image(self.accelerator, "samples", save_sample_grid(images, path), step)
        self.accelerator.log(values, step=step)
        self.accelerator.wait_for_everyone()
        self.model.train()
        return values

    def rehearse(self) -> None:
        """Try both once, in small."""
        self.model.eval()
        with forward_once(self.model), torch.compiler.set_stance("force_eager"):
            if self.held_out_loss is not None:
                self.held_out_loss.try_out(self._denoise, self.accelerator.device)
            try_sampling(self._sample, self.config)
        self.model.train()

    def describe(self) -> dict[str, int | str] | None:
        """The settings of the held-out loss, for the run's record."""
        return None if self.held_out_loss is None else self.held_out_loss.describe()

    def _sample(self) -> list[Image.Image]:
        count = self.config.validation.num_validation_images
        rows = _share(count, self.accelerator)
        with self.engine.autocast(), whole_autoencoder(self.pipeline):
            images = self.pipeline.sample([row % count for row in rows])
        if self.accelerator.num_processes == 1:
            return images
        drawn = dict(gather_object(list(zip(rows, images, strict=True))))
        return [drawn[row] for row in range(count)]

    def _denoise(self, model_input: torch.Tensor, timesteps: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        with self.engine.autocast():
            return self.pipeline.denoise(self.model, model_input, timesteps, self.pipeline.conditions(batch))


@contextmanager
def forward_once(model: torch.nn.Module) -> Iterator[None]:
    """Let a model compute inputs of each shape once, and answer later ones of that shape with the same output.

    So a pipeline can be tried with all of its steps at the price of one.
    """
    outputs = {}
    own, forward = vars(model).get("forward"), model.forward

    def remembering(*args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(enumerate(args)), **kwargs}.items()
        # Tensors by their shape; of the rest, flags such as `return_dict` alone say what comes out
        key = tuple(
            (name, value if isinstance(value, bool) else getattr(value, "shape", None)) for name, value in inputs
        )
        if key not in outputs:
            outputs[key] = forward(*args, **kwargs)
        return outputs[key]

    model.forward = remembering
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _share(count: int, accelerator: Accelerator) -> range:
    """This process's part of `count` things, as many as any other's, because calls of a sharded model are collective.

    Numbers from `count` on stand for none.
    """
    processes = accelerator.num_processes
    return range(accelerator.process_index, -(-count // processes) * processes, processes)


def _select(values: torch.Tensor | list, indices: torch.Tensor) -> torch.Tensor | list:
    return values[indices] if isinstance(values, torch.Tensor) else [values[index] for index in indices.tolist()]


def ends_epochs(step: int, images_per_step: int, num_images: int) -> bool:
    """Whether a step is the one in which a number of images has been seen once more."""
    return step * images_per_step // num_images > (step - 1) * images_per_step // num_images


def try_sampling(sample: Callable[[], list[Image.Image]], config: TrainingConfig) -> None:
    """Draw the images of a grid, and name the flags that they are drawn with if that fails."""
    try:
        sample()
    except Exception as error:
        if not isinstance(error, USER_ERRORS):
            logger.exception("Validation failed")  # it may be a bug, which the message alone would hide
        given = {name: config.options.get(name) for name in _SAMPLING_FLAGS}
        flags = ", ".join(f"`--{name} {value}`" for name, value in given.items() if value is not None)
        if config.options.get("denoiser_config") is not None:
            flags += ", a new denoiser by `--denoiser_config`"
        raise ValueError(f"Validation cannot sample with {flags}: {type(error).__name__}: {error}") from error


def save_sample_grid(images: list[Image.Image], path: Path) -> Image.Image:
    """Write images of equal size as one picture, nearly square, row by row; black fills the last row up."""
    columns = math.isqrt(len(images) - 1) + 1
    black = Image.new(images[0].mode, images[0].size)
    images = images + [black] * (-len(images) % columns)
    grid = make_image_grid(images, rows=len(images) // columns, cols=columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    return grid


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Send a picture to all trackers of a run."""
    pixels = np.asarray(image.convert("RGB"))
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            # The only one of diffusers' trackers for which accelerate has no `log_images`.
            import trackio

            tracker.log({name: trackio.Image(pixels)}, step=step)
        else:
            formats = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels[None]}, step=step, **formats)
