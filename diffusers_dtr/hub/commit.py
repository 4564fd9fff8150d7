"""One push is one commit, and is made once.

`huggingface_hub.upload_folder` keeps neither promise: where `hf_xet` is installed it splits a folder over several
commits and sends a commit again whose answer was lost.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects

from ..publishing import published_path


logger = logging.getLogger(__name__)

T = TypeVar("T")

# What git and the client keep in a folder for themselves.
_NEVER_PUSHED = (".git/*", "*/.git/*", ".cache/huggingface/*")

# Where diffusers and transformers write down what a config was loaded from.
_LOCAL_KEYS = frozenset({"_name_or_path", "name_or_path"})

# 412: the branch has moved since we looked, by somebody else's commit or by an earlier one of ours that came late.
_TRANSIENT_STATUS = (408, 412, 429, 500, 502, 503, 504)


class FolderCommit:
    """One commit with the files of a folder, which can be tried again without being made twice.

    Weights take the place of those that the repository has under the same name and variant, whatever their format
    and number of shards: an index left over from earlier shards would be loaded instead of the new weights. Where
    configs were loaded from (`_name_or_path`) is left out, because it can be a path on this machine, and so is the
    machine's name in those of TensorBoard's files.

    Args:
        folder: Its files are committed. They must not change until that is done.
        repo_id: Model repository, which is made if need be; without a `/` in the user's namespace.
        message: Commit message.
        token: Token, or None for the one that is logged in.
        private: Whether a new repository is private. None for what its owner has as default.
        revision: Branch, made from `main` if there is none of that name. Default `main`.
        create_pr: Whether to open a pull request against `main` instead.
        path_in_repo: Folder of the repository that the files go to. Default its root.
        ignore_patterns: Files that are left out, as relative paths in which `*` matches `/` too.
        mirror: Whether to delete what else the repository has at `path_in_repo`, which must then be given.
        keep: Files, by their path in the repository, that are added only if it has none of that name.

    Raises:
        ValueError: For a `revision` with `create_pr`, or a `token` that is none.
    """

    def __init__(
        self,
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
    ):
        if create_pr and revision not in (None, "main"):
            raise ValueError(f"`revision`={revision!r} and `create_pr` exclude each other: a pull request is to main.")
        self.folder = Path(folder)
        self.repo_id = repo_id
        self.message = message
        self.private = private
        self.branch = revision or "main"
        self.create_pr = create_pr
        self.path_in_repo = PurePosixPath(path_in_repo)
        self.ignore_patterns = [*ignore_patterns, *_NEVER_PUSHED]
        self.mirror = mirror
        self.keep = frozenset(keep)
        self._api = HfApi(token=check_token(token))
        # What an answer that was lost would have told us, the commit's history can be searched for.
        self._description = f"diffusers-dtr push {uuid.uuid4().hex}"
        self._first_refs: dict[str, str] | None = None
        self._parent: str | None = None
        self._operations: list[CommitOperationAdd | CommitOperationDelete] = []

    def attempt(self) -> CommitInfo:
        """Make the commit, and what it needs of repository and branch, unless an earlier attempt did.

        Returns:
            The commit. Where no file differs from the repository's, none is made, and this is the branch's last one.

        Raises:
            Exception: Whatever the client raises. The commit may have been made nevertheless, if only its answer was
                lost: the next attempt finds out.
        """
        self.repo_id = self._api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        refs = self._refs()
        if self._first_refs is None:
            self._first_refs = refs
        else:
            landed = self._landed(refs)
            if landed is not None:
                return landed
        # Uploads of an earlier attempt count as long as what they are compared with is the same.
        if self._parent != refs[self.branch]:
            self._operations = list(self._compare(refs[self.branch]))
            self._parent = refs[self.branch]
        return self._api.create_commit(
            self.repo_id,
            self._operations,
            commit_message=self.message,
            commit_description=self._description,
            revision=self.branch,
            create_pr=self.create_pr,
            parent_commit=self._parent,
        )

    def _refs(self) -> dict[str, str]:
        """Branches by name and pull requests by ref, with their last commits."""
        refs = self._api.list_repo_refs(self.repo_id, include_pull_requests=True)
        found = {branch.name: branch.target_commit for branch in refs.branches}
        if self.branch not in found:
            self._api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)
            return self._refs()
        return found | {pull.ref: pull.target_commit for pull in refs.pull_requests or ()}

    def _landed(self, refs: dict[str, str]) -> CommitInfo | None:
        """Our commit, if an earlier attempt made it: on what has moved, or is new, since the first one."""
        moved = [ref for ref, commit in refs.items() if self._first_refs.get(ref) != commit]
        for ref in moved:
            for commit in self._api.list_repo_commits(self.repo_id, revision=ref):
                if commit.message == self._description:
                    page = f"{self._api.endpoint}/{self.repo_id}"
                    return CommitInfo(
                        commit_url=f"{page}/commit/{commit.commit_id}",
                        commit_message=self.message,
                        commit_description=self._description,
                        oid=commit.commit_id,
                        pr_url=f"{page}/discussions/{ref.removeprefix('refs/pr/')}" if self.create_pr else None,
                    )
        return None

    def _compare(self, parent: str) -> Iterator[CommitOperationAdd | CommitOperationDelete]:
        """What leads from the files of a commit to those that there are to be."""
        tree = self._api.list_repo_tree(self.repo_id, recursive=True, revision=parent)
        present = {entry.path for entry in tree if isinstance(entry, RepoFile)}
        local = (path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file())
        added = set()
        for path in filter_repo_objects((path.as_posix() for path in local), ignore_patterns=self.ignore_patterns):
            path_in_repo = str(self.path_in_repo / published_path(path))
            if path_in_repo not in self.keep & present:
                added.add(path_in_repo)
                yield CommitOperationAdd(path_in_repo, _shareable(self.folder / path))
        new_weights = {weights_name(path) for path in added} - {None}
        for path in sorted(present - added):
            replaced = weights_name(path) in new_weights
            if replaced or (self.mirror and self.path_in_repo in PurePosixPath(path).parents):
                yield CommitOperationDelete(path, is_folder=False)


def retry(
    action: Callable[[], T], what: str, attempts: int | None = 5, pause: Callable[[float], bool] | None = None
) -> T:
    """Call something again for as long as it fails for reasons that may pass: the network's, or a busy Hub's.

    Args:
        action: What to call.
        what: What it does, for the log.
        attempts: How often to call it at most. None for no limit.
        pause: Called with the seconds to wait, which double from 2 to 64 or are those that the Hub asks for; it
            returns whether to try again. By default it sleeps.

    Returns:
        What `action` returns.

    Raises:
        Exception: What `action` raised last, or at once if no waiting would help.
    """
    for attempt in itertools.count(1):
        try:
            return action()
        # Of the network there are errors of several libraries; what is none of them goes on.
        except Exception as error:
            if attempt == attempts or not is_transient(error):
                raise
            seconds = max(2.0 ** min(attempt, 6), _asked_for(error))
            logger.warning("%s failed, will be tried again in %.0f s: %s", what, seconds, describe(error))
            if not (pause or _sleep)(seconds):
                raise
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Whether what failed may well succeed later: no answer came, or one that says so."""
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


def describe(error: BaseException) -> str:
    """An error in one line of a log."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def check_token(token: str | bool | None) -> str | bool | None:
    """The token, if it can be one: the HTTP library repeats others, such as one with a line break, in its errors.

    Raises:
        ValueError: For a `token` with characters that none has. The message does not repeat it.
    """
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ValueError("`token` must be printable ASCII characters without white space; the one given is not.")
    return token


def weights_name(path: str) -> str | None:
    """What is the same for all files that weights of one name and variant can consist of; None for other files.

    `unet/model.fp16-00001-of-00002.safetensors`, `unet/model.safetensors.index.fp16.json` and `unet/model.fp16.bin`
    are all `unet/model.fp16`.
    """
    folder, _, name = path.rpartition("/")
    words = re.sub(r"-\d{5}-of-\d{5}", "", name).split(".")
    formats = {"safetensors", "bin"}
    if words[-1] not in formats and not (formats & {*words} and "index" in words and words[-1] == "json"):
        return None
    return f"{folder}/" + ".".join(word for word in words if word not in {*formats, "index", "json"})


def _shareable(path: Path) -> Path | bytes:
    """A file as it is, or without what a config says of where on this machine it was loaded from."""
    if path.suffix != ".json" or b"name_or_path" not in path.read_bytes():
        return path
    config = json.loads(path.read_bytes())
    if not (isinstance(config, dict) and _LOCAL_KEYS & config.keys()):
        return path
    config = {key: value for key, value in config.items() if key not in _LOCAL_KEYS}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _asked_for(error: BaseException) -> float:
    seconds = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(seconds) if seconds.isdecimal() else 0.0


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return True
