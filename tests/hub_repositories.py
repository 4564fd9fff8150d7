"""What the test Hub keeps: repositories whose content is addressed as on the Hub; and what it is asked and answers."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.npz", "*.parquet", "*.png", "*.zip")
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


def is_lfs(path: str, size: int = 0) -> bool:
    """Whether git holds a pointer to a file instead of the file."""
    return any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS) or size > 10_000_000


def content_id(path: str, data: bytes) -> str:
    """What the client compares its own files with."""
    if is_lfs(path, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One immutable snapshot of a repository."""

    files: Mapping[str, bytes]
    parent: Commit | None
    title: str
    description: str = ""
    sha: str = field(default_factory=lambda: secrets.token_hex(20))

    def history(self) -> list[Commit]:
        """This commit and its ancestors, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]


@dataclass
class Repo:
    """A repository: who may see it, and what its names point at. Pull requests are branches `refs/pr/<n>`."""

    id: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        commit = self.branches.get(revision) or self.commits.get(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def add(self, branch: str, commit: Commit) -> None:
        self.branches[branch] = self.commits[commit.sha] = commit


class HubError(Exception):
    """An error answer; `code` is what the client's exception classes go by."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any):
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = Reply.json({"error": message, **body}, status, headers)


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


@dataclass(frozen=True)
class Request:
    query: dict[str, list[str]]
    body: bytes
    user: str | None
    range: str | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body)
