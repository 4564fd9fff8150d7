"""Push to the Hub: one commit per push, tried again when the network fails; tokens are checked where they come in."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from .config_types import COMMON_TYPES, built_from_file, check_types
from .run_record import PRIVATE_FILES, published_path


__all__ = ["create_run_repo", "push_run"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Where diffusers and transformers write down what a config was loaded from.
_LOCAL_KEYS = frozenset({"_name_or_path", "name_or_path"})

# The Hub has done nothing: the branch has moved since we looked (412), or there are too many requests.
_REFUSED_STATUS = (412, 429, 503)
_TRANSIENT_STATUS = (408, 500, 502, 504, *_REFUSED_STATUS)


def push_folder(
    folder: str | Path,
    repo_id: str,
    message: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    path_in_repo: str = "",
    ignore_patterns: Sequence[str] = (),
    mirror: bool = False,
    keep: Sequence[str] = (),
    attempts: int | None = 5,
    pause: Callable[[float], bool] | None = None,
) -> CommitInfo:
    """Commit the files of a folder in one commit, or none if nothing differs; returns the branch's last commit then.

    Weights replace those of the same name and variant, whatever their format and number of shards: a left-over index
    would be loaded instead of them. Paths of this machine, and its name, are left out. With `mirror`, what else is at
    `path_in_repo` is deleted; files in `keep` are added only if they are missing.

    Every attempt compares the folder with the branch's last commit and builds on that one alone, so that one whose
    answer was lost has left nothing to commit. A pull request would be opened twice: it is tried again only if the
    Hub says that it has done nothing.
    """
    _check_destination(token, revision, create_pr)
    api, branch, target = HfApi(token=token), revision or "main", PurePosixPath(path_in_repo)
    local = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    local = list(filter_repo_objects(local, ignore_patterns=[*ignore_patterns, *DEFAULT_IGNORE_PATTERNS]))
    paths = {str(target / published_path(path)): Path(folder, path) for path in local}
    new_weights = {weights_name(path) for path in paths} - {None}

    def attempt() -> CommitInfo:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        try:
            head = api.model_info(name, revision=branch)
        except RevisionNotFoundError:
            api.create_branch(name, branch=branch, exist_ok=True)
            head = api.model_info(name, revision=branch)
        present = {file.rfilename for file in head.siblings}
        changes = [
            CommitOperationAdd(path, _without_local_keys(source))
            for path, source in paths.items()
            if path not in present.intersection(keep)
        ]
        for path in sorted(present - paths.keys()):
            if weights_name(path) in new_weights or (mirror and target in PurePosixPath(path).parents):
                changes.append(CommitOperationDelete(path, is_folder=False))
        where = {"revision": branch, "create_pr": create_pr, "parent_commit": head.sha}
        return api.create_commit(name, changes, commit_message=message, **where)

    return retry(attempt, f"Pushing to {repo_id}", attempts, pause, _is_refusal if create_pr else is_transient)


def weights_name(path: str) -> str | None:
    """What all files of the same weights have in common, such as `unet/model.fp16`; None for other files."""
    folder, _, name = path.rpartition("/")
    words = re.sub(r"-\d{5}-of-\d{5}", "", name).split(".")
    formats = {"safetensors", "bin"}
    if words[-1] not in formats and not (formats & {*words} and "index" in words and words[-1] == "json"):
        return None
    return f"{folder}/" + ".".join(word for word in words if word not in {*formats, "index", "json"})


def _without_local_keys(path: Path) -> Path | bytes:
    """A file as it is, or a config without the place on this machine that it was loaded from."""
    if path.suffix != ".json" or b"name_or_path" not in path.read_bytes():
        return path
    config = json.loads(path.read_bytes())
    if not (isinstance(config, dict) and _LOCAL_KEYS & config.keys()):
        return path
    config = {key: value for key, value in config.items() if key not in _LOCAL_KEYS}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def check_token(token: str | bool | None) -> str | bool | None:
    """The token; an invalid one is refused here, because the HTTP library would repeat it in its error."""
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ValueError("`token` must be printable ASCII characters without white space; the one given is not.")
    return token


def _check_destination(token: str | None, revision: str | None, create_pr: bool) -> None:
    """Check what can be wrong with a push before there is anything to push."""
    check_token(token)
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"`revision`={revision!r} and `create_pr` exclude each other: a pull request is to main.")


# ---- failures


def _is_refusal(error: BaseException) -> bool:
    """Whether the Hub refused a request without doing anything, and may accept it later."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in _REFUSED_STATUS


def is_transient(error: BaseException) -> bool:
    """Whether a failed request may succeed later: no answer, or a status that says so."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUS
    # The client wraps in one what goes wrong in the upload of a large file, and hf_xet has no class of its own for
    # errors of the network. Subclasses, such as NotImplementedError, are bugs.
    if type(error) is RuntimeError:
        return error.__cause__ is None or is_transient(error.__cause__)
    # `HTTPError` is that of the client's transport, whose package depends on the client's version.
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError))


def retry(
    action: Callable[[], T],
    what: str,
    attempts: int | None = 5,
    pause: Callable[[float], bool] | None = None,
    may_pass: Callable[[BaseException], bool] = is_transient,
) -> T:
    """Call something again, 2 to 64 s later, while its error may pass and `pause`, given the seconds, returns True."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return action()
        except Exception as error:  # the network's errors are of several libraries; others are raised again
            if attempt == attempts or not may_pass(error):
                raise
            asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
            seconds = max(2.0 ** min(attempt, 6), float(asked) if asked.isdecimal() else 0.0)
            logger.warning("%s failed, will be tried again in %.0f s: %s", what, seconds, describe(error))
            if pause is None:
                time.sleep(seconds)
            elif not pause(seconds):
                raise


def describe(error: BaseException) -> str:
    """An error in one line of a log."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---- models, pipelines and runs


_CARD = """\
---
library_name: diffusers
tags:
- diffusers
- diffusers-dtr
---

# {name}

A `{name}` of [diffusers-dtr](https://arxiv.org/abs/2310.07138): `pip install diffusers-dtr`, then

```py
from diffusers_dtr import {name}
```
"""


class HubMixin:
    """Pushes in one commit, and checks tokens and configs; to be named before diffusers' class."""

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> dict | tuple:
        """Load a config as diffusers does, and refuse an invalid `token` or a config other than a JSON object."""
        check_token(kwargs.get("token"))
        with built_from_file(f"The config of a {cls.__name__}"):
            loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if not isinstance(config, dict):
            raise ValueError(f"`{cls.config_name}` must hold a JSON object, got {type(config).__name__}.")
        check_types(COMMON_TYPES, config, f"`{cls.config_name}`")
        return loaded

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        **save_options: Any,
    ) -> CommitInfo:
        """Save to the Hub as diffusers does, in one commit, as [`~diffusers_dtr.hub.push_folder`] makes it.

        A new repository gets a card; the card of an old one stays as it is. Beside diffusers' arguments there are
        `revision`, a branch, which is made from `main` if there is none of that name, and whatever else
        `save_pretrained` takes, such as `max_shard_size`. Raises a ValueError for a `revision` with `create_pr`, or an
        invalid `token`.
        """
        # Wrong arguments are refused before anything is saved.
        _check_destination(token, revision, create_pr)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant, **save_options)
            if not subfolder:
                card = _CARD.format(name=type(self).__name__)
                Path(folder, "README.md").write_text(card, encoding="utf-8")
            options = {"private": private, "revision": revision, "keep": ["README.md"]}
            return self._upload_folder(folder, repo_id, token, commit_message, create_pr, subfolder, **options)

    def _upload_folder(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
        **options: Any,
    ) -> CommitInfo:
        """Also the push at the end of diffusers' `save_pretrained(..., push_to_hub=True)`."""
        message = commit_message or f"Upload {type(self).__name__}"
        where = {"token": token, "create_pr": create_pr, "path_in_repo": subfolder or ""}
        return push_folder(working_dir, repo_id, message, **where, **options)


def create_run_repo(
    output_dir: str | Path, repo_id: str | None, token: str | None, private: bool | None = None
) -> str:
    """Make a run's repository unless it is there, before training: a wrong token should not show after it.

    Arguments are as in [`push_run`]. Returns the repository's full name; raises a ValueError for an invalid `token`.
    """
    api = HfApi(token=check_token(token))
    return api.create_repo(repo_id or default_repo(output_dir), exist_ok=True, private=private).repo_id


def push_run(
    output_dir: str | Path,
    repo_id: str | None,
    token: str | None,
    private: bool | None,
    message: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a run's pipeline, card, samples and logs, but not its checkpoints, as [`push_folder`] does.

    Args:
        output_dir: The run's folder. Its files replace those of the same name in the repository, the card too.
        repo_id: Repository; by default one named after the folder, in the user's namespace.
        token: Token, or None for the one that is logged in.
        private: Whether a new repository is private. None for what its owner has as default.
        message: Commit message.
        revision: Branch, made from `main` if there is none of that name. Default `main`.
        create_pr: Whether to open a pull request instead; the address of it, or of the commit, is returned.
    """
    where = {"token": token, "private": private, "revision": revision, "create_pr": create_pr}
    name = repo_id or default_repo(output_dir)
    commit = push_folder(output_dir, name, message, **where, ignore_patterns=PRIVATE_FILES)
    return commit.pr_url or commit.commit_url


def default_repo(output_dir: str | Path) -> str:
    """The name of a run's repository where none is given, in the user's namespace: that of its folder."""
    return Path(output_dir).resolve().name
