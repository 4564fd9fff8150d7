"""What goes wrong between a Hub, a disk and a load: a clear error without tokens, and nothing half left behind."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import subprocess

import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub import HfApi
from tiny_dit import routed_dit

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.hub import push_run
from diffusers_dtr.training.run.background_push import BackgroundPush
from diffusers_dtr.training.run.outputs import save_pipeline


REPO = "owner/tiny"


@pytest.fixture
def folder(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def repo(hub, folder):
    HfApi().create_repo(REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=folder)
    hub.requests.clear()
    return REPO


def make_pipeline(**config):
    return DTRPipeline(scheduler=DDIMScheduler(), transformer=routed_dit(**config))


def load_model(**options):
    return DTRTransformer2DModel.from_pretrained(REPO, subfolder="transformer", **options)


def load_pipeline(**options):
    return DTRPipeline.from_pretrained(REPO, **options).transformer


every_load = pytest.mark.parametrize("load", [load_model, load_pipeline])


def equal(one, other):
    return all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


@every_load
@pytest.mark.parametrize("token", ["hf_guest", "hf_wrong", False, None])
def test_a_private_repository_is_an_error_without_the_right_token_and_the_error_without_any(
    hub, repo, load, token, monkeypatch, caplog
):
    HfApi().update_repo_settings(REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    for name in ("diffusers", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    with caplog.at_level(logging.DEBUG), pytest.raises(OSError, match=REPO) as caught:
        load(token=token)
    chain, error = "", caught.value
    while error is not None:
        chain, error = chain + repr(error) + str(error), error.__context__
    assert str(token) not in caplog.text + chain or not isinstance(token, str)
    assert equal(load(token="hf_owner"), routed_dit())
    assert "hf_owner" not in caplog.text


# ---- the disk


@pytest.fixture
def full_disk():
    """A stand-in for a full disk: no file can grow beyond 20 kB, which configs are below and weights above."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    def empty():
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield fill, empty
    empty()


@pytest.fixture
def read_only():
    """Makes folders that nothing can be written into, not even by root."""
    made = []

    def protect(folder):
        made.append(folder)
        folder.chmod(0o555)
        if os.geteuid() == 0 and (
            shutil.which("chattr") is None or subprocess.run(["chattr", "-R", "+i", folder]).returncode
        ):
            pytest.skip("no way to keep root from writing into a folder here: chattr is missing or does not work")

    yield protect
    for folder in made:
        if os.geteuid() == 0 and shutil.which("chattr"):
            subprocess.run(["chattr", "-R", "-i", folder], check=False)
        folder.chmod(0o755)


def test_a_full_disk_while_saving_leaves_the_pipeline_that_was_there(tmp_path, full_disk):
    fill, empty = full_disk
    save_pipeline(make_pipeline(), tmp_path)
    fill()
    with pytest.raises(Exception, match="File too large"):
        save_pipeline(make_pipeline(num_layers=2), tmp_path)
    empty()
    assert equal(DTRPipeline.from_pretrained(tmp_path).transformer, routed_dit())


def test_a_full_disk_while_saving_for_a_push_pushes_nothing(hub, full_disk):
    fill, empty = full_disk
    fill()
    with pytest.raises(Exception, match="File too large"):
        make_pipeline().push_to_hub(REPO)
    empty()
    assert hub.requests == []


def test_a_read_only_run_is_pushed_and_its_checkpoints_are_reported(hub, folder, read_only, caplog):
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "training_state.json").write_text("{}")
    read_only(folder)
    push_run(folder, REPO, None, False, "End of training")
    assert equal(load_pipeline(), routed_dit())
    background = BackgroundPush(folder)
    background.push_checkpoint(folder / "checkpoint-10", 10)
    assert list(background.finish().failed) == [10]
    assert "checkpoint of step 10 was not pushed" in caplog.text
