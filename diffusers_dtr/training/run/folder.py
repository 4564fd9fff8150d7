"""The output folder of a run: one run at a time in it, never over what is there, and never half a pipeline."""

from __future__ import annotations

import atexit
import json
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout

from ...atomic_files import move_contents, replace_text
from ...run_record import CHECKPOINT_PREFIX, PARTIAL_PIPELINE, PIPELINE_INDEX, PREVIOUS_PIPELINE, RECORD_FILE, RUN_LOCK
from .checkpoints import STATE_FILE, checkpoint_folder


def check_output_dir(output_dir: str | Path, resume_from_checkpoint: str | None = None) -> None:
    """Refuse to write over what is there, unless the run goes on with a checkpoint of this folder."""
    output_dir = Path(output_dir)
    present = sorted(output_dir.glob(f"{CHECKPOINT_PREFIX}*"))
    own = [path.resolve() for path in present if (path / STATE_FILE).is_file()]
    if own and resume_from_checkpoint is not None:
        named = checkpoint_folder(output_dir, resume_from_checkpoint).resolve()
        if resume_from_checkpoint == "latest" or named in own:
            return
    names = [PIPELINE_INDEX] if (output_dir / PIPELINE_INDEX).exists() else []
    names += [path.name for path in present if not path.suffix]
    if names:
        way = "or go on with `--resume_from_checkpoint latest`" if own else "as no checkpoint in it is complete"
        raise ValueError(
            f"`output_dir`={str(output_dir)!r} already holds {', '.join(names[:4])}. Choose another folder, "
            f"remove it, {way}."
        )


def save_pipeline(pipeline: DiffusionPipeline, output_dir: str | Path) -> None:
    """Save a pipeline into a run's folder, beside its final place first, then by renaming.

    `model_index.json` is moved last, so that the folder loads as a pipeline only when all of it is there.
    """
    output_dir = Path(output_dir)
    partial, previous = output_dir / PARTIAL_PIPELINE, output_dir / PREVIOUS_PIPELINE
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    move_contents(partial, output_dir, previous, last=PIPELINE_INDEX)


def save_record(record: dict, output_dir: str | Path) -> None:
    """Write a run's record (settings, versions, results) as JSON, replacing an older one only when complete."""
    replace_text(Path(output_dir) / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


# Locks of this process by folder, with the folders that were made for the run, innermost first. The operating system
# gives locks back when the process ends, however it ends.
_held: dict[Path, tuple[FileLock, list[Path]]] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _held.clear())


def lock_run_folder(folder: str | Path) -> None:
    """Keep other processes from running in a folder, until [`unlock_run_folder`] or the end of this process.

    A process that has it may take it again, as a notebook does after an error.
    """
    folder = Path(folder).resolve()
    if folder in _held:
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock, holder = FileLock(folder / RUN_LOCK), _holder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
        lock.acquire(blocking=False)
        _held[folder] = lock, made
        replace_text(holder, f"process {os.getpid()} on {platform.node()}")
    except Timeout:
        name = "another process"
        with suppress(FileNotFoundError):
            name = holder.read_text(encoding="utf-8")
        raise ValueError(
            f"`output_dir`={str(folder)!r} is in use by a run of {name}. Wait for it to end, stop it, or choose "
            "another folder."
        ) from None
    except OSError as error:
        raise ValueError(
            f"`output_dir` must be a folder that can be written to, got {str(folder)!r}: {error.strerror}."
        ) from error


def unlock_run_folder(folder: str | Path) -> None:
    """Let other processes run in a folder again, if this one has it, and leave nothing of the lock.

    A folder that was made for the run goes too if there is nothing in it.
    """
    folder = Path(folder).resolve()
    if folder not in _held:
        return
    lock, made = _held.pop(folder)
    # While it is held: afterwards the file may be another's lock. Who has opened it already, to wait for the lock,
    # finds out that it is deleted, and does not take it for one (filelock compares). Windows keeps an open file.
    _holder(folder).unlink(missing_ok=True)
    with suppress(PermissionError):
        (folder / RUN_LOCK).unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):  # there is something in it
        for path in made:
            path.rmdir()


def _holder(folder: Path) -> Path:
    return folder / f"{RUN_LOCK}.holder"


@atexit.register
def _unlock_all() -> None:
    for folder in [*_held]:
        unlock_run_folder(folder)
