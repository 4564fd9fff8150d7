"""Checkpoints that are either complete or not there, and resuming from them."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...atomic_files import PARTIAL_SUFFIX, remove_folder
from ...run_record import CHECKPOINT_PREFIX
from ..ema import averaged_weights
from ..interruption import not_finite
from ..lora import has_lora, load_adapter, save_adapter
from ..objective import Objective
from .resuming import RunState


logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
_OBJECTIVE_FILE = "objective.safetensors"
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


@dataclass(eq=False)
class Checkpoints:
    """The checkpoints of one run: `output_dir/checkpoint-<step>` holding all that accelerate saves, model and EMA.

    A checkpoint is written under another name and renamed when complete, and renamed before it is deleted: a process
    that dies at any moment leaves no half of one. Loading one runs no code that is in it: weights and the objective's
    state are safetensors, and pickles are read as tensors and plain values only. Of a model with LoRA adapters these
    alone are saved, as `<model_name>_lora`.
    """

    accelerator: Accelerator
    output_dir: Path
    model_name: str
    model: ModelMixin
    ema: EMAModel | None = None
    total_limit: int | None = None
    objective: Objective | None = None

    def __post_init__(self):
        self._model_folder = f"{self.model_name}_lora" if has_lora(self.model) else self.model_name
        self._ema_folder = f"{self.model_name}_ema"
        self.accelerator.register_save_state_pre_hook(self._save_models)
        self.accelerator.register_load_state_pre_hook(self._load_models)

    def save(self, state: RunState) -> Path:
        """Write the checkpoint of a step, unless a weight is not finite; all processes must call this."""
        step = state.global_step
        # A finite loss can have gradients that are not, and the next loss would be too late for this checkpoint.
        if not torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all():
            raise not_finite("The weights were", step, self.latest())
        final = self.output_dir / f"{CHECKPOINT_PREFIX}{step}"
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        if self.accelerator.is_main_process:
            # Of this step or any other: what a process left that died here.
            for abandoned in self.output_dir.glob(f"{CHECKPOINT_PREFIX}*{PARTIAL_SUFFIX}"):
                shutil.rmtree(abandoned)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial))
        except (OSError, RuntimeError, SafetensorError) as error:  # torch has no class of its own for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"The checkpoint of step {step} cannot be written: {error}. The last complete one is {self.latest()}."
            ) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state.write(partial / STATE_FILE)
            if final.exists():
                remove_folder(final)
            partial.rename(final)
            logger.info("Saved %s", final)
            if self.total_limit is not None:
                for old in list(complete_checkpoints(self.output_dir).values())[: -self.total_limit]:
                    remove_folder(old)
        self.accelerator.wait_for_everyone()
        return final

    def latest(self) -> Path | None:
        """The complete checkpoint of the highest step, or None."""
        return next(reversed(complete_checkpoints(self.output_dir).values()), None)

    def resume(
        self, resume_from_checkpoint: str | None, settings: dict, allow_changed_settings: bool = False
    ) -> RunState:
        """Load a checkpoint: a folder, its name in the run's, or "latest", of which there may be none yet."""
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
        needed = {"rank": self._model_folder, **({} if self.ema is None else {"use_ema": self._ema_folder})}
        for option, folder in needed.items():
            if not (path / folder).is_dir():
                raise ValueError(
                    f"`{option}` must be what it was: the checkpoint {path} has no {folder} to go on with."
                )
        if self.ema is not None:
            # By way of the model, which gets its own weights next
            _load_weights(self.model, path / self._ema_folder)
            for average, weight in zip(self.ema.shadow_params, self.model.parameters(), strict=True):
                average.copy_(weight.detach())
            self.ema.optimization_step = state.global_step
        # Whatever accelerate asks for, `torch.load` reads tensors and plain values only.
        with patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
            self.accelerator.load_state(str(path))
        if self.objective is not None:
            self.objective.load_state_dict(_read_weights(path, _OBJECTIVE_FILE))
        # Forward calls since the last optimizer step, had the number of them in a step not changed.
        self.accelerator.step = 0
        logger.info("Resumed from %s", path)
        return state

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

    def _save_models(self, models: list, weights: list, output_dir: str) -> None:
        if self.accelerator.is_main_process:
            folder = Path(output_dir)
            save = save_adapter if has_lora(self.model) else type(self.model).save_pretrained
            save(self.model, folder / self._model_folder)
            if self.ema is not None:
                # Not `EMAModel.save_pretrained`, whose config has values that no model takes.
                with averaged_weights(self.ema, self.model):
                    self.model.save_pretrained(folder / self._ema_folder)
            if self.objective is not None:
                save_file(self.objective.state_dict(), folder / _OBJECTIVE_FILE)
        # What is popped here accelerate does not save a second time.
        weights.clear()

    def _load_models(self, models: list, input_dir: str) -> None:
        models.clear()
        load = load_adapter if has_lora(self.model) else _load_weights
        load(self.model, Path(input_dir) / self._model_folder)


def _load_weights(model: ModelMixin, folder: Path) -> None:
    try:
        model.load_state_dict(_read_weights(folder))
    except RuntimeError as error:
        raise ValueError(f"{folder} must hold the weights of this model, got others: {error}") from error


def _read_weights(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """All tensors of a folder, over however many files they were spread."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(f"{folder} must hold {pattern}, but has none.")
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{folder} must hold whole safetensors files, got a damaged one: {error}") from error
