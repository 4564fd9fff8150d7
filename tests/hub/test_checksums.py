"""Damaged downloads are noticed, named, removed and downloaded anew; sound ones are read once."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from hub_server import AnswerStatus, CorruptDownload
from huggingface_hub import HfApi, constants, hf_hub_download, scan_cache_dir
from huggingface_hub.utils import sha
from tiny_dit import plain_dit, routed_dit

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.hub import verify_download


REPO = "owner/tiny"
WEIGHTS = {"method": "GET", "path": r"/resolve/.*\.safetensors$"}


# What is on the Hub, made once for all tests of this file.
_PUSHED = {}


@pytest.fixture
def repo(hub):
    """A repository of a pipeline: its transformer in shards, whole as a variant, and smaller on a branch."""
    transformer = routed_dit()
    if not _PUSHED:
        pipeline = DTRPipeline(scheduler=DDIMScheduler(), transformer=transformer)
        pipeline.push_to_hub(REPO, max_shard_size="10KB")
        pipeline.push_to_hub(REPO, variant="fp16")
        routed_dit(num_layers=1).push_to_hub(REPO, subfolder="transformer", revision="small")
        _PUSHED.update(hub.repos)
        hub.requests.clear()
    hub.repos.update(_PUSHED)
    return transformer


@pytest.fixture
def shard(hub, repo):
    return next(path for path in hub.files(REPO) if "-00002-of-" in path)


def load_model(**options):
    return DTRTransformer2DModel.from_pretrained(REPO, subfolder="transformer", **options)


def load_pipeline(**options):
    return DTRPipeline.from_pretrained(REPO, **options).transformer


every_load = pytest.mark.parametrize("load", [load_model, load_pipeline])
every_choice = pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"revision": "small"}], ids=str)


def equal(one, other):
    return all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


@pytest.fixture
def hashed(monkeypatch):
    """How many files are read to verify them."""
    calls = []
    original = sha.sha_fileobj
    monkeypatch.setattr("huggingface_hub.utils._verification.sha_fileobj", lambda f: calls.append(1) or original(f))
    return calls


@every_load
@every_choice
def test_a_damaged_download_is_an_error_and_comes_whole_the_next_time(hub, repo, load, options):
    hub.faults.append(CorruptDownload(**WEIGHTS))
    with pytest.raises(OSError, match=r"transformer/diffusion_pytorch_model.*\.safetensors of owner/tiny is not what"):
        load(**options)
    again = load(**options)
    assert equal(again, repo if "revision" not in options else routed_dit(num_layers=1))


@every_load
def test_weights_that_cannot_even_be_read_are_named_as_damaged(hub, repo, load, monkeypatch):
    flip_first_byte(monkeypatch)
    hub.faults.append(CorruptDownload(**WEIGHTS, times=3))
    with pytest.raises(OSError, match="is not what the Hub has"):
        load()
    assert equal(load(), repo)


def flip_first_byte(monkeypatch):
    """A damaged header makes the weights unreadable."""

    def play(self, exchange):
        reply = exchange.answer(exchange.read())
        exchange.send(type(reply)(reply.status, b"\xff" + reply.body[1:], reply.headers))

    monkeypatch.setattr(CorruptDownload, "play", play)


def test_a_damaged_config_is_noticed_too(hub, repo):
    hub.faults.append(CorruptDownload(method="GET", path=r"/resolve/.*transformer/config\.json"))
    with pytest.raises(OSError, match=r"transformer/config\.json of owner/tiny is not what"):
        load_pipeline()
    assert equal(load_pipeline(), repo)


@every_load
def test_verifying_can_be_switched_off(hub, repo, load, hashed):
    hub.faults.append(CorruptDownload(**WEIGHTS))
    assert not equal(load(verify_checksums=False), repo)
    assert hashed == []
    with pytest.raises(OSError, match="is not what the Hub has"):
        load()


@every_load
def test_what_was_verified_is_not_read_again(hub, repo, load, hashed):
    load()
    read = len(hashed)
    assert read >= 3
    load()
    load(local_files_only=True)
    assert len(hashed) == read


@every_load
def test_what_was_verified_is_remembered_when_another_revision_is(hub, repo, load, hashed):
    load(), load(revision="small")
    read = len(hashed)
    load(), load(revision="small")
    assert len(hashed) == read


@every_load
def test_without_a_network_on_purpose_nothing_is_verified(hub, repo, load, hashed):
    load(verify_checksums=False)
    requests = len(hub.requests)
    assert equal(load(local_files_only=True), repo)
    assert hashed == []
    assert len(hub.requests) == requests


def test_what_was_downloaded_by_others_is_verified(hub, shard):
    hub.faults.append(CorruptDownload(**WEIGHTS))
    hf_hub_download(REPO, shard)
    with pytest.raises(OSError, match=re.escape(shard)):
        load_model()


def test_what_was_verified_and_then_damaged_on_the_disk_is_noticed(shard):
    load_model()
    path = Path(hf_hub_download(REPO, shard))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(OSError, match=re.escape(shard)):
        load_model()


@every_load
def test_a_cached_model_loads_without_a_network(hub, repo, load, waits):
    load()
    hub.faults.append(AnswerStatus(method=".*", path=".", status=503, times=1000))
    assert equal(load(local_files_only=True), repo)
    requests = len(hub.requests)
    assert equal(load(local_files_only=True), repo)
    assert len(hub.requests) == requests


@every_load
def test_offline_nothing_is_verified(hub, repo, load, hashed, monkeypatch):
    # Not the shards: offline, diffusers loads these with `local_files_only` alone.
    load(variant="fp16", verify_checksums=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert equal(load(variant="fp16"), repo)
    assert hashed == []


def test_what_could_not_be_verified_is_said_and_verified_next_time(hub, repo, hashed, caplog, waits):
    load_model(verify_checksums=False)
    hub.faults.append(AnswerStatus(method="GET", path="/tree/", status=503, times=1000))
    with caplog.at_level(logging.WARNING):
        assert equal(load_model(), repo)
    assert "could not be verified" in caplog.text
    assert hashed == []
    hub.faults.clear()
    load_model()
    assert hashed


def test_a_private_repository_is_verified_with_the_given_token(hub, monkeypatch):
    routed_dit().push_to_hub(REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    hub.faults.append(CorruptDownload(**WEIGHTS))
    with pytest.raises(OSError, match="is not what the Hub has"):
        DTRTransformer2DModel.from_pretrained(REPO, token="hf_owner")
    assert equal(DTRTransformer2DModel.from_pretrained(REPO, token="hf_owner"), routed_dit())


def test_a_cache_of_ones_own_is_verified(hub, repo, tmp_path):
    hub.faults.append(CorruptDownload(**WEIGHTS))
    with pytest.raises(OSError, match="is not what the Hub has"):
        load_model(cache_dir=tmp_path)
    assert equal(load_model(cache_dir=tmp_path), repo)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_folders_and_what_is_not_cached_are_left_alone(hub, repo, tmp_path):
    routed_dit().save_pretrained(tmp_path)
    assert equal(DTRTransformer2DModel.from_pretrained(tmp_path), routed_dit())
    verify_download(REPO)
    verify_download("no/such/repository")
    assert hub.requests == []


def test_a_checkpoint_of_diffusers_own_dit_is_verified(hub):
    plain_dit().push_to_hub(REPO)
    hub.faults.append(CorruptDownload(**WEIGHTS))
    with pytest.raises(OSError, match="is not what the Hub has"):
        DTRTransformer2DModel.from_pretrained(REPO)
    assert equal(DTRTransformer2DModel.from_pretrained(REPO), DTRTransformer2DModel.from_transformer(plain_dit()))


def test_a_repository_loaded_by_diffusers_own_pipeline_is_verified_on_request(hub, repo):
    hub.faults.append(CorruptDownload(**WEIGHTS))
    HfApi().snapshot_download(REPO)
    with pytest.raises(OSError, match="is not what the Hub has"):
        verify_download(REPO)


def test_errors_of_loading_stay_what_they_are(hub, repo):
    with pytest.raises(OSError, match="owner/absent"):
        DTRTransformer2DModel.from_pretrained("owner/absent")
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.absent"):
        load_model(variant="absent")


def test_a_record_that_cannot_be_written_is_said(hub, repo, caplog):
    storage = Path(hf_hub_download(REPO, "model_index.json")).parents[2]
    (storage / "verified_by_diffusers_dtr.json").mkdir()
    with caplog.at_level(logging.WARNING):
        assert equal(load_model(), repo)
    assert "will be verified again" in caplog.text


def test_the_cache_tidies_up_what_is_remembered(hub, repo):
    load_model()
    cache = scan_cache_dir()
    assert not cache.warnings
    cache.delete_revisions(*[revision.commit_hash for repo in cache.repos for revision in repo.revisions]).execute()
    assert not list(Path(constants.HF_HUB_CACHE).rglob("verified_by*"))
