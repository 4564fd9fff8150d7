"""What a finished run shares: its card, and which of its files."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from hub_server import AnswerStatus, LoseAnswer
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.hub import create_run_repo, push_run


SHARED = {
    "README.md",
    "logs/events.out",
    "model_index.json",
    "samples/step-00000010.png",
    "training_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
}
KEPT = {
    ".pipeline.partial/model_index.json",
    ".pipeline.previous/transformer/config.json",
    ".push/10-abc/optimizer.bin",
    ".run.lock",
    ".run.lock.holder",
    "checkpoint-10/optimizer.bin",
    "checkpoint-10/transformer/config.json",
    "checkpoint-20.partial/optimizer.bin",
    "latents-0123/moments.npy",
    "latents/0123/moments.npy",
    "text_embeddings/text-embeddings-0123/index.json",
    "training_config.partial",
}


@pytest.fixture
def run(tmp_path):
    """The folder of a run, with everything that one can leave behind."""
    for path in SHARED | KEPT:
        (tmp_path / "digits" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "digits" / path).write_text(path)
    return tmp_path / "digits"


def push(run, repo_id="owner/digits", token=None, private=None, message="End of training", **options):
    return push_run(run, repo_id, token, private, message, **options)


def files(repo_id="owner/digits", revision="main"):
    return set(HfApi().list_repo_files(repo_id, revision=revision)) - {".gitattributes"}


# ---- uploading


def test_pipeline_card_samples_and_logs_are_uploaded_and_nothing_else(hub, run):
    push(run)
    assert files() == SHARED


def test_the_address_is_that_of_a_commit_with_the_message(hub, run):
    url = push(run, message="Trained")
    (commit, *_) = HfApi().list_repo_commits("owner/digits")
    assert commit.title == "Trained"
    assert url == f"{hub.url}/owner/digits/commit/{commit.commit_id}"


def test_a_repository_is_named_after_the_folder_unless_it_is_named(hub, run, monkeypatch):
    monkeypatch.chdir(run)
    push(".", repo_id=None)
    push(run, repo_id="owner/other")
    assert files("owner/digits") == files("owner/other") == SHARED


def test_a_new_repository_is_private_where_asked(hub, run):
    for private in (False, True):
        push(run, repo_id=f"owner/private-{private}", private=private)
        assert HfApi().model_info(f"owner/private-{private}").private is private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token="hf_guest").model_info("owner/private-True")


def test_a_new_repository_is_as_private_as_its_owner_wants_where_nothing_is_asked(hub, run):
    for default in (False, True):
        hub.private_by_default = default
        assert create_run_repo(run, f"owner/made-{default}", None) == f"owner/made-{default}"
        push(run, repo_id=f"owner/pushed-{default}")
        for name in ("made", "pushed"):
            assert HfApi().model_info(f"owner/{name}-{default}").private is default


def test_the_given_token_is_used(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    push(run, repo_id=None, token="hf_guest")
    assert files("guest/digits") == SHARED


def test_pushing_again_adds_to_the_repository(hub, run):
    push(run)
    (run / "samples" / "step-00000020.png").write_text("new")
    push(run)
    assert files() == SHARED | {"samples/step-00000020.png"}


def test_a_branch_and_a_pull_request_leave_main_alone(hub, run):
    push(run, revision="step/10")
    address = push(run, create_pr=True)
    assert address == f"{hub.url}/owner/digits/discussions/1"
    assert files() == set()
    assert files(revision="step/10") == files(revision="refs/pr/1") == SHARED


def test_a_push_whose_answer_was_lost_is_found_and_not_made_twice(hub, run, waits):
    hub.faults.append(LoseAnswer(method="POST", path="/commit/"))
    url = push(run)
    commits = HfApi().list_repo_commits("owner/digits")
    assert [commit.title for commit in commits] == ["End of training", "initial commit"]
    assert url == f"{hub.url}/owner/digits/commit/{commits[0].commit_id}"


def test_a_failed_upload_is_an_error(hub, run):
    hub.faults.append(AnswerStatus(method="POST", path="/commit/", status=403))
    with pytest.raises(OSError, match="403"):
        push(run)


def test_a_pushed_run_is_a_pipeline(hub, tmp_path):
    model = DTRTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    DTRPipeline(scheduler=DDIMScheduler(), transformer=model).save_pretrained(tmp_path)
    push(tmp_path)
    loaded = DiffusionPipeline.from_pretrained("owner/digits").transformer
    assert torch.equal(loaded.pos_embed.proj.weight, model.pos_embed.proj.weight)


def test_a_card_is_pushed_as_it_is(hub, run):
    edited = "---\ntags: [mine]\n---\nWritten by hand: ä, 🤗.\r\n".encode()
    (run / "README.md").write_bytes(edited)
    push(run)
    with open(HfApi().hf_hub_download("owner/digits", "README.md"), "rb") as file:
        assert file.read() == edited
