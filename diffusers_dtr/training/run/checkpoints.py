"""Checkpoints that are either complete or not there, and resuming from them."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException

from ...atomic_files import PARTIAL_SUFFIX, remove_folder
from ...run_record import CHECKPOINT_PREFIX
from ..ema import WeightAverage
from ..engine import Engine, read_tensors
from ..interruption import not_finite
from ..lora import has_lora, load_adapter, save_adapter
from ..objective import Objective
from .resuming import RunState


logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
_OBJECTIVE_FILE = "objective.safetensors"
_OPTIMIZER_FOLDER = "optimizer"
_CHECKPOINT = re.compile(rf"{CHECKPOINT_PREFIX}(\d+)")


def complete_checkpoints(output_dir: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by their steps, in ascending order."""
    by_step = {
        int(match[1]): path
        for path in output_dir.glob(f"{CHECKPOINT_PREFIX}*")
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / STATE_FILE).is_file()
    }
    return dict(sorted(by_step.items()))


def checkpoint_folder(output_dir: Path, name: str) -> Path:
    """The folder of a checkpoint, given by its path or by its name in the run's folder."""
    return Path(name) if Path(name).is_dir() else output_dir / name


class Checkpoints:
    """The checkpoints of one run: `output_dir/checkpoint-<step>` with the weights and all else that it has learned.

    A checkpoint is written under another name and renamed when complete, and renamed before it is deleted: a process
    that dies at any moment leaves no half of one. Loading one runs no code that is in it: it is safetensors and JSON.
    An engine that saves what each process holds writes sharded files; whatever wrote one, every engine with any number
    of processes goes on from it. Of a model with LoRA adapters these alone are saved, as `<model_name>_lora`, with
    their average.
    """

    def __init__(
        self,
        engine: Engine,
        output_dir: str | Path,
        model_name: str,
        total_limit: int | None = None,
        objective: Objective | None = None,
    ):
        self.engine, self.output_dir = engine, Path(output_dir)
        self.total_limit, self.objective = total_limit, objective
        self._lora = has_lora(engine.model)
        self._model_folder = f"{model_name}_lora" if self._lora else model_name
        self._ema_folder = f"{model_name}_ema"
        self._path: Path | None = None

    def save(self, state: RunState, average: WeightAverage | None = None) -> Path:
        """Write the checkpoint of a step, unless a weight is not finite; all processes must call this."""
        step, accelerator = state.global_step, self.engine.accelerator
        # A finite loss can have gradients that are not, and the next loss would be too late for this checkpoint.
        finite = torch.stack([weight.isfinite().all() for weight in self.engine.weights()]).all()
        if not accelerator.gather(finite.reshape(1)).all():
            raise not_finite("The weights were", step, self.latest())
        final = self.output_dir / f"{CHECKPOINT_PREFIX}{step}"
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        if accelerator.is_main_process:
            # Of this step or any other: what a process left that died here.
            for abandoned in self.output_dir.glob(f"{CHECKPOINT_PREFIX}*{PARTIAL_SUFFIX}"):
                shutil.rmtree(abandoned)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            self._write(partial, average)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                state.scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
                state.write(partial / STATE_FILE)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:  # of a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"The checkpoint of step {step} cannot be written: {error}. The last complete one is {self.latest()}."
            ) from error
        if accelerator.is_main_process:
            if final.exists():
                remove_folder(final)
            partial.rename(final)
            logger.info("Saved %s", final)
            if self.total_limit is not None:
                for old in list(complete_checkpoints(self.output_dir).values())[: -self.total_limit]:
                    remove_folder(old)
        accelerator.wait_for_everyone()
        return final

    def _write(self, folder: Path, average: WeightAverage | None) -> None:
        self._save_model(folder / self._model_folder)
        if average is not None and self._lora:
            self.engine.save_trained(folder / self._ema_folder, average.weights)
        elif average is not None:
            self._save_model(folder / self._ema_folder, average.weights)
        self.engine.save_optimizer(folder / _OPTIMIZER_FOLDER)
        if self.objective is not None and self.engine.accelerator.is_main_process:
            save_file(self.objective.state_dict(), folder / _OBJECTIVE_FILE)

    def _save_model(self, folder: Path, weights: list[torch.Tensor] | None = None) -> None:
        if self.engine.saves_parts and not self._lora:
            self.engine.save_parts(folder, weights)
            return
        with self.engine.whole_model(weights) as model:
            if model is not None:
                save_adapter(model, folder) if self._lora else model.save_pretrained(folder)

    def latest(self) -> Path | None:
        """The complete checkpoint of the highest step, or None."""
        return next(reversed(complete_checkpoints(self.output_dir).values()), None)

    def resume(
        self, resume_from_checkpoint: str | None, settings: dict, allow_changed_settings: bool = False
    ) -> RunState:
        """Load a checkpoint's weights: of a folder, its name in the run's, or "latest", if there is one.

        The model must not be prepared yet; what else the checkpoint has is restored by [`restore`].
        """
        path = self._find(resume_from_checkpoint)
        if path is None:
            return RunState(settings=settings)
        state = RunState.read(path / STATE_FILE)
        # They would be taken for this run's: by `latest`, and by what counts how many to keep.
        complete = complete_checkpoints(self.output_dir).items()
        later = [other.name for step, other in complete if step > state.global_step]
        if later:
            raise ValueError(
                f"`resume_from_checkpoint`={resume_from_checkpoint!r} is of step {state.global_step}, but "
                f"{self.output_dir} holds {', '.join(later)}. Remove what is later, or choose another `--output_dir`."
            )
        state.go_on(settings, allow_changed_settings)
        for folder, option in ((self._model_folder, "rank"), (_OPTIMIZER_FOLDER, None)):
            if not (path / folder).is_dir():
                reason = f"`{option}` must be what it was" if option else "It is of another version of this library"
                raise ValueError(f"{reason}: the checkpoint {path} has no {folder} to go on with.")
        load = load_adapter if self._lora else load_weights
        with self._naming_others(path):
            load(self.engine.model, path / self._model_folder)
        self._path = path
        return state

    def restore(self, state: RunState, average: WeightAverage | None = None) -> None:
        """Go on with all else that the checkpoint has, after the model is prepared; all processes must call this."""
        path, accelerator = self._path, self.engine.accelerator
        if path is None:
            return
        if average is not None and not (path / self._ema_folder).is_dir():
            raise ValueError(f"`use_ema` must be what it was: {path} has no {self._ema_folder} to go on with.")
        with self._naming_others(path):
            if average is not None:
                self.engine.read(path / self._ema_folder, average.weights)
                average.num_steps = state.global_step
            self.engine.load_optimizer(path / _OPTIMIZER_FOLDER)
            if self.objective is not None:
                self.objective.load_state_dict(_load_tensors(path / _OBJECTIVE_FILE))
        if accelerator.scaler is not None and state.scaler:
            accelerator.scaler.load_state_dict(state.scaler)
        logger.info("Resumed from %s", path)

    @contextmanager
    def _naming_others(self, path: Path) -> Iterator[None]:
        """Where a checkpoint cannot be read, name those that may."""
        try:
            yield
        except ValueError as error:
            names = [other.name for other in complete_checkpoints(self.output_dir).values()]
            others = [name for name in names if name != path.name]
            if not others:
                raise
            raise ValueError(f"{error} Without this checkpoint, one can go on with {', '.join(others)}.") from error

    def _find(self, resume_from_checkpoint: str | None) -> Path | None:
        if resume_from_checkpoint is None:
            return None
        if resume_from_checkpoint == "latest":
            path = self.latest()
            if path is None:
                logger.info("No checkpoint in the output folder yet: starting from the beginning.")
            return path
        path = checkpoint_folder(self.output_dir, resume_from_checkpoint)
        if not (path / STATE_FILE).is_file():
            complete = [checkpoint.name for checkpoint in complete_checkpoints(self.output_dir).values()]
            raise ValueError(
                f"`resume_from_checkpoint` must be a complete checkpoint or `latest`, got {resume_from_checkpoint!r}. "
                f"Complete ones here: {', '.join(complete) or 'none'}."
            )
        return path


def load_weights(model: ModelMixin, folder: Path) -> None:
    """Give an ordinary model its weights from safetensors files, sharded or not."""
    state = model.state_dict()
    read_tensors(folder, state)
    model.load_state_dict(state)


def _load_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} must be a whole safetensors file: {error}") from error
