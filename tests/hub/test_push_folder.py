"""A push is one commit, made once, whatever becomes of its answer."""

from __future__ import annotations

import json
import logging

import pytest
from hub_faults import AnswerStatus, CutUpload, LoseAnswer
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from diffusers_dtr.hub import is_transient, push_folder, weights_name


REPO = "owner/digits"
COMMIT = {"method": "POST", "path": "/commit/"}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "new", {"model_index.json": "{}", WEIGHTS: "new"})
    return tmp_path / "new"


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)


def push(folder, **options):
    return push_folder(folder, REPO, "Upload", **options)


def put(files):
    """Commit files as somebody else would."""
    HfApi().create_repo(REPO, exist_ok=True)
    operations = [CommitOperationAdd(path, content.encode()) for path, content in files.items()]
    return HfApi().create_commit(REPO, operations, commit_message="Somebody else's").oid


def files(hub, revision="main"):
    return {path: data.decode() for path, data in hub.files(REPO, revision).items() if path != ".gitattributes"}


def titles(revision="main"):
    return [commit.title for commit in HfApi().list_repo_commits(REPO, revision=revision)]


# ---- what is in a commit


def test_a_folder_is_one_commit_however_many_files_it_has_and_none_where_nothing_has_changed(hub, folder):
    write(folder, {f"{number}.txt": str(number) for number in range(100)})
    write(folder, {".git/config": "", "a/.git/config": "", ".cache/huggingface/x": "", "b/c.partial": ""})
    for _ in range(2):
        commit = push(folder, ignore_patterns=["*.partial"])
        assert titles() == ["Upload", "initial commit"]
        assert commit.oid == HfApi().model_info(REPO).sha
    assert set(files(hub)) == {"model_index.json", WEIGHTS, *(f"{number}.txt" for number in range(100))}


def test_an_index_of_earlier_shards_does_not_outlive_them(hub, folder):
    name = "transformer/diffusion_pytorch_model"
    old = [f"{name}-00001-of-00002.safetensors", f"{name}.safetensors.index.json", f"{name}.bin"]
    kept = [f"{name}.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors", "transformer/config.json"]
    put(dict.fromkeys([*old, *kept], "old"))
    push(folder)
    assert files(hub) == dict.fromkeys(kept, "old") | {"model_index.json": "{}", WEIGHTS: "new"}
    assert len(titles()) == 3


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        ("unet/model.safetensors unet/model.bin unet/model-00001-of-00002.safetensors", "unet/model"),
        ("unet/model.safetensors.index.json", "unet/model"),
        ("unet/model.fp16-00001-of-00002.safetensors unet/model.safetensors.index.fp16.json", "unet/model.fp16"),
        ("model.safetensors", "/model"),
        ("unet/config.json logs/events.out.tfevents.1", None),
    ],
)
def test_weights_of_one_name_and_variant_have_one_name(paths, name):
    assert {weights_name(path) for path in paths.split()} == {name}


def test_a_mirrored_folder_loses_what_is_not_there_any_more_and_nothing_else_does(hub, folder):
    put({"last/gone.txt": "", "last/sub/gone.bin": "", "last-one/kept.txt": "", "kept.txt": ""})
    push(folder, path_in_repo="last", mirror=True)
    assert set(files(hub)) == {"last/model_index.json", f"last/{WEIGHTS}", "last-one/kept.txt", "kept.txt"}
    assert len(titles()) == 3


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
    for _ in range(2):
        push(folder, revision="step/10")
        assert files(hub) == {"old.txt": "old"}
        assert set(files(hub, "step/10")) == {"old.txt", "model_index.json", WEIGHTS}
        assert len(titles("step/10")) == 3


def test_a_pull_request_leaves_main_alone_and_needs_no_rights(hub, folder):
    put({"old.txt": "old"})
    commit = push(folder, create_pr=True, token="hf_guest")
    assert commit.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert files(hub) == {"old.txt": "old"}
    assert "model_index.json" in files(hub, "refs/pr/1")


def test_a_branch_and_a_pull_request_exclude_each_other(hub, folder):
    with pytest.raises(ValueError, match=r"`revision`='step' and `create_pr`"):
        push(folder, revision="step", create_pr=True)
    assert hub.requests == []


# ---- faults


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, folder, waits):
    put({f"{WEIGHTS}.index.json": "old"})
    hub.faults.append(LoseAnswer(**COMMIT))
    assert push(folder).oid == HfApi().model_info(REPO).sha
    assert titles() == ["Upload", "Somebody else's", "initial commit"]
    assert set(files(hub)) == {"model_index.json", WEIGHTS}


def test_what_is_compared_with_is_the_commit_that_is_built_on(hub, folder, waits, monkeypatch):
    """Somebody else pushes shards between our look at the files and our commit: these must not be left lying."""
    create_commit = HfApi.create_commit

    def overtaken(self, *args, **kwargs):
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        put({f"{WEIGHTS}.index.json": "old"})
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", overtaken)
    push(folder)
    assert set(files(hub)) == {"model_index.json", WEIGHTS}
    assert titles() == ["Upload", "Somebody else's", "initial commit"]


def test_a_pull_request_is_not_opened_twice_where_the_hub_does_not_say_that_it_was_not(hub, folder, waits):
    HfApi().create_repo(REPO)
    hub.faults.append(LoseAnswer(**COMMIT))
    with pytest.raises(Exception, match="disconnected"):
        push(folder, create_pr=True)
    write(folder, {"new.txt": ""})
    hub.faults.append(AnswerStatus(**COMMIT, status=429))
    assert push(folder, create_pr=True).pr_revision == "refs/pr/2"
    assert hub.repos["models", REPO].branches.keys() == {"main", "refs/pr/1", "refs/pr/2"}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *(("/repos/create", 503), ("/revision/", 429), ("/preupload/", 503), ("/lfs", 429)),
        *[("/commit/", status) for status in (408, 412, 429, 500)],
    ],
)
def test_a_busy_hub_is_asked_again(hub, folder, waits, path, status):
    hub.faults.append(AnswerStatus(method=".*", path=path, status=status, retry_after=7))
    push(folder)
    assert titles() == ["Upload", "initial commit"]
    assert waits[0] >= 7
    assert sum(method == "PUT" and "/lfs/" in path for method, path in hub.requests) <= 2


def test_an_upload_that_is_cut_off_leaves_the_repository_as_it_was(hub, folder, waits):
    push(folder)
    before = files(hub)
    write(folder, {WEIGHTS: "newer" * 1000, "model_index.json": "[]"})
    hub.faults.append(CutUpload(method="PUT", path="/lfs/", after=100, times=100))
    with pytest.raises(RuntimeError, match="Error while uploading"):
        push(folder)
    assert files(hub) == before


def test_a_hub_that_stays_away_is_given_up_and_one_that_is_not_asked_is_not_waited_for(
    hub, folder, waits, monkeypatch
):
    hub.faults.append(AnswerStatus(**COMMIT, status=503, times=100))
    with pytest.raises(HfHubHTTPError, match="503"):
        push(folder)
    assert waits == [2, 4, 8, 16]
    assert files(hub) == {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineModeIsEnabled):
        push(folder)
    assert len(waits) == 4


@pytest.mark.parametrize(("token", "status"), [("hf_wrong", "401"), ("hf_guest", "403"), (None, "401")])
def test_a_refusal_is_not_asked_for_again(hub, folder, waits, caplog, monkeypatch, token, status):
    HfApi().create_repo(REPO)
    monkeypatch.delenv("HF_TOKEN")
    with caplog.at_level(logging.DEBUG), pytest.raises(HfHubHTTPError, match=status) as caught:
        push(folder, token=token)
    assert waits == []
    assert str(token) not in caplog.text + str(caught.value) + repr(caught.value) or token is None
    assert files(hub) == {}


def test_errors_of_this_machine_are_not_waited_for():
    wrapped = RuntimeError()
    wrapped.__cause__ = FileNotFoundError()
    mistakes = [FileNotFoundError(), ValueError(), PermissionError(), NotImplementedError(), RecursionError(), wrapped]
    assert not any(map(is_transient, mistakes))
    assert all(map(is_transient, [ConnectionResetError(), TimeoutError(), RuntimeError()]))
