"""One run at a time in a folder: two would delete each other's checkpoints."""

from __future__ import annotations

import atexit
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

from ...atomic_files import replace_text
from ...run_record import RUN_LOCK


@dataclass
class _Held:
    lock: FileLock
    # Folders that were made for the run, innermost first
    made: list[Path]


# Of this process, by folder. The operating system gives locks back when it ends, however it ends.
_held: dict[Path, _Held] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _held.clear())


def lock_run_folder(folder: str | Path) -> None:
    """Keep other processes from running in a folder, until [`unlock_run_folder`] or the end of this process.

    Args:
        folder: The run's folder, which is made if need be. A process that has it may take it again, as a notebook does
            after an error.

    Raises:
        ValueError: If another process has it, which it names, or it cannot be written to.
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
        _held[folder] = _Held(lock, made)
        replace_text(holder, f"process {os.getpid()} on {platform.node()}")
    except Timeout:
        try:
            name = holder.read_text(encoding="utf-8")
        except FileNotFoundError:
            name = "another process"
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

    Args:
        folder: The run's folder.
    """
    folder = Path(folder).resolve()
    held = _held.pop(folder, None)
    if held is None:
        return
    # While it is held: afterwards the file may be another's lock. Who has opened it already, to wait for the lock,
    # finds out that it is deleted, and does not take it for one (filelock compares). Windows keeps an open file.
    _holder(folder).unlink(missing_ok=True)
    with suppress(PermissionError):
        (folder / RUN_LOCK).unlink(missing_ok=True)
    held.lock.release()
    with suppress(OSError):  # there is something in it
        for path in held.made:
            path.rmdir()


def _holder(folder: Path) -> Path:
    return folder / f"{RUN_LOCK}.holder"


@atexit.register
def _unlock_all() -> None:
    for folder in [*_held]:
        unlock_run_folder(folder)
