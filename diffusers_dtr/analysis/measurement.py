"""Measurement of inner products of gradients, shared by several processes, and resumed after an interruption.

Results are kept in a folder, one file per timestep, named by a cache key. Processes share the work by sharing the
folder, and a file that exists is not computed again, whichever process wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ConfigMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic_files import replace_text, replacing
from ..caches import content_key
from ..evaluating import evaluating
from .estimators import gram
from .gradient_projections import Projection
from .timestep_gradients import NUM_PARTS, TimestepGradients


@dataclass(frozen=True)
class Workspace:
    """The folder of a measurement, and the number of this process.

    Args:
        folder: The folder, which all processes see.
        process_index: This process's number, in [0, num_processes).
        num_processes: How many processes share the work.
        wait_for_everyone: Returns when all processes have called it.
        progress: Wraps the timesteps that this process goes through, for instance `tqdm`.
    """

    folder: Path
    process_index: int = 0
    num_processes: int = 1
    wait_for_everyone: Callable[[], None] = lambda: None
    progress: Callable[[Sequence[int]], Iterable[int]] = iter

    def claim(self, settings: dict) -> None:
        """Start a measurement in this folder, or resume one of the same settings; all processes must call this.

        Args:
            settings: JSON-serialisable: all that results depend on, apart from the model.

        Raises:
            ValueError: If the folder has a measurement of other settings, of which at least one timestep is done.
        """
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if path.exists() and any(self.folder.glob("*.safetensors")):
            found = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(
                key for key in settings.keys() | found.keys() if settings.get(key, ...) != found.get(key, ...)
            )
            if changed:
                raise ValueError(
                    f"{self.folder} has a measurement of other settings: {', '.join(f'`{key}`' for key in changed)} "
                    "changed. Choose another folder, or remove this one to start again."
                )
        self.wait_for_everyone()
        if self.process_index == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(settings, indent=2))
        self.wait_for_everyone()

    def products(self, gradients: TimestepGradients, timesteps: Tensor, projections: Sequence[Projection]) -> Tensor:
        """Inner products of a model's gradients at all pairs of timesteps; all processes must call this.

        Args:
            gradients: Of the model.
            timesteps: `(n,)`, as the denoiser is called with.
            projections: Their inner products add up to those of the gradients.

        Returns:
            float64 `(4, 4, n, n)`, between the parts of the images.
        """
        key = _cache_key(gradients)
        total = torch.zeros(NUM_PARTS, NUM_PARTS, len(timesteps), len(timesteps), dtype=torch.float64)
        for number, projection in enumerate(projections):
            path = self.folder / f"{key}-{number}.safetensors"
            if not path.exists():
                self._measure(path, gradients, timesteps, projection)
            total += load_file(path)["products"]
        return total

    def _measure(self, path: Path, gradients: TimestepGradients, timesteps: Tensor, projection: Projection) -> None:
        files = [path.with_name(f"{path.stem}-{index:05d}.safetensors") for index in range(len(timesteps))]
        missing = [index for index, file in enumerate(files) if not file.exists()]
        # No process may begin before every one knows what is missing: they would see different lists.
        self.wait_for_everyone()
        with evaluating(gradients.model):
            for index in self.progress(missing[self.process_index :: self.num_processes]):
                parts = (gradients(timesteps[index], part, projection.names) for part in range(NUM_PARTS))
                with replacing(files[index]) as partial:
                    save_file({"features": torch.stack([projection(part).cpu() for part in parts])}, partial)
        self.wait_for_everyone()
        if self.process_index == 0:
            with replacing(path) as partial:
                save_file({"products": gram(_read_features(files))}, partial)
            for file in files:
                file.unlink()
        self.wait_for_everyone()


def _cache_key(gradients: TimestepGradients) -> str:
    """A hash of a model's class, config and weights: plain and routed models may have the same weights."""
    model = gradients.model
    config = model.config if isinstance(model, ConfigMixin) else {}
    description = {
        "class": type(model).__name__,
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        "parameters": sorted(gradients.parameters),
    }
    return content_key(description, [model])


def _read_features(files: Sequence[Path]) -> Tensor:
    """The projected gradients at all timesteps, `(4, n, size)`, read without a second copy in memory."""
    first = load_file(files[0])["features"]
    features = first.new_empty(len(first), len(files), first.shape[1])
    for index, file in enumerate(files):
        features[:, index] = load_file(file)["features"]
    return features
