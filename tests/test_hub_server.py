"""The test Hub, seen through the real client: what the other tests rely on, and how its faults show."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from hub_server import AnswerStatus, CutUpload, LoseAnswer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


REPO = "owner/tiny"
# One file that git holds itself, and one in a subfolder that goes through LFS.
FILES = {"config.json": b'{"sample_size": 8}', "unet/model.safetensors": bytes(range(256)) * 20}


@pytest.fixture
def api(hub):
    return HfApi()


def add(path, content):
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


@pytest.fixture
def repo(api):
    """A repository with `FILES`; the id of its last commit."""
    api.create_repo(REPO)
    return api.create_commit(REPO, [add(*item) for item in FILES.items()], commit_message="files").oid


def read(api, revision=None):
    return Path(api.hf_hub_download(REPO, "config.json", revision=revision)).read_bytes()


def test_content_comes_back_whole_and_is_addressed_as_git_and_lfs_do(api, hub, repo):
    folder = Path(api.snapshot_download(REPO))
    assert folder.name == repo
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    git = subprocess.run(["git", "hash-object", "--stdin"], input=FILES["config.json"], capture_output=True).stdout
    sha256 = hashlib.sha256(FILES["unet/model.safetensors"]).hexdigest()
    urls = [f"{api.endpoint}/{REPO}/resolve/main/{path}" for path in FILES]
    assert [api.get_hf_file_metadata(url=url).etag for url in urls] == [git.decode().strip(), sha256]
    assert [path for method, path in hub.requests if method == "PUT"] == [f"/lfs/{sha256}"]
    assert api.create_commit(REPO, [add(*item) for item in FILES.items()], commit_message="again").oid == repo


def test_commits_branches_and_pull_requests_are_revisions_of_their_own(api, hub, repo):
    api.create_branch(REPO, branch="step/1")
    change = api.create_commit(REPO, [add("config.json", b"branch")], commit_message="change", revision="step/1")
    pull = api.create_commit(REPO, [add("config.json", b"pull")], commit_message="propose", create_pr=True)
    revisions = ("main", repo, "step/1", change.oid, pull.pr_revision)
    assert [read(api, revision) for revision in revisions] == [*[FILES["config.json"]] * 2, *[b"branch"] * 2, b"pull"]
    history = [commit.title for commit in api.list_repo_commits(REPO, revision="step/1")]
    assert history == ["change", "files", "initial commit"]
    api.create_commit(REPO, [CommitOperationDelete("config.json")], commit_message="delete")
    assert set(hub.files(REPO)) == {".gitattributes", "unet/model.safetensors"}


def test_a_commit_on_an_outdated_parent_is_refused(api, repo):
    api.create_commit(REPO, [add("a.txt", b"a")], commit_message="first", parent_commit=repo)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(REPO, [add("b.txt", b"b")], commit_message="second", parent_commit=repo)


@pytest.mark.parametrize("token", ["hf_guest", False])
def test_others_do_not_see_private_repositories_and_do_not_write(api, repo, token):
    with pytest.raises(HfHubHTTPError, match=r"40[13]"):
        api.create_commit(REPO, [add("a.txt", b"a")], commit_message="push", token=token)
    api.update_repo_settings(REPO, private=True)
    for ask in (api.model_info, api.snapshot_download):
        with pytest.raises(RepositoryNotFoundError):
            ask(REPO, token=token)


def test_what_is_missing_has_its_own_errors(api, repo):
    with pytest.raises(RevisionNotFoundError):
        read(api, "absent")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "absent.json")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.hf_hub_download(REPO, "config.json", token="hf_wrong")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_file(path_or_fileobj=b"---\ntags: [a\n---\n", path_in_repo="README.md", repo_id=REPO)


def test_what_the_hub_does_not_serve_fails_the_test(api, hub):
    with pytest.raises(HfHubHTTPError, match="501"):
        api.get_user_overview("owner")
    assert "no GET /api/users/owner" in str(hub.errors.pop())


# ---- faults: what the client makes of them, which pushing builds on


def test_a_cut_upload_is_sent_again_whole(api, hub, waits):
    api.create_repo(REPO)
    hub.faults.append(CutUpload(method="PUT", path="/lfs/", after=100))
    api.upload_file(path_or_fileobj=b"x" * 5000, path_in_repo="model.bin", repo_id=REPO)
    assert hub.files(REPO)["model.bin"] == b"x" * 5000


def test_a_commit_is_not_tried_again_by_the_client_and_one_without_an_answer_has_landed(api, hub, waits):
    api.create_repo(REPO)
    commit = {"method": "POST", "path": "/commit/"}
    hub.faults += [AnswerStatus(**commit, status=429, retry_after=7), LoseAnswer(**commit)]
    with pytest.raises(HfHubHTTPError, match="429"):
        api.create_commit(REPO, [add("a.txt", b"a")], commit_message="first")
    assert (waits, "a.txt" in hub.files(REPO)) == ([], False)
    with pytest.raises(HTTPError, match="disconnected"):
        api.create_commit(REPO, [add("a.txt", b"a")], commit_message="second")
    assert hub.files(REPO)["a.txt"] == b"a"


def test_a_failing_hub_looks_like_an_empty_cache(api, hub, repo, waits):
    hub.faults.append(AnswerStatus(method="GET|HEAD", path=".", status=503, times=100))
    with pytest.raises(LocalEntryNotFoundError):
        read(api)
