"""A small Hub on loopback: enough of its protocol for the real `huggingface_hub` client, and faults on demand.

Repositories live in memory. Content is addressed as on the Hub (git blob SHA-1, LFS SHA-256) and commits are
immutable, so `revision=<sha>`, branches and pull requests work. Xet is never offered: files travel as plain HTTP
bodies. What the Hub does in every case, down to its wording, was not the aim: what its client can tell apart was.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import itertools
import json
import re
import socket
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.npz", "*.parquet", "*.png", "*.zip")
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()

# Commits made in the same instant from the same content must still differ, as the Hub's do by their date.
_COMMIT_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Blob:
    """The content of one file, and how git holds it: itself, or a pointer to an LFS object."""

    data: bytes
    is_lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_data(self) -> bytes:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return pointer.encode() if self.is_lfs else self.data

    @cached_property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.git_data) + self.git_data).hexdigest()

    @property
    def lfs_sizes(self) -> dict[str, int]:
        return {"size": len(self.data), "pointerSize": len(self.git_data)}

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """One immutable snapshot of a repository."""

    files: Mapping[str, Blob]
    parent: Commit | None
    author: str
    title: str
    description: str = ""
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
    number: int = field(default_factory=lambda: next(_COMMIT_NUMBERS))

    @cached_property
    def sha(self) -> str:
        tree = sorted((path, blob.git_oid) for path, blob in self.files.items())
        identity = (tree, self.parent and self.parent.sha, self.author, self.title, self.date, self.number)
        return hashlib.sha1(json.dumps(identity).encode()).hexdigest()

    def history(self) -> list[Commit]:
        """This commit and its ancestors, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]

    def summary(self) -> dict[str, Any]:
        what = {"id": self.sha, "title": self.title, "message": self.description}
        return what | {"date": self.date, "authors": [{"user": self.author}]}

    def tree(self) -> dict[str, dict]:
        """Files and folders by path, each as the Hub describes it in its tree listings."""
        entries: dict[str, dict] = {}
        for path, blob in sorted(self.files.items()):
            for folder in PurePosixPath(path).parents[:-1]:
                below = sorted((p, b.git_oid) for p, b in self.files.items() if p.startswith(f"{folder}/"))
                oid = hashlib.sha1(json.dumps(below).encode()).hexdigest()
                entries[str(folder)] = {"type": "directory", "path": str(folder), "oid": oid, "size": 0}
            entries[path] = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.data)}
            if blob.is_lfs:
                entries[path]["lfs"] = {"oid": blob.sha256} | blob.lfs_sizes
        return entries


@dataclass
class Repo:
    """A repository: who may see it, and what its names point at. Pull requests are branches `refs/pr/<n>`."""

    kind: str
    id: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def url_path(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

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
    headers: Mapping[str, str]
    body: bytes
    user: str | None

    @cached_property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(kw_only=True)
class Fault(ABC):
    """Something that goes wrong for the next `times` requests whose method and path match (regular expressions)."""

    method: str
    path: str
    times: int = 1

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and bool(re.fullmatch(self.method, method) and re.search(self.path, path))

    @abstractmethod
    def play(self, exchange: Exchange) -> None:
        """Do instead of `exchange.send(exchange.answer(exchange.read()))` what this fault is about."""


@dataclass(kw_only=True)
class AnswerStatus(Fault):
    """The request is not served: `status` comes back, with a `Retry-After` in seconds if one is given."""

    status: int
    retry_after: int | None = None

    def play(self, exchange: Exchange) -> None:
        exchange.read()
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        exchange.send(Reply.json({"error": f"injected {self.status}"}, self.status, headers))


@dataclass(kw_only=True)
class CutUpload(Fault):
    """The connection ends once `after` bytes of the request's body have arrived; nothing is stored."""

    after: int

    def play(self, exchange: Exchange) -> None:
        exchange.read(self.after)
        exchange.cut()


@dataclass(kw_only=True)
class LoseAnswer(Fault):
    """The request is served and takes effect, but the connection ends before its answer."""

    def play(self, exchange: Exchange) -> None:
        exchange.answer(exchange.read())
        exchange.cut()


@dataclass(kw_only=True)
class NeverAnswer(Fault):
    """The request is read, and nothing comes back until the client gives up."""

    def play(self, exchange: Exchange) -> None:
        exchange.read()
        exchange.rfile.read(1)
        exchange.cut()


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer, in the three steps that faults can interfere with: read, answer, send."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def exchange(self) -> None:
        fault = self.server.log(self.command, self.path)
        if fault is None:
            self.send(self.answer(self.read()))
        else:
            fault.play(self)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = exchange

    def read(self, limit: int = sys.maxsize) -> bytes:
        """The request's body, or its first `limit` bytes."""
        return self.rfile.read(min(limit, int(self.headers.get("Content-Length", 0))))

    def answer(self, body: bytes) -> Reply:
        return self.server.answer(self.command, self.path, self.headers, body)

    def send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: Any) -> None:
        """Quiet: `HubServer.requests` is the log."""


_ROUTES: list[tuple[str, re.Pattern, Callable[..., Reply]]] = []
_REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"/(?P<revision>[^/]+)"
_WEB_REPO = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Serve requests whose still-quoted path matches; the pattern's groups become arguments, unquoted."""

    def register(handler: Callable[..., Reply]) -> Callable[..., Reply]:
        _ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


class HubServer(ThreadingHTTPServer):
    """The Hub. It serves from the moment it is made, on a port of its own, for as long as the process lives.

    Attributes:
        url: What `HF_ENDPOINT` has to be.
        tokens: User name by access token. A user owns the repositories of their name.
        repos: Repository by kind ("models", "datasets", "spaces") and id.
        requests: Method and path, as sent, of every request so far.
        faults: What goes wrong next: the first fault that matches a request and is not used up is played.
        errors: What went wrong in the server itself. A test that leaves any has found a gap in this file.
        private_by_default: Whether a repository is private where it is not said, as an organisation can choose.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._lock = threading.RLock()
        self.reset()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self) -> None:
        """Forget everything."""
        self.tokens = {"hf_owner": "owner", "hf_guest": "guest"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.errors: list[BaseException] = []
        self.private_by_default = False
        self._lfs: dict[str, bytes] = {}

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Content by path, for assertions about what was pushed."""
        return {path: blob.data for path, blob in self.repos[kind, repo_id].resolve(revision).files.items()}

    # ---- plumbing

    def log(self, method: str, path: str) -> Fault | None:
        """Note a request and take the fault that is due for it."""
        with self._lock:
            self.requests.append((method, path))
            fault = next((fault for fault in self.faults if fault.matches(method, path)), None)
            if fault is not None:
                fault.times -= 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # A client that goes away mid-transfer is a thing tests do on purpose.
        if error is not None and not isinstance(error, ConnectionError):
            self.errors.append(error)

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Reply:
        url = urlsplit(target)
        for route_method, pattern, handler in _ROUTES:
            match = pattern.fullmatch(url.path)
            if match and route_method == ("GET" if method == "HEAD" else method):
                arguments = {name: value and unquote(value) for name, value in match.groupdict().items()}
                with self._lock:
                    try:
                        user = self._user(headers.get("Authorization"))
                        return handler(self, Request(parse_qs(url.query), headers, body, user), **arguments)
                    except HubError as error:
                        return error.reply
        gap = f"the test Hub has no {method} {target}"
        self.errors.append(NotImplementedError(gap))
        return HubError(501, gap).reply

    # ---- who may do what

    def _user(self, authorization: str | None) -> str | None:
        if authorization is None:
            return None
        user = self.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _visible(self, request: Request, kind: str | None, repo_id: str) -> Repo:
        repo = self.repos.get((kind or "models", repo_id))
        if repo is None or (repo.private and request.user != repo.owner):
            # The Hub does not tell a private repository from none, nor either from one that needs a login.
            status, message = (404, "Repository not found") if request.user else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        return repo

    def _writable(self, request: Request, kind: str | None, repo_id: str) -> Repo:
        repo = self._visible(request, kind, repo_id)
        self._require_owner(request, repo.owner)
        return repo

    def _open_to_commits(self, request: Request, kind: str | None, repo_id: str) -> Repo:
        """Only the owner commits to a branch; everybody who is logged in may propose a pull request."""
        repo = self._visible(request, kind, repo_id)
        if "create_pr" not in request.query:
            self._require_owner(request, repo.owner)
        return repo

    def _require_owner(self, request: Request, owner: str) -> None:
        if self._logged_in(request) != owner:
            raise HubError(403, f"{request.user} has no rights to write under the namespace {owner}")

    def _logged_in(self, request: Request) -> str:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        return request.user

    # ---- accounts, cards, repositories

    @route("GET", "/api/agent-harnesses")
    def agent_harnesses(self, request: Request) -> Reply:
        return Reply.json({"standardEnvVars": [], "harnesses": {}})

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Reply:
        name = self._logged_in(request)
        return Reply.json({"type": "user", "name": name, "fullname": name, "orgs": []})

    @route("POST", "/api/validate-yaml")
    def validate_card(self, request: Request) -> Reply:
        match = re.match(r"---\s*\n(.*?\n)?---\s*(\n|$)", request.json["content"], re.DOTALL)
        if match is None:
            return Reply.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            metadata = yaml.safe_load(match[1] or "{}")
        except yaml.YAMLError as error:
            raise HubError(400, "Bad YAML", errors=[{"message": str(error)}], warnings=[]) from error
        if not isinstance(metadata, dict):
            raise HubError(400, "Bad YAML", errors=[{"message": "metadata must be a mapping"}], warnings=[])
        return Reply.json({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Reply:
        payload = request.json
        kind = f"{payload.get('type') or 'model'}s"
        repo_id = f"{payload.get('organization') or request.user}/{payload['name']}"
        self._require_owner(request, repo_id.split("/")[0])
        # What releases of the client call it.
        private = payload.get("private", self.private_by_default)
        visibility = payload.get("visibility", "private" if private else "public")
        repo = Repo(kind, repo_id, visibility == "private")
        answer = {"url": f"{self.url}/{repo.url_path}", "name": repo_id, "id": repo_id}
        if (kind, repo_id) in self.repos:
            raise HubError(409, "You already created this model repo", **answer)
        files = {".gitattributes": Blob(GIT_ATTRIBUTES, is_lfs=False)}
        repo.add("main", Commit(files, None, repo.owner, "initial commit"))
        self.repos[kind, repo_id] = repo
        return Reply.json(answer)

    @route("PUT", f"{_REPO}/settings")
    def update_settings(self, request: Request, kind: str, repo_id: str) -> Reply:
        repo = self._writable(request, kind, repo_id)
        repo.private = request.json.get("visibility", "private" if repo.private else "public") == "private"
        return Reply.json({})

    # ---- reading

    @route("GET", f"{_REPO}(?:/revision{_REVISION})?")
    def repo_info(self, request: Request, kind: str, repo_id: str, revision: str | None) -> Reply:
        repo = self._visible(request, kind, repo_id)
        commit = repo.resolve(revision or "main")
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if "blobs" in request.query:
                siblings[-1] |= {"blobId": blob.git_oid, "size": len(blob.data)}
                if blob.is_lfs:
                    siblings[-1]["lfs"] = {"sha256": blob.sha256} | blob.lfs_sizes
        description = {"_id": repo.id, "id": repo.id, "author": repo.owner, "tags": [], "downloads": 0, "likes": 0}
        access = {"private": repo.private, "gated": False, "disabled": False}
        dates = {"createdAt": commit.history()[-1].date, "lastModified": commit.date}
        return Reply.json(description | access | dates | {"sha": commit.sha, "siblings": siblings})

    @route("GET", f"{_REPO}/refs")
    def refs(self, request: Request, kind: str, repo_id: str) -> Reply:
        repo = self._visible(request, kind, repo_id)

        answer: dict[str, list[dict]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, commit in repo.branches.items():
            is_pull_request = name.startswith("refs/pr/")
            ref = name if is_pull_request else f"refs/heads/{name}"
            answer["pullRequests" if is_pull_request else "branches"].append(
                {"name": name, "ref": ref, "targetCommit": commit.sha}
            )
        return Reply.json(answer)

    @route("GET", f"{_REPO}/commits{_REVISION}")
    def commits(self, request: Request, kind: str, repo_id: str, revision: str) -> Reply:
        history = self._visible(request, kind, repo_id).resolve(revision).history()
        return Reply.json([commit.summary() for commit in history])

    @route("GET", f"{_REPO}/tree{_REVISION}(?:/(?P<folder>.+))?")
    def tree(self, request: Request, kind: str, repo_id: str, revision: str, folder: str | None) -> Reply:
        entries = self._visible(request, kind, repo_id).resolve(revision).tree()
        if folder is not None and entries.get(folder, {}).get("type") != "directory":
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        top = PurePosixPath(folder or ".")
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found = [
            entry
            for path, entry in sorted(entries.items())
            if top in (PurePosixPath(path).parents if recursive else [PurePosixPath(path).parent])
        ]
        return Reply.json(found)

    @route("GET", f"{_WEB_REPO}/resolve{_REVISION}/(?P<path>.+)")
    def resolve(self, request: Request, kind: str | None, repo_id: str, revision: str, path: str) -> Reply:
        commit = self._visible(request, kind, repo_id).resolve(revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            reply = HubError(404, "Entry not found", "EntryNotFound").reply
            return replace(reply, headers={**reply.headers, **headers})
        blob = commit.files[path]
        headers["ETag"] = f'"{blob.etag}"'
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        return self._range(request.headers.get("Range"), blob.data, headers)

    def _range(self, wanted: str | None, data: bytes, headers: dict[str, str]) -> Reply:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        if match is None:
            return Reply(200, data, headers)
        first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
        if first > last:
            return Reply(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        return Reply(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    # ---- writing

    @route("POST", f"{_REPO}/branch/(?P<name>[^/]+)")
    def create_branch(self, request: Request, kind: str, repo_id: str, name: str) -> Reply:
        repo = self._writable(request, kind, repo_id)
        if name in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{name}")
        repo.branches[name] = repo.resolve(request.json.get("startingPoint", "main"))
        return Reply.json({})

    @route("POST", f"{_REPO}/preupload{_REVISION}")
    def preupload(self, request: Request, kind: str, repo_id: str, revision: str) -> Reply:
        repo = self._open_to_commits(request, kind, repo_id)
        present = repo.resolve(revision).files
        answer = []
        for file in request.json["files"]:
            path = file["path"]
            is_lfs = any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS) or file["size"] > 10_000_000
            answer.append({"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False})
            if path in present:
                answer[-1]["oid"] = present[path].etag
        return Reply.json({"files": answer})

    @route("POST", f"{_WEB_REPO}.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, kind: str | None, repo_id: str) -> Reply:
        self._visible(request, kind, repo_id)
        self._logged_in(request)
        objects = []
        for wanted in request.json["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            upload = {"href": f"{self.url}/lfs/{oid}"}
            # An object without actions is one that the Hub has already.
            objects.append({"oid": oid, "size": size} | ({} if oid in self._lfs else {"actions": {"upload": upload}}))
        return Reply.json({"transfer": "basic", "objects": objects})

    # Upload addresses are signed on the Hub: the client sends them no token.
    @route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
    def upload(self, request: Request, oid: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The uploaded content does not have the announced SHA-256")
        self._lfs[oid] = request.body
        return Reply.json({})

    @route("POST", f"{_REPO}/commit{_REVISION}")
    def commit(self, request: Request, kind: str, repo_id: str, revision: str) -> Reply:
        repo = self._open_to_commits(request, kind, repo_id)
        opens_pull_request = "create_pr" in request.query
        parent = repo.resolve(revision)
        if not opens_pull_request and revision not in repo.branches:
            raise HubError(400, f"{revision} is not a branch: nothing can be committed to it")
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if header["value"].get("parentCommit", parent.sha) != parent.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        title, description = header["value"]["summary"], header["value"]["description"]
        commit = Commit(files, parent, self._logged_in(request), title, description)
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
        repo.add(f"refs/pr/{number}" if opens_pull_request else revision, commit)
        page = f"{self.url}/{repo.url_path}"
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}
        return Reply.json(answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if opens_pull_request else {}))

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        """Apply one operation of a commit to the files of its parent."""
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self._lfs:
                raise HubError(400, f"Your push was rejected because the LFS object of {path} was never uploaded")
            files[path] = Blob(self._lfs[value["oid"]], is_lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            inside = path.rstrip("/") + "/" if key == "deletedFolder" else None
            gone = [name for name in files if (name.startswith(inside) if inside else name == path)]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise NotImplementedError(f"the test Hub has no commit operation {key!r}")
