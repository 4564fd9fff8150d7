"""The output folder of a run: never over what is there, and never half a pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import DiffusionPipeline

from ...atomic_files import move_contents, replace_text
from ...run_record import CHECKPOINT_PREFIX, PARTIAL_PIPELINE, PIPELINE_INDEX, PREVIOUS_PIPELINE, RECORD_FILE
from .checkpoints import STATE_FILE


def check_output_dir(output_dir: str | Path, resume_from_checkpoint: str | None = None) -> None:
    """Refuse to write over what is there.

    Args:
        output_dir: The folder of a run, which need not exist.
        resume_from_checkpoint: The checkpoint that the run goes on from, of this folder or another.

    Raises:
        ValueError: If a run that does not go on with what is there would write into a folder that holds a pipeline or
            checkpoints.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return
    own = [path for path in output_dir.glob(f"{CHECKPOINT_PREFIX}*") if (path / STATE_FILE).is_file()]
    named = Path(resume_from_checkpoint or "")
    named = named if named.is_dir() else output_dir / named
    if own and (resume_from_checkpoint == "latest" or named.resolve() in [path.resolve() for path in own]):
        return
    present = [PIPELINE_INDEX] if (output_dir / PIPELINE_INDEX).exists() else []
    present += sorted(path.name for path in output_dir.glob(f"{CHECKPOINT_PREFIX}*") if not path.suffix)
    if present:
        raise ValueError(
            f"`output_dir`={str(output_dir)!r} already holds {', '.join(present[:4])}. Choose another folder, "
            "remove it, or go on with `--resume_from_checkpoint latest`."
        )


def save_pipeline(pipeline: DiffusionPipeline, output_dir: str | Path) -> None:
    """Save a pipeline into a run's folder, beside its final place first, then by renaming.

    `model_index.json` is moved last, so that the folder loads as a pipeline only when all of it is there.

    Args:
        pipeline: What to save.
        output_dir: The run's folder; a pipeline that it holds is replaced once the new one is complete.
    """
    output_dir = Path(output_dir)
    partial, previous = output_dir / PARTIAL_PIPELINE, output_dir / PREVIOUS_PIPELINE
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    move_contents(partial, output_dir, previous, last=PIPELINE_INDEX)


def save_record(record: dict, output_dir: str | Path) -> None:
    """Write a run's record (settings, versions, results) as JSON, replacing an older one only when complete.

    Args:
        record: JSON-serialisable.
        output_dir: The run's folder.
    """
    replace_text(Path(output_dir) / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
