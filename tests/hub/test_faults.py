"""What goes wrong between a Hub, a disk and a load: a clear error without tokens, and nothing half left behind."""

from __future__ import annotations

import logging
import resource
from contextlib import contextmanager

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_dit import routed_dit

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.training.run.folder import save_pipeline


REPO = "owner/tiny"


@pytest.fixture
def repo(hub):
    make_pipeline().push_to_hub(REPO, private=True)
    return REPO


def make_pipeline(**config):
    return DTRPipeline(scheduler=DDIMScheduler(), transformer=routed_dit(**config))


def load_model(**options):
    return DTRTransformer2DModel.from_pretrained(REPO, subfolder="transformer", **options)


def load_pipeline(**options):
    return DTRPipeline.from_pretrained(REPO, **options).transformer


def equal(one, other):
    return all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("load", [load_model, load_pipeline])
@pytest.mark.parametrize("token", ["hf_guest", "hf_wrong", False, None])
def test_a_private_repository_is_an_error_without_the_right_token_and_the_error_without_any(
    hub, repo, load, token, monkeypatch, caplog
):
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


@contextmanager
def full_disk():
    """A stand-in for a full disk: no file can grow beyond 20 kB, which configs are below and weights above."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_saving_leaves_the_pipeline_that_was_there_and_pushes_nothing(hub, tmp_path):
    save_pipeline(make_pipeline(), tmp_path)
    with full_disk():
        with pytest.raises(Exception, match="File too large"):
            save_pipeline(make_pipeline(num_layers=2), tmp_path)
        with pytest.raises(Exception, match="File too large"):
            make_pipeline().push_to_hub(REPO)
    assert equal(DTRPipeline.from_pretrained(tmp_path).transformer, routed_dit())
    assert hub.requests == []
