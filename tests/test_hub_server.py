"""The test Hub, seen through the real clients: what it serves, whom it refuses, and how its faults show.

The tests of faults record what `huggingface_hub` makes of them: what we build on top has to live with that.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_server import AnswerStatus, CutUpload, HubServer, LoseAnswer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


REPO = "owner/tiny"
CONFIG, WEIGHTS = b'{"sample_size": 8}', bytes(range(256)) * 20
# Both files of `repo`: one that git holds itself, one in a subfolder that goes through LFS.
FILES = {"config.json": CONFIG, "unet/model.safetensors": WEIGHTS}
DOWNLOAD_OF_WEIGHTS = {"method": "GET", "path": r"/resolve/.*\.safetensors"}
# The base of all errors of the client's HTTP library, which is httpx or its successor, depending on the release.
HTTPError = HfHubHTTPError.__bases__[0]


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi()


@pytest.fixture
def repo(hub: HubServer, api: HfApi, tmp_path: Path) -> str:
    """A repository with `FILES`, uploaded as a folder; the id of its last commit."""
    api.create_repo(REPO)
    for path, content in FILES.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(content)
    return api.upload_folder(repo_id=REPO, folder_path=tmp_path / "up").oid


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


def paths(hub: HubServer, method: str) -> list[str]:
    return [path for asked, path in hub.requests if asked == method]


# ---- contents


def test_snapshot_has_the_uploaded_bytes(api: HfApi, repo: str) -> None:
    folder = Path(api.snapshot_download(REPO))
    assert folder.name == repo
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES


def test_single_files_have_the_uploaded_bytes(api: HfApi, repo: str) -> None:
    assert {path: Path(api.hf_hub_download(REPO, path)).read_bytes() for path in FILES} == FILES


def test_only_the_large_file_type_goes_through_lfs(hub: HubServer, repo: str) -> None:
    assert paths(hub, "PUT") == [f"/lfs/{hashlib.sha256(WEIGHTS).hexdigest()}"]


def test_etags_are_those_of_git_and_lfs(api: HfApi, repo: str) -> None:
    git_oid = subprocess.run(["git", "hash-object", "--stdin"], input=CONFIG, capture_output=True, check=True).stdout
    by_path = {path: api.get_hf_file_metadata(url=f"{api.endpoint}/{REPO}/resolve/main/{path}") for path in FILES}
    assert by_path["config.json"].etag == git_oid.decode().strip()
    assert by_path["unet/model.safetensors"].etag == hashlib.sha256(WEIGHTS).hexdigest()
    assert {path: metadata.size for path, metadata in by_path.items()} == {p: len(c) for p, c in FILES.items()}
    assert {metadata.commit_hash for metadata in by_path.values()} == {repo}


def test_repo_info_describes_the_files(api: HfApi, repo: str) -> None:
    info = api.model_info(REPO, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    assert info.sha == repo
    assert set(siblings) == {".gitattributes", *FILES}
    assert siblings["config.json"].lfs is None
    assert siblings["unet/model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert siblings["unet/model.safetensors"].size == len(WEIGHTS)


def test_tree_is_listed_by_level_or_whole(api: HfApi, repo: str) -> None:
    level = {entry.path for entry in api.list_repo_tree(REPO)}
    whole = {entry.path for entry in api.list_repo_tree(REPO, recursive=True)}
    assert level == {".gitattributes", "config.json", "unet"}
    assert whole == level | {"unet/model.safetensors"}
    assert [entry.path for entry in api.list_repo_tree(REPO, "unet")] == ["unet/model.safetensors"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "vae"))


def test_tree_pages_are_followed_to_the_end(hub: HubServer, api: HfApi, repo: str) -> None:
    hub.page_size = 1
    listed = [entry.path for entry in api.list_repo_tree(REPO, recursive=True, revision=repo)]
    assert listed == [".gitattributes", "config.json", "unet", "unet/model.safetensors"]
    assert sum("/tree/" in path for path in paths(hub, "GET")) == 4


def test_paths_info_leaves_out_what_does_not_exist(api: HfApi, repo: str) -> None:
    found = api.get_paths_info(REPO, ["unet", "config.json", "absent"])
    assert {entry.path for entry in found} == {"unet", "config.json"}


def test_large_file_is_uploaded_in_parts(hub: HubServer, api: HfApi) -> None:
    hub.part_size = 1000
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id=REPO)
    assert len(paths(hub, "PUT")) == 6
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS


def test_content_the_hub_has_is_not_uploaded_again(hub: HubServer, api: HfApi, repo: str) -> None:
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="copy.safetensors", repo_id=REPO)
    assert len(paths(hub, "PUT")) == 1
    assert hub.files(REPO)["copy.safetensors"] == WEIGHTS


def test_unchanged_files_make_no_commit(api: HfApi, repo: str) -> None:
    assert api.create_commit(REPO, [add(*item) for item in FILES.items()], commit_message="again").oid == repo


def test_datasets_are_another_namespace(api: HfApi, repo: str) -> None:
    api.create_repo(REPO, repo_type="dataset")
    api.upload_file(path_or_fileobj=b"1", path_in_repo="data.csv", repo_id=REPO, repo_type="dataset")
    assert Path(api.hf_hub_download(REPO, "data.csv", repo_type="dataset")).read_bytes() == b"1"
    assert not api.file_exists(REPO, "data.csv")


# ---- revisions


def test_a_commit_id_names_its_state_for_ever(api: HfApi, repo: str) -> None:
    api.create_commit(REPO, [add("config.json", b"{}")], commit_message="change")
    assert Path(api.hf_hub_download(REPO, "config.json", revision=repo)).read_bytes() == CONFIG
    assert Path(api.hf_hub_download(REPO, "config.json")).read_bytes() == b"{}"


def test_history_is_newest_first(api: HfApi, repo: str) -> None:
    change = api.create_commit(REPO, [add("config.json", b"{}")], commit_message="change")
    history = api.list_repo_commits(REPO)
    assert [commit.commit_id for commit in history[:2]] == [change.oid, repo]
    assert [commit.title for commit in history][::2] == ["change", "initial commit"]


def test_branches_move_apart(api: HfApi, repo: str) -> None:
    api.create_branch(REPO, branch="step/1")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO, revision="step/1")
    assert Path(api.hf_hub_download(REPO, "config.json", revision="step/1")).read_bytes() == b"{}"
    assert Path(api.hf_hub_download(REPO, "config.json", revision="main")).read_bytes() == CONFIG
    assert {branch.name for branch in api.list_repo_refs(REPO).branches} == {"main", "step/1"}


def test_a_pull_request_is_a_revision_beside_main(api: HfApi, repo: str) -> None:
    pull = api.create_commit(REPO, [add("config.json", b"{}")], commit_message="propose", create_pr=True)
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    assert Path(api.hf_hub_download(REPO, "config.json", revision=pull.pr_revision)).read_bytes() == b"{}"
    assert api.model_info(REPO).sha == repo
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [ref.target_commit for ref in refs.pull_requests] == [pull.oid]


def test_files_and_folders_are_deleted(hub: HubServer, api: HfApi, repo: str) -> None:
    api.delete_file("config.json", REPO)
    api.delete_folder("unet", REPO)
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert hub.files(REPO, repo).items() >= FILES.items()
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, [CommitOperationDelete("config.json")], commit_message="once more")


def test_a_commit_on_an_outdated_parent_is_refused(api: HfApi, repo: str) -> None:
    api.create_commit(REPO, [add("a.txt", b"a")], commit_message="first", parent_commit=repo)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(REPO, [add("b.txt", b"b")], commit_message="second", parent_commit=repo)


# ---- repositories and who may see them


def test_existing_repo_is_an_error_unless_allowed(api: HfApi, repo: str) -> None:
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo("tiny", exist_ok=True).repo_id == REPO
    assert api.model_info(REPO).sha == repo


def test_deleted_repo_is_gone(api: HfApi, repo: str) -> None:
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)


@pytest.mark.parametrize("token", ["hf_guest", False])
def test_private_repo_is_not_found_by_others(api: HfApi, token: str | bool) -> None:
    api.create_repo(REPO, private=True)
    api.upload_file(path_or_fileobj=CONFIG, path_in_repo="config.json", repo_id=REPO)
    assert api.model_info(REPO).private
    for ask in (api.model_info, api.snapshot_download, lambda *a, **k: api.hf_hub_download(*a, "config.json", **k)):
        with pytest.raises(RepositoryNotFoundError):
            ask(REPO, token=token)


def test_gated_repo_shows_its_page_but_not_its_files(api: HfApi, repo: str) -> None:
    api.update_repo_settings(REPO, gated="auto")
    assert api.model_info(REPO, token="hf_guest").gated == "auto"
    with pytest.raises(GatedRepoError):
        api.hf_hub_download(REPO, "config.json", token="hf_guest")
    assert Path(api.hf_hub_download(REPO, "config.json")).read_bytes() == CONFIG


def test_wrong_token_is_an_authentication_error(api: HfApi, repo: str) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        api.hf_hub_download(REPO, "config.json", token="hf_wrong")
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")
    assert api.whoami()["name"] == "owner"


def test_others_may_read_and_propose_but_not_write(api: HfApi, repo: str) -> None:
    guest = HfApi(token="hf_guest")
    assert Path(guest.hf_hub_download(REPO, "config.json")).read_bytes() == CONFIG
    assert guest.create_commit(REPO, [add("a.txt", b"a")], commit_message="propose", create_pr=True).pr_num == 1
    for write in (
        lambda: guest.create_commit(REPO, [add("a.txt", b"a")], commit_message="push"),
        lambda: guest.create_branch(REPO, branch="mine"),
        lambda: guest.create_repo("owner/other"),
        lambda: guest.delete_repo(REPO),
    ):
        with pytest.raises(HfHubHTTPError, match="403"):
            write()


def test_missing_revisions_and_files_have_their_own_errors(api: HfApi, repo: str) -> None:
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "config.json", revision="absent")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=REPO, revision="absent")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "absent.json")


def test_card_with_broken_metadata_is_refused(api: HfApi, repo: str) -> None:
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_file(path_or_fileobj=b"---\ntags: [a\n---\n", path_in_repo="README.md", repo_id=REPO)
    api.upload_file(path_or_fileobj=b"---\ntags: [a]\n---\n", path_in_repo="README.md", repo_id=REPO)
    assert ModelCard.load(REPO).data.tags == ["a"]


# ---- diffusers


def tiny_pipeline() -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=10))


def test_pushed_pipeline_and_model_load_in_a_fresh_process_to_the_bit(
    hub: HubServer, fresh_process: Callable[..., Any], tmp_path: Path
) -> None:
    pipeline = tiny_pipeline()
    pipeline.push_to_hub(REPO, private=True)
    pipeline.unet.push_to_hub("owner/tiny-unet")
    loaded = fresh_process(
        """
        import json, torch
        from diffusers import DDPMPipeline, UNet2DModel

        def sample(pipeline):
            generator = torch.Generator().manual_seed(1)
            return pipeline(generator=generator, num_inference_steps=3, output_type="np").images.tolist()

        pipeline = DDPMPipeline.from_pretrained("owner/tiny")
        samples = [sample(pipeline)]
        pipeline.unet = UNet2DModel.from_pretrained("owner/tiny-unet")
        print(json.dumps([*samples, sample(pipeline)]))
        """
    )
    # Loaded weights are views into the file's memory, and kernels round differently (1e-7) at addresses that are not
    # aligned as a new tensor's are. So it is a loaded pipeline that the loaded ones have to equal.
    pipeline.save_pretrained(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(1)
    sample = pipeline(generator=generator, num_inference_steps=3, output_type="np").images.tolist()
    assert loaded == [sample, sample]


# ---- faults


def test_rate_limited_upload_is_retried_after_the_time_asked_for(hub: HubServer, api: HfApi, waits: list) -> None:
    api.create_repo(REPO)
    hub.faults.append(AnswerStatus(method="PUT", path="/lfs/", status=429, retry_after=7))
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id=REPO)
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS
    assert waits[0] >= 7


def test_failing_storage_is_retried_then_reported(hub: HubServer, api: HfApi, waits: list) -> None:
    api.create_repo(REPO)
    hub.faults.append(AnswerStatus(method="PUT", path="/lfs/", status=503, times=100))
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id=REPO)
    assert len(paths(hub, "PUT")) == 6
    assert "model.safetensors" not in hub.files(REPO)


def test_rate_limited_commit_is_not_retried(hub: HubServer, api: HfApi, waits: list) -> None:
    api.create_repo(REPO)
    hub.faults.append(AnswerStatus(method="POST", path="/commit/", status=429, retry_after=7))
    with pytest.raises(HfHubHTTPError, match="429"):
        api.upload_file(path_or_fileobj=CONFIG, path_in_repo="config.json", repo_id=REPO)
    assert "config.json" not in hub.files(REPO)
    assert not waits


def test_cut_upload_is_sent_again_whole(hub: HubServer, api: HfApi, waits: list) -> None:
    api.create_repo(REPO)
    hub.faults.append(CutUpload(method="PUT", path="/lfs/", after=100))
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id=REPO)
    assert len(paths(hub, "PUT")) == 2
    assert hub.files(REPO)["model.safetensors"] == WEIGHTS


def test_rate_limited_download_waits_as_long_as_asked(hub: HubServer, api: HfApi, repo: str, waits: list) -> None:
    hub.faults.append(AnswerStatus(**DOWNLOAD_OF_WEIGHTS, status=429, retry_after=7))
    assert Path(api.hf_hub_download(REPO, "unet/model.safetensors")).read_bytes() == WEIGHTS
    assert waits[0] >= 7


@pytest.mark.parametrize("ask", ["hf_hub_download", "snapshot_download"])
def test_failing_hub_looks_like_an_empty_cache(hub: HubServer, api: HfApi, repo: str, waits: list, ask: str) -> None:
    hub.faults.append(AnswerStatus(method="GET|HEAD", path=".", status=503, times=100))
    with pytest.raises(LocalEntryNotFoundError):
        getattr(api, ask)(REPO, **({"filename": "config.json"} if ask == "hf_hub_download" else {}))


def test_server_error_at_the_transfer_itself_is_not_retried(
    hub: HubServer, api: HfApi, repo: str, waits: list
) -> None:
    hub.faults.append(AnswerStatus(**DOWNLOAD_OF_WEIGHTS, status=503))
    with pytest.raises(HfHubHTTPError, match="503"):
        api.hf_hub_download(REPO, "unet/model.safetensors")


def test_commit_whose_answer_is_lost_has_landed_but_raises(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO)
    hub.faults.append(LoseAnswer(method="POST", path="/commit/"))
    with pytest.raises(HTTPError, match="disconnected"):
        api.upload_file(path_or_fileobj=CONFIG, path_in_repo="config.json", repo_id=REPO)
    assert hub.files(REPO)["config.json"] == CONFIG
    assert len(api.list_repo_commits(REPO)) == 2


def test_a_used_up_fault_lets_requests_through(hub: HubServer, api: HfApi, repo: str) -> None:
    hub.faults.append(AnswerStatus(method="GET", path=f"/api/models/{REPO}", status=400, times=2))
    for _ in range(2):
        with pytest.raises(BadRequestError):
            api.model_info(REPO)
    assert api.model_info(REPO).sha == repo


def test_what_the_hub_does_not_serve_fails_the_test(hub: HubServer, api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="501"):
        api.get_user_overview("owner")
    assert "no GET /api/users/owner" in str(hub.errors.pop())
