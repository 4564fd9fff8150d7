"""A push is one commit, made once, whatever becomes of its answer."""

from __future__ import annotations

import json
import logging
from itertools import product

import pytest
from hub_server import AnswerStatus, CutUpload, LoseAnswer
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from diffusers_dtr.hub.commit import FolderCommit, check_token, is_transient, retry, weights_name


REPO = "owner/digits"
COMMIT = {"method": "POST", "path": "/commit/"}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "new", {"model_index.json": "{}", "transformer/diffusion_pytorch_model.safetensors": "new"})
    return tmp_path / "new"


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)


def push(folder, **options):
    return retry(FolderCommit(folder, REPO, "Upload", **options).attempt, "Pushing")


def put(files, revision="main"):
    """Commit files as somebody else would."""
    HfApi().create_repo(REPO, exist_ok=True)
    operations = [CommitOperationAdd(path, content.encode()) for path, content in files.items()]
    return HfApi().create_commit(REPO, operations, commit_message="Somebody else's", revision=revision).oid


def files(hub, revision="main"):
    return {path: data.decode() for path, data in hub.files(REPO, revision).items() if path != ".gitattributes"}


def titles(revision="main"):
    return [commit.title for commit in HfApi().list_repo_commits(REPO, revision=revision)]


# ---- what is in a commit


def test_a_folder_becomes_one_commit(hub, folder):
    commit = push(folder)
    assert titles() == ["Upload", "initial commit"]
    assert commit.oid == HfApi().model_info(REPO).sha
    assert set(files(hub)) == {"model_index.json", "transformer/diffusion_pytorch_model.safetensors"}


def test_a_commit_of_many_files_is_one_too(hub, tmp_path):
    write(tmp_path, {f"{number}.txt": str(number) for number in range(300)})
    push(tmp_path)
    assert len(files(hub)) == 300
    assert titles() == ["Upload", "initial commit"]


def test_what_has_not_changed_makes_no_commit(hub, folder):
    first = push(folder)
    assert push(folder).oid == first.oid
    assert titles() == ["Upload", "initial commit"]


def test_files_of_git_and_of_the_client_and_ignored_ones_stay_behind(hub, folder):
    write(folder, {".git/config": "", "a/.git/config": "", ".cache/huggingface/x": "", "b/c.partial": "", "d.txt": ""})
    push(folder, ignore_patterns=["*.partial"])
    assert set(files(hub)) == {"model_index.json", "transformer/diffusion_pytorch_model.safetensors", "d.txt"}


def test_an_index_of_earlier_shards_does_not_outlive_them(hub, folder):
    name = "transformer/diffusion_pytorch_model"
    old = {
        f"{name}-00001-of-00002.safetensors": "old",
        f"{name}-00002-of-00002.safetensors": "old",
        f"{name}.safetensors.index.json": "old",
        f"{name}.bin": "old",
    }
    kept = {
        f"{name}.fp16.safetensors": "kept",
        "vae/diffusion_pytorch_model.safetensors": "kept",
        "transformer/config.json": "kept",
    }
    put(old | kept)
    push(folder)
    assert files(hub) == kept | {"model_index.json": "{}", f"{name}.safetensors": "new"}
    assert titles()[0] == "Upload"
    assert len(titles()) == 3


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("unet/model.safetensors", "unet/model"),
        ("unet/model.bin", "unet/model"),
        ("unet/model-00001-of-00002.safetensors", "unet/model"),
        ("unet/model.safetensors.index.json", "unet/model"),
        ("unet/model.fp16.safetensors", "unet/model.fp16"),
        ("unet/model.fp16-00001-of-00002.safetensors", "unet/model.fp16"),
        ("unet/model.safetensors.index.fp16.json", "unet/model.fp16"),
        ("model.safetensors", "/model"),
        ("unet/config.json", None),
        ("logs/events.out.tfevents.1", None),
        ("README.md", None),
    ],
)
def test_weights_of_one_name_and_variant_have_one_name(path, name):
    assert weights_name(path) == name


def test_a_mirrored_folder_loses_what_is_not_there_any_more_and_nothing_else_does(hub, folder):
    put({"last/gone.txt": "", "last/sub/gone.bin": "", "last-one/kept.txt": "", "kept.txt": ""})
    push(folder, path_in_repo="last", mirror=True)
    assert set(files(hub)) == {
        "last/model_index.json",
        "last/transformer/diffusion_pytorch_model.safetensors",
        "last-one/kept.txt",
        "kept.txt",
    }
    assert len(titles()) == 3


def test_a_kept_file_is_added_only_where_there_is_none(hub, folder):
    write(folder, {"README.md": "new"})
    push(folder, keep=["README.md"])
    assert files(hub)["README.md"] == "new"
    put({"README.md": "by hand"})
    push(folder, keep=["README.md"])
    assert files(hub)["README.md"] == "by hand"


def test_configs_do_not_say_where_they_were_loaded_from(hub, folder):
    config = {"_class_name": "X", "_name_or_path": str(folder), "sizes": [1, 2], "label": "ä"}
    write(folder, {"transformer/config.json": json.dumps(config), "list.json": '["name_or_path"]'})
    push(folder)
    assert str(folder) not in str(files(hub))
    assert json.loads(files(hub)["transformer/config.json"]) == {"_class_name": "X", "sizes": [1, 2], "label": "ä"}
    assert json.loads((folder / "transformer" / "config.json").read_text()) == config


# ---- where it goes


def test_a_branch_is_made_and_main_left_alone(hub, folder):
    put({"old.txt": "old"})
    push(folder, revision="step/10")
    assert files(hub) == {"old.txt": "old"}
    assert set(files(hub, "step/10")) > {"old.txt", "model_index.json"}
    push(folder, revision="step/10")
    assert len(titles("step/10")) == 3


def test_a_pull_request_leaves_main_alone_and_needs_no_rights(hub, folder):
    put({"old.txt": "old"})
    commit = push(folder, create_pr=True, token="hf_guest")
    assert commit.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert files(hub) == {"old.txt": "old"}
    assert "model_index.json" in files(hub, "refs/pr/1")
    with pytest.raises(HfHubHTTPError, match="403"):
        push(folder, token="hf_guest")


def test_a_branch_and_a_pull_request_exclude_each_other(hub, folder):
    with pytest.raises(ValueError, match=r"`revision`='step' and `create_pr`"):
        push(folder, revision="step", create_pr=True)
    assert hub.requests == []


# ---- faults


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_twice(hub, folder, waits):
    hub.faults.append(LoseAnswer(**COMMIT))
    commit = push(folder)
    assert commit.oid == HfApi().model_info(REPO).sha
    assert commit.commit_url == f"{hub.url}/{REPO}/commit/{commit.oid}"
    assert titles() == ["Upload", "initial commit"]


def test_a_lost_commit_is_found_below_somebody_elses(hub, folder):
    hub.faults.append(LoseAnswer(**COMMIT))
    commit = FolderCommit(folder, REPO, "Upload")
    with pytest.raises(Exception, match="disconnected"):
        commit.attempt()
    put({"other.txt": ""})
    assert commit.attempt().oid == HfApi().list_repo_commits(REPO)[1].commit_id
    assert titles() == ["Somebody else's", "Upload", "initial commit"]


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub, folder, waits):
    HfApi().create_repo(REPO)
    push(folder, create_pr=True)
    write(folder, {"new.txt": ""})
    hub.faults.append(LoseAnswer(**COMMIT))
    commit = push(folder, create_pr=True)
    assert commit.pr_revision == "refs/pr/2"
    assert commit.pr_url.endswith("/discussions/2")
    assert "new.txt" in files(hub, "refs/pr/2")
    assert len(HfApi().list_repo_refs(REPO, include_pull_requests=True).pull_requests) == 2


def test_a_commit_that_arrives_after_it_was_given_up_is_not_made_twice(hub, folder, waits):
    """A proxy gives up waiting and the Hub commits a moment later: the second attempt has an outdated parent."""
    commit = FolderCommit(folder, REPO, "Upload")
    hub.faults.append(AnswerStatus(**COMMIT, status=504))
    with pytest.raises(HfHubHTTPError, match="504"):
        commit.attempt()
    late = FolderCommit(folder, REPO, "Upload")
    late._description = commit._description
    create_commit = commit._api.create_commit

    def overtaken(*args, **kwargs):
        late.attempt()
        return create_commit(*args, **kwargs)

    commit._api.create_commit = overtaken
    assert retry(commit.attempt, "Pushing").oid == HfApi().model_info(REPO).sha
    assert titles() == ["Upload", "initial commit"]


def test_what_is_compared_with_is_the_commit_that_is_built_on(hub, folder, waits):
    """Somebody else pushes shards between our look at the files and our commit: these must not be left lying."""
    commit, seen = FolderCommit(folder, REPO, "Upload"), []
    create_commit = commit._api.create_commit

    def raced(*args, **kwargs):
        if not seen:
            seen.append(put({"transformer/diffusion_pytorch_model.safetensors.index.json": "old"}))
        return create_commit(*args, **kwargs)

    commit._api.create_commit = raced
    retry(commit.attempt, "Pushing")
    assert set(files(hub)) == {"model_index.json", "transformer/diffusion_pytorch_model.safetensors"}
    assert titles() == ["Upload", "Somebody else's", "initial commit"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *product(["/commit/", "/preupload/", "/refs", "/tree/", "/repos/create", "/lfs"], [429, 503]),
        *product(["/commit/"], [408, 412, 500, 502, 504]),
    ],
)
def test_a_busy_hub_is_asked_again(hub, folder, waits, path, status):
    hub.faults.append(AnswerStatus(method=".*", path=path, status=status, retry_after=7))
    push(folder)
    assert titles() == ["Upload", "initial commit"]
    assert waits[0] >= 7


def test_an_upload_that_is_cut_off_leaves_the_repository_as_it_was_until_it_is_repeated(hub, folder, waits):
    push(folder)
    before = files(hub)
    write(folder, {"transformer/diffusion_pytorch_model.safetensors": "newer" * 1000, "model_index.json": "[]"})
    hub.faults.append(CutUpload(method="PUT", path="/lfs/", after=100, times=100))
    with pytest.raises(RuntimeError, match="Error while uploading"):
        push(folder)
    assert files(hub) == before
    hub.faults.clear()
    push(folder)
    assert files(hub)["transformer/diffusion_pytorch_model.safetensors"] == "newer" * 1000


def test_what_was_uploaded_is_not_uploaded_again(hub, folder, waits):
    hub.faults.append(AnswerStatus(**COMMIT, status=503, times=3))
    push(folder)
    assert sum(method == "PUT" for method, _ in hub.requests) == 1


def test_a_hub_that_stays_away_is_given_up(hub, folder, waits):
    hub.faults.append(AnswerStatus(method="POST", path="/commit/", status=503, times=100))
    with pytest.raises(HfHubHTTPError, match="503"):
        push(folder)
    assert waits == [2, 4, 8, 16]
    assert files(hub) == {}


@pytest.mark.parametrize(("token", "status"), [("hf_wrong", "401"), ("hf_guest", "403")])
def test_a_refusal_is_not_asked_for_again(hub, folder, waits, caplog, token, status):
    HfApi().create_repo(REPO)
    hub.requests.clear()
    with caplog.at_level(logging.DEBUG), pytest.raises(HfHubHTTPError, match=status) as caught:
        push(folder, token=token)
    assert waits == []
    assert token not in caplog.text + str(caught.value) + repr(caught.value)
    assert files(hub) == {}


def test_without_a_token_nothing_is_pushed(hub, folder, monkeypatch, waits):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match="401"):
        push(folder)
    assert waits == []


def test_offline_fails_at_once(hub, folder, waits, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineModeIsEnabled):
        push(folder)
    assert waits == []
    assert hub.requests == []


@pytest.mark.parametrize("token", ["hf_secret\n", "hf secret", "hf_sécret", ""])
def test_a_token_that_is_none_is_refused_without_being_repeated(folder, token):
    with pytest.raises(ValueError, match="`token` must be printable ASCII") as caught:
        FolderCommit(folder, REPO, "Upload", token=token)
    assert not token.strip() or token.strip() not in str(caught.value)
    assert check_token("hf_secret") == "hf_secret"
    assert check_token(None) is None


def test_errors_of_this_machine_are_not_waited_for():
    assert not any(map(is_transient, [FileNotFoundError(), ValueError(), PermissionError(), KeyError()]))
    assert not any(map(is_transient, [NotImplementedError(), RecursionError()]))
    assert all(map(is_transient, [ConnectionResetError(), TimeoutError()]))
    wrapped = RuntimeError()
    wrapped.__cause__ = FileNotFoundError()
    assert not is_transient(wrapped)
