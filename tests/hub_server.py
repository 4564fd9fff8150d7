"""A small Hub on loopback: enough of its protocol for the real `huggingface_hub` client, and faults on demand.

Repositories live in memory. Content is addressed as on the Hub (git blob SHA-1, LFS SHA-256) and commits are
immutable, so `revision=<sha>`, branches and pull requests work. Xet is never offered: files travel as plain HTTP
bodies. What the Hub does in every case, down to its wording, was not the aim: what its client can tell apart was.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_faults import Fault
from hub_repositories import GIT_ATTRIBUTES, Commit, HubError, Reply, Repo, Request, content_id, is_lfs


_DATE = "2026-01-01T00:00:00.000Z"


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
_REPO = r"/api/(?:models/|(?=datasets/))(?P<repo_id>(?:datasets/)?[^/]+/[^/]+)"
_REVISION = r"/(?P<revision>[^/]+)"
_WEB_REPO = r"/(?P<repo_id>(?:datasets/)?[^/]+/[^/]+)"


def repo_key(path: str) -> tuple[str, str]:
    """The key of a repository by its path in addresses."""
    return "datasets" if path.startswith("datasets/") else "models", path.removeprefix("datasets/")


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
        repos: Repository by "models" or "datasets", and id.
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

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content by path, for assertions about what was pushed."""
        return dict(self.repos["models", repo_id].resolve(revision).files)

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
                        return handler(
                            self, Request(parse_qs(url.query), body, user, headers.get("Range")), **arguments
                        )
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

    def _visible(self, request: Request, repo_id: str) -> Repo:
        repo = self.repos.get(repo_key(repo_id))
        if repo is None or (repo.private and request.user != repo.owner):
            # The Hub does not tell a private repository from none, nor either from one that needs a login.
            status, message = (404, "Repository not found") if request.user else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        return repo

    def _open_to_commits(self, request: Request, repo_id: str) -> Repo:
        """Only the owner commits to a branch; everybody who is logged in may propose a pull request."""
        repo = self._visible(request, repo_id)
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
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if (kind, repo_id) in self.repos:
            raise HubError(409, "You already created this model repo", **answer)
        repo = self.repos[kind, repo_id] = Repo(repo_id, visibility == "private")
        repo.add("main", Commit({".gitattributes": GIT_ATTRIBUTES}, None, "initial commit"))
        return Reply.json(answer)

    # ---- reading

    @route("GET", f"{_REPO}(?:/revision{_REVISION})?")
    def repo_info(self, request: Request, repo_id: str, revision: str | None) -> Reply:
        repo = self._visible(request, repo_id)
        commit = repo.resolve(revision or "main")
        description = {"_id": repo.id, "id": repo.id, "author": repo.owner, "tags": [], "downloads": 0, "likes": 0}
        access = {"private": repo.private, "gated": False, "disabled": False, "lastModified": _DATE}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return Reply.json(description | access | {"sha": commit.sha, "siblings": siblings})

    @route("GET", f"{_REPO}/commits{_REVISION}")
    def commits(self, request: Request, repo_id: str, revision: str) -> Reply:
        history = self._visible(request, repo_id).resolve(revision).history()
        said = ({"id": commit.sha, "title": commit.title, "message": commit.description} for commit in history)
        return Reply.json([{**commit, "date": _DATE, "authors": []} for commit in said])

    @route("GET", f"{_REPO}/tree{_REVISION}(?:/(?P<folder>.+))?")
    def tree(self, request: Request, repo_id: str, revision: str, folder: str | None) -> Reply:
        files = self._visible(request, repo_id).resolve(revision).files
        within = {path: data for path, data in files.items() if not folder or path.startswith(f"{folder}/")}
        if not within:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        described = ({"path": path, "oid": content_id(path, data), "size": len(data)} for path, data in within.items())
        return Reply.json([{"type": "file", **file} for file in described])

    @route("GET", f"{_WEB_REPO}/resolve{_REVISION}/(?P<path>.+)")
    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Reply:
        commit = self._visible(request, repo_id).resolve(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            reply = HubError(404, "Entry not found", "EntryNotFound").reply
            return replace(reply, headers={**reply.headers, **headers})
        data = commit.files[path]
        headers["ETag"] = f'"{content_id(path, data)}"'
        if is_lfs(path, len(data)):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        if request.range is None:
            return Reply(200, data, headers)
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range).groups()
        part = data[int(first) : int(last or len(data)) + 1]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return Reply(206, part, headers)

    # ---- writing

    @route("POST", f"{_REPO}/branch/(?P<name>[^/]+)")
    def create_branch(self, request: Request, repo_id: str, name: str) -> Reply:
        repo = self._open_to_commits(request, repo_id)
        if name in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{name}")
        repo.branches[name] = repo.resolve(request.json.get("startingPoint", "main"))
        return Reply.json({})

    @route("POST", f"{_REPO}/preupload{_REVISION}")
    def preupload(self, request: Request, repo_id: str, revision: str) -> Reply:
        present = self._open_to_commits(request, repo_id).resolve(revision).files
        answer = []
        for file in request.json["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            oid = {"oid": content_id(path, present[path])} if path in present else {}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | oid)
        return Reply.json({"files": answer})

    @route("POST", f"{_WEB_REPO}.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, repo_id: str) -> Reply:
        self._visible(request, repo_id)
        self._logged_in(request)
        objects = []
        for wanted in request.json["objects"]:
            upload = {"href": f"{self.url}/lfs/{wanted['oid']}"}
            # An object without actions is one that the Hub has already.
            actions = {} if wanted["oid"] in self._lfs else {"actions": {"upload": upload}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | actions)
        return Reply.json({"transfer": "basic", "objects": objects})

    # Upload addresses are signed on the Hub: the client sends them no token.
    @route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
    def upload(self, request: Request, oid: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The uploaded content does not have the announced SHA-256")
        self._lfs[oid] = request.body
        return Reply.json({})

    @route("POST", f"{_REPO}/commit{_REVISION}")
    def commit(self, request: Request, repo_id: str, revision: str) -> Reply:
        repo = self._open_to_commits(request, repo_id)
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
        self._logged_in(request)
        commit = Commit(files, parent, header["value"]["summary"], header["value"]["description"])
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
        repo.add(f"refs/pr/{number}" if opens_pull_request else revision, commit)
        page = f"{self.url}/{repo_id}"
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}
        return Reply.json(answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if opens_pull_request else {}))

    def _apply(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        """Apply one operation of a commit to the files of its parent."""
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[path] = self._lfs[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(path))]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise NotImplementedError(f"the test Hub has no commit operation {key!r}")
