"""What goes wrong between a Hub, a disk and a load: a clear error, nothing executed, nothing half left behind."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess

import pytest
import torch
from diffusers import DDIMScheduler
from hub_server import AnswerStatus, CutDownload
from huggingface_hub import HfApi, constants
from tiny_dit import routed_dit

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.hub import BackgroundPush, push_run
from diffusers_dtr.training.outputs import save_pipeline


REPO = "owner/tiny"
WEIGHTS = {"method": "GET", "path": r"/resolve/.*\.safetensors$"}


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


# ---- the network


@every_load
def test_a_download_that_is_cut_off_goes_on_where_it_was(hub, repo, load, waits, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults.append(CutDownload(**WEIGHTS, after=10_000, times=100))
    assert equal(load(), routed_dit())


@every_load
def test_a_download_that_never_ends_leaves_nothing_that_loads(hub, repo, load, waits):
    hub.faults.append(CutDownload(**WEIGHTS, after=100, times=100))
    with pytest.raises(Exception, match="received 100 bytes"):
        load()
    hub.faults.clear()
    assert equal(load(), routed_dit())


@every_load
def test_a_busy_hub_is_waited_for(hub, repo, load, waits):
    hub.faults.append(AnswerStatus(**WEIGHTS, status=429, retry_after=3))
    assert equal(load(), routed_dit())
    assert waits[0] >= 3


@every_load
def test_a_hub_that_is_down_is_an_error_that_names_the_repository(hub, repo, load, waits):
    hub.faults.append(AnswerStatus(method=".*", path=".", status=503, times=10**6))
    with pytest.raises(OSError, match=REPO):
        load()


# ---- who may


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


@every_load
def test_a_token_with_a_line_break_is_refused_and_not_repeated(hub, repo, load):
    with pytest.raises(ValueError, match="`token` must be printable ASCII") as caught:
        load(token="hf_owner\n")
    assert "hf_owner" not in str(caught.value)
    assert hub.requests == []


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


@every_load
def test_a_full_disk_while_downloading_leaves_nothing_that_loads(hub, repo, load, full_disk, waits):
    fill, empty = full_disk
    fill()
    # Of a model, diffusers says that it has no weights in any other format either.
    with pytest.raises(OSError, match=r"File too large|no file named|not appear to have a file"):
        load()
    empty()
    assert equal(load(), routed_dit())


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


# ---- what an index may name


def poison(folder, **entries):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entries}))


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass X: pass\n"
POISONS = [
    {"transformer": ["os", "system"]},
    {"scheduler": ["subprocess", "Popen"]},
    {"transformer": ["evil", "X"]},
    {"transformer": ["../evil", "X"]},
    {"transformer": ["/tmp/evil", "X"]},
    {"transformer": ["transformers.models", "X"]},
    {"vae": ["diffusers", "../X"]},
    {"vae": ["diffusers"]},
    {"vae": [["diffusers"], "X"]},
    {"_class_name": ["../evil", "X"]},
    {"_class_name": ["evil", "X"]},
    {"extra": ["evil", "X"]},
    {"subfolder": "../../x"},
    {"../evil": ["diffusers", "AutoencoderKL"]},
]


@pytest.mark.parametrize("from_hub", [False, True], ids=["folder", "hub"])
@pytest.mark.parametrize("entries", POISONS, ids=str)
def test_an_index_that_names_other_libraries_or_paths_is_refused_and_nothing_is_run(
    hub, folder, tmp_path, monkeypatch, entries, from_hub
):
    marker = tmp_path / "executed"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Where Python would find it, and where a path out of a component's folder leads.
    for place in (tmp_path, folder) if "transformer" in entries else (tmp_path,):
        (place / "evil.py").write_text(CODE.format(marker=str(marker)))
    poison(folder, **entries)
    source = folder
    if from_hub:
        HfApi().create_repo(REPO)
        HfApi().upload_folder(repo_id=REPO, folder_path=folder)
        source = REPO
    for trust in ({}, {"trust_remote_code": True}):
        with pytest.raises((ValueError, OSError), match=r"model_index|evil"):
            DTRPipeline.from_pretrained(source, **trust)
    assert not marker.exists()


def test_code_in_the_folder_runs_only_for_those_who_trust_it(folder, tmp_path):
    marker = tmp_path / "executed"
    (folder / "transformer" / "evil.py").write_text(CODE.format(marker=str(marker)))
    poison(folder, transformer=["evil", "X"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        DTRPipeline.from_pretrained(folder)
    assert not marker.exists()
    with pytest.raises((ValueError, AttributeError)):
        DTRPipeline.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_the_error_says_what_was_named(folder):
    poison(folder, transformer=["os", "system"])
    with pytest.raises(ValueError, match=r"`transformer`, got \['os', 'system'\]: nothing of it was imported"):
        DTRPipeline.from_pretrained(folder)
