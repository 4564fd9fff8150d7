"""One run at a time in a folder: two would delete each other's checkpoints."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from filelock import FileLock, Timeout

from ..atomic_files import replace_text
from ..run_record import RUN_LOCK


# Of this process, by folder. The operating system gives them back when it ends, however it ends.
_held: dict[Path, FileLock] = {}


def lock_run_folder(folder: str | Path) -> None:
    """Keep other processes from running in a folder, until [`unlock_run_folder`] or the end of this process.

    Args:
        folder: The run's folder. A process that has it may take it again, as a notebook does after an error.

    Raises:
        ValueError: If another process has it; it names the process.
    """
    folder = Path(folder).resolve()
    if folder in _held:
        return
    lock, holder = FileLock(folder / RUN_LOCK), folder / f"{RUN_LOCK}.holder"
    try:
        lock.acquire(blocking=False)
    except Timeout:
        name = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise ValueError(
            f"`output_dir`={str(folder)!r} is in use by a run of {name}. Wait for it to end, stop it, or choose "
            "another folder."
        ) from None
    _held[folder] = lock
    replace_text(holder, f"process {os.getpid()} on {platform.node()}")


def unlock_run_folder(folder: str | Path) -> None:
    """Let other processes run in a folder again, if this one has it."""
    lock = _held.pop(Path(folder).resolve(), None)
    if lock is not None:
        lock.release()
