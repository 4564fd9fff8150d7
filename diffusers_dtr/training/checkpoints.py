"""Checkpoints that are either complete or not there, and resuming from them."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel

from ..run_folder import CHECKPOINT_PREFIX
from .ema import load_ema_state
from .lora import has_lora, load_adapter, save_adapter
from .loss_monitor import not_finite


logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"

_CHECKPOINT = re.compile(rf"{CHECKPOINT_PREFIX}(\d+)")
_PARTIAL_SUFFIX = ".partial"


class Checkpoints:
    """The checkpoints of one run: `output_dir/checkpoint-<step>` holding all that accelerate saves, model and EMA.

    A checkpoint is written beside its final name and renamed when complete, and renamed away before it is deleted: a
    process that dies at any moment leaves no half of one under a name that counts.

    Args:
        accelerator: Its prepared model, optimizer and scheduler, and whatever is registered with it, are saved.
        output_dir: The run's folder.
        model_name: Folder of the model inside a checkpoint ("transformer" or "unet"), as in a saved pipeline.
        model: The model itself, on which the optimizer works. Of one with LoRA adapters these alone are saved, as
            `<model_name>_lora`.
        ema: Average of the model's weights, saved as `<model_name>_ema`, or None.
        total_limit: How many checkpoints to keep; the oldest go once a new one is complete. None keeps all.

    Raises:
        ValueError: For a `total_limit` below 1.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | Path,
        model_name: str,
        model: ModelMixin,
        ema: EMAModel | None = None,
        total_limit: int | None = None,
    ):
        if total_limit is not None and total_limit < 1:
            raise ValueError(f"`checkpoints_total_limit` must be at least 1, got {total_limit}.")
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.model_name = model_name
        self.model = model
        self.ema = ema
        self.total_limit = total_limit
        accelerator.register_save_state_pre_hook(self._save_models)
        accelerator.register_load_state_pre_hook(self._load_models)

    def save(self, step: int, settings: dict) -> Path:
        """Write the checkpoint of a step; all processes must call this.

        Args:
            step: Number of optimizer steps done.
            settings: What the order of data and noise depends on, compared on resuming.

        Returns:
            The checkpoint's folder.

        Raises:
            FloatingPointError: If a weight is not finite; it names the last good checkpoint.
        """
        # A finite loss can have gradients that are not, and the next loss would be too late for this checkpoint.
        if not torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all():
            raise not_finite("The weights were", step, self.latest())
        final = self.output_dir / f"{CHECKPOINT_PREFIX}{step}"
        partial = final.with_name(final.name + _PARTIAL_SUFFIX)
        if self.accelerator.is_main_process:
            # Of this step or any other: what a process left that died here.
            for abandoned in self.output_dir.glob(f"{CHECKPOINT_PREFIX}*{_PARTIAL_SUFFIX}"):
                shutil.rmtree(abandoned)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = json.dumps({"global_step": step, "settings": settings}, indent=2)
            (partial / STATE_FILE).write_text(state, encoding="utf-8")
            if final.exists():
                _remove(final)
            partial.rename(final)
            logger.info("Saved %s", final)
            if self.total_limit is not None:
                for old in list(self._complete().values())[: -self.total_limit]:
                    _remove(old)
        self.accelerator.wait_for_everyone()
        return final

    def latest(self) -> Path | None:
        """The complete checkpoint of the highest step, or None."""
        return next(reversed(self._complete().values()), None)

    def resume(self, resume_from_checkpoint: str | None, settings: dict) -> int:
        """Load a checkpoint into everything prepared.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or its name in the run's folder, or "latest", or None to
                load nothing. "latest" in a run without any checkpoint loads nothing either.
            settings: As given to `save`. A difference is warned about: the run then goes on, but not as it would have.

        Returns:
            Number of optimizer steps that the checkpoint holds; 0 where nothing was loaded.

        Raises:
            ValueError: If the folder is not a complete checkpoint, has no averaged weights for a run that averages, or
                not the adapters that a run trains, or if the run's folder holds checkpoints of later steps.
        """
        if resume_from_checkpoint is None:
            return 0
        if resume_from_checkpoint == "latest":
            path = self.latest()
            if path is None:
                logger.info("No checkpoint in the output folder yet: starting from the beginning.")
                return 0
        else:
            path = Path(resume_from_checkpoint)
            path = path if path.is_dir() else self.output_dir / resume_from_checkpoint
        if not (path / STATE_FILE).is_file():
            raise ValueError(
                f"`resume_from_checkpoint` must be a complete checkpoint or `latest`, got {resume_from_checkpoint!r}. "
                f"Complete ones here: {', '.join(p.name for p in self._complete().values()) or 'none'}."
            )
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        # They would be taken for this run's: by `latest`, and by what counts how many to keep.
        later = [other.name for step, other in self._complete().items() if step > state["global_step"]]
        if later:
            raise ValueError(
                f"`resume_from_checkpoint`={resume_from_checkpoint!r} is of step {state['global_step']}, but "
                f"{self.output_dir} holds {', '.join(later)}. Remove what is later, or choose another `--output_dir`."
            )
        changed = [key for key in settings if state["settings"].get(key) != settings[key]]
        for key in changed:
            logger.warning(
                "`%s` was %s and is %s now: the rest of the run will differ from the uninterrupted one.",
                key,
                state["settings"].get(key),
                settings[key],
            )
        if self.ema is not None and not (path / self._ema_name).is_dir():
            raise ValueError(
                f"`use_ema` must be what it was: the checkpoint {path} has no averaged weights to go on with."
            )
        if not (path / self._model_folder).is_dir():
            raise ValueError(
                f"`rank` must be what it was: the checkpoint {path} has no {self._model_folder} to go on with."
            )
        self.accelerator.load_state(str(path))
        # Forward calls since the last optimizer step, had the number of them in a step not changed.
        self.accelerator.step = 0
        logger.info("Resumed from %s", path)
        return state["global_step"]

    def _complete(self) -> dict[int, Path]:
        by_step = {
            int(match[1]): path
            for path in self.output_dir.glob(f"{CHECKPOINT_PREFIX}*")
            if (match := _CHECKPOINT.fullmatch(path.name)) and (path / STATE_FILE).is_file()
        }
        return dict(sorted(by_step.items()))

    @property
    def _model_folder(self) -> str:
        return f"{self.model_name}_lora" if has_lora(self.model) else self.model_name

    @property
    def _ema_name(self) -> str:
        return f"{self.model_name}_ema"

    def _save_models(self, models, weights, output_dir) -> None:
        if self.accelerator.is_main_process:
            save = save_adapter if has_lora(self.model) else type(self.model).save_pretrained
            save(self.model, Path(output_dir) / self._model_folder)
            if self.ema is not None:
                self.ema.save_pretrained(str(Path(output_dir) / self._ema_name))
        # What is popped here accelerate does not save a second time.
        weights.clear()

    def _load_models(self, models, input_dir) -> None:
        models.clear()
        folder = Path(input_dir) / self._model_folder
        if has_lora(self.model):
            load_adapter(self.model, folder)
        else:
            self.model.load_state_dict(type(self.model).from_pretrained(folder).state_dict())
        if self.ema is None:
            return
        device = self.ema.shadow_params[0].device
        self.ema.load_state_dict(load_ema_state(Path(input_dir) / self._ema_name, type(self.model)))
        self.ema.to(device=device)


def _remove(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(checkpoint.name + _PARTIAL_SUFFIX)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
