"""`diffusers-dtr card`: cards of folders and of repositories, written, renewed and pushed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import DDPMScheduler
from huggingface_hub import HfApi, ModelCard
from tiny_dit import routed_dit

from diffusers_dtr import DTRPipeline
from diffusers_dtr.cli import main


CARD = {"README.md", "figures/routing_masks.png", "training_config.json"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    DTRPipeline(DDPMScheduler(), transformer=routed_dit()).save_pretrained("digits")
    record = {"command": "accelerate launch train.py", "arguments": {"max_train_steps": 20}}
    Path("digits/training_config.json").write_text(json.dumps({**record, "model": {"routed_widths": [16]}}))
    return tmp_path / "digits"


@pytest.fixture
def repository(hub, folder):
    HfApi().create_repo("owner/digits")
    HfApi().upload_folder(repo_id="owner/digits", folder_path=folder)
    return "owner/digits"


def card(*arguments: object) -> None:
    assert main(["card", *map(str, arguments)]) == 0


def published(repo_id: str, revision: str | None = None) -> str:
    return Path(HfApi().hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8")


def edit(repo_id: str, old: str, new: str, revision: str | None = None) -> None:
    text = published(repo_id, revision).replace(old, new).encode()
    HfApi().upload_file(repo_id=repo_id, revision=revision, path_or_fileobj=text, path_in_repo="README.md")


def test_a_folder_gets_its_card(folder, capsys):
    card(folder, "--license", "mit", "--name", "My digits")
    assert capsys.readouterr().out.strip() == str(folder / "README.md")
    written = ModelCard.load(folder / "README.md")
    assert written.data.license == "mit"
    assert "# My digits\n" in written.text
    assert "| optimizer steps | 20 |" in written.text


def test_a_card_written_elsewhere_leaves_the_folder_as_it_is(folder):
    before = set(folder.rglob("*"))
    card("digits", "--output", "cards/mine")
    assert set(folder.rglob("*")) == before
    written = folder.parent / "cards" / "mine"
    assert {str(path.relative_to(written)) for path in written.rglob("*.*")} == CARD


def test_the_card_of_a_folder_is_pushed_without_its_weights(hub, folder, capsys):
    HfApi().create_repo("owner/other")
    card("digits", "--push", "--hub_model_id", "owner/other")
    assert set(HfApi().list_repo_files("owner/other")) - {".gitattributes"} == CARD
    assert 'from_pretrained("owner/other")' in published("owner/other")
    assert "/owner/other/commit/" in capsys.readouterr().out


def test_the_card_of_a_branch_is_renewed_there_around_edits_made_there(repository):
    before = [commit.title for commit in HfApi().list_repo_commits(repository)]
    HfApi().create_branch(repository, branch="experiment")
    branch = ["--push", "--revision", "experiment"]
    card("digits", "--hub_model_id", repository, *branch)
    edit(repository, "# digits", "# On the branch", "experiment")
    card("digits", "--hub_model_id", repository, *branch)
    assert "# On the branch" in published(repository, "experiment")
    record = {"path_or_fileobj": b'{"arguments": {"max_train_steps": 4000}}', "path_in_repo": "training_config.json"}
    HfApi().upload_file(repo_id=repository, revision="experiment", **record)
    card(repository, *branch)
    assert "# On the branch" in published(repository, "experiment")
    assert "| optimizer steps | 4,000 |" in published(repository, "experiment")
    assert [commit.title for commit in HfApi().list_repo_commits(repository)] == before
    files = HfApi().list_repo_files(repository, revision="experiment")
    assert "transformer/diffusion_pytorch_model.safetensors" in files


def test_the_card_of_a_repository_is_written_without_fetching_weights_around_edits_made_there(hub, repository, folder):
    card(repository, "--push")
    edit(repository, "# digits", "# On the Hub")
    hub.requests.clear()
    card(repository, "--output", "card")
    written = (folder.parent / "card" / "README.md").read_text()
    assert "# On the Hub" in written
    assert 'from_pretrained("owner/digits")' in written
    assert not [request for request in hub.requests if ".safetensors" in str(request)]
