"""The test Hub, seen through the real client: what the other tests rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError


REPO = "owner/tiny"
# One file that git holds itself, and one in a subfolder that goes through LFS.
FILES = {"config.json": b'{"sample_size": 8}', "unet/model.safetensors": bytes(range(256)) * 20}


def commit(files, **options):
    changes = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()]
    return HfApi().create_commit(REPO, changes, commit_message="files", **options)


@pytest.fixture
def head(hub):
    """The last commit of a repository with `FILES`."""
    HfApi().create_repo(REPO)
    return commit(FILES).oid


def test_content_comes_back_whole_and_what_is_there_is_not_sent_again(hub, head):
    folder = Path(HfApi().snapshot_download(REPO))
    assert folder.name == head == commit(FILES).oid
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert sum(method == "PUT" for method, path in hub.requests) == 1


def test_a_commit_on_an_outdated_parent_is_refused(head):
    commit({"a.txt": b"a"}, parent_commit=head)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        commit({"b.txt": b"b"}, parent_commit=head)


@pytest.mark.parametrize("token", ["hf_guest", False])
def test_others_do_not_see_private_repositories_and_do_not_write(hub, head, token):
    with pytest.raises(HfHubHTTPError, match=r"40[13]"):
        commit({"a.txt": b"a"}, token=token)
    hub.repos["models", REPO].private = True
    for ask in (HfApi().model_info, HfApi().snapshot_download):
        with pytest.raises(RepositoryNotFoundError):
            ask(REPO, token=token)


def test_what_the_hub_does_not_serve_fails_the_test(hub):
    with pytest.raises(HfHubHTTPError, match="501"):
        HfApi().get_user_overview("owner")
    assert "no GET /api/users/owner" in str(hub.errors.pop())
