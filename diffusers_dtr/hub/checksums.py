"""Notice downloads of the right size but the wrong content, which `huggingface_hub` would keep in its cache."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from ..atomic_files import replace_text
from .commit import check_token, describe, is_transient


logger = logging.getLogger(__name__)

# Beside the `snapshots` of a repository in the cache, so that it goes when they do.
_VERIFIED = "verified_by_diffusers_dtr.json"


def verify_download(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> None:
    """Compare what the cache holds of a repository with the checksums that the Hub has of it.

    What was verified is remembered by size and time of change, in the cache: without new files nothing is read again,
    and no one asked. If the Hub cannot be reached, that is a warning, and the next call tries again.

    Args:
        repo_id: Model repository.
        revision: As given when it was downloaded.
        cache_dir: Likewise.
        token: Likewise.

    Raises:
        OSError: If a file differs. Damaged files are removed from the cache, so that the next load downloads them
            anew. Nothing is raised for a repository that is not in the cache.
    """
    snapshot = _cached_snapshot(repo_id, revision, cache_dir)
    if snapshot is None:
        return
    storage = snapshot.parent.parent
    record = storage / _VERIFIED
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    # Through the symbolic links, because snapshots share their contents.
    contents = [path.resolve() for path in snapshot.rglob("*") if path.is_file()]
    present = {
        path.relative_to(storage).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in contents
    }
    if present.items() <= known.items():
        return
    try:
        result = HfApi(token=token).verify_repo_checksums(repo_id, revision=snapshot.name, cache_dir=cache_dir)
    # Of the network there are errors of several libraries; what is none of them goes on.
    except Exception as error:
        if not is_transient(error):
            raise
        logger.warning("What was loaded of %s could not be verified: %s", repo_id, describe(error))
        return
    damaged = [mismatch["path"] for mismatch in result.mismatches]
    for path in damaged:
        (snapshot / path).resolve().unlink()
        (snapshot / path).unlink(missing_ok=True)
    if damaged:
        raise OSError(
            f"{', '.join(damaged)} of {repo_id} is not what the Hub has: damaged on the way or on this disk. It was "
            "removed from the cache; load again to download it anew."
        )
    _remember(record, known | present)


@contextmanager
def verified_downloads(
    repo_id: str | os.PathLike | None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
) -> Iterator[None]:
    """Around a load: verifies what it downloaded, also if the load failed, because of the damage perhaps.

    Folders are not verified, nor what is loaded without a network on purpose: there is nothing to compare with.
    """
    check_token(token)

    def verify() -> None:
        if repo_id is not None and not (os.path.isdir(repo_id) or local_files_only or is_offline_mode()):
            verify_download(str(repo_id), revision=revision, cache_dir=cache_dir, token=token)

    try:
        yield
    # Whatever went wrong, damage may be why, and is then the better answer; if it is not, the error goes on.
    except Exception:
        verify()
        raise
    verify()


def _cached_snapshot(repo_id: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    # No patterns, so that no file is missed: not all of a repository is loaded.
    where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": True, "allow_patterns": []}
    try:
        return Path(snapshot_download(repo_id, **where))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _remember(record: Path, verified: dict[str, list[int]]) -> None:
    try:
        replace_text(record, json.dumps(verified))
    except OSError as error:
        logger.warning("The cache is not writable, so that the next load will be verified again: %s", describe(error))
