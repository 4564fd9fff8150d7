"""What a finished run shares: its card, and which of its files."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi

from diffusers_dtr.hub import create_run_repo, push_run


SHARED = {
    *("README.md", "logs/events.out", "model_index.json", "samples/step-00000010.png", "training_config.json"),
    *("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"),
}
KEPT = {
    *(
        ".pipeline.partial/model_index.json",
        ".pipeline.previous/transformer/config.json",
        ".push/10-abc/optimizer.bin",
    ),
    *(".run.lock", ".run.lock.holder", "checkpoint-10/optimizer.bin", "checkpoint-10/transformer/config.json"),
    *("checkpoint-20.partial/optimizer.bin", "latents-0123/moments.npy", "latents/0123/moments.npy"),
    *("text_embeddings/text-embeddings-0123/index.json", "training_config.partial"),
}


@pytest.fixture
def run(tmp_path):
    """The folder of a run, with everything that one can leave behind."""
    for path in SHARED | KEPT:
        (tmp_path / "digits" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "digits" / path).write_text(path)
    return tmp_path / "digits"


def push(run, repo_id="owner/digits", token=None, private=None, **options):
    return push_run(run, repo_id, token, private, "Trained", **options)


def files(repo_id="owner/digits", revision="main"):
    return set(HfApi().list_repo_files(repo_id, revision=revision)) - {".gitattributes"}


def test_pipeline_card_samples_and_logs_are_uploaded_and_nothing_else(hub, run):
    edited = "---\ntags: [mine]\n---\nWritten by hand: ä, 🤗.\r\n".encode()
    (run / "README.md").write_bytes(edited)
    url = push(run)
    (commit, *_) = HfApi().list_repo_commits("owner/digits")
    assert commit.title == "Trained"
    assert url == f"{hub.url}/owner/digits/commit/{commit.commit_id}"
    assert files() == SHARED
    assert hub.files("owner/digits")["README.md"] == edited


def test_a_repository_is_named_after_the_folder_unless_it_is_named(hub, run, monkeypatch):
    monkeypatch.chdir(run)
    push(".", repo_id=None)
    monkeypatch.delenv("HF_TOKEN")
    push(run, repo_id=None, token="hf_guest")
    assert files("owner/digits") == files("guest/digits") == SHARED


@pytest.mark.parametrize("asked", [None, False])
def test_a_new_repository_is_as_private_as_asked_or_as_its_owner_wants(hub, run, asked):
    hub.private_by_default = True
    assert create_run_repo(run, "owner/made", None, asked) == "owner/made"
    push(run, repo_id="owner/pushed", private=asked)
    assert [HfApi().model_info(name).private for name in ("owner/made", "owner/pushed")] == [asked is None] * 2


def test_a_branch_and_a_pull_request_leave_main_alone(hub, run):
    push(run, revision="step/10")
    assert push(run, create_pr=True) == f"{hub.url}/owner/digits/discussions/1"
    assert files() == set()
    assert files(revision="step/10") == files(revision="refs/pr/1") == SHARED
