"""Models and pipelines are pushed with everything that can be asked for, and come back to the bit."""

from __future__ import annotations

import json
import logging
import resource

import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub import HfApi, ModelCard
from tiny_dit import routed_dit

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.training.run.folder import save_pipeline


REPO = "owner/tiny"
NAME = "diffusion_pytorch_model"
CONFIG = "transformer/config.json"


def make_pipeline(**config):
    return DTRPipeline(scheduler=DDIMScheduler(), transformer=routed_dit(**config))


def load(**options):
    return DTRTransformer2DModel.from_pretrained(REPO, **options)


def load_from_pipeline(**options):
    return DTRPipeline.from_pretrained(REPO, **options).transformer


# What is pushed, and how its transformer is loaded again.
both = pytest.mark.parametrize(
    ("make", "load"), [(routed_dit, load), (make_pipeline, load_from_pipeline)], ids=["model", "pipeline"]
)


def equal(one, other):
    state, others = one.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(value, others[key]) for key, value in state.items())


def files(hub, revision="main"):
    return {path.rpartition("transformer/")[2] for path in hub.files(REPO, revision)}


@both
def test_a_branch_and_a_pull_request_are_loaded_beside_main(hub, make, load):
    make().push_to_hub(REPO)
    commit = make(num_layers=1).push_to_hub(REPO, revision="small", commit_message="Smaller")
    assert HfApi().list_repo_commits(REPO, revision="small")[0].title == "Smaller"
    assert make(num_layers=2).push_to_hub(REPO, create_pr=True).pr_revision == "refs/pr/1"
    for revision, layers in ((None, 3), ("small", 1), (commit.oid, 1), ("refs/pr/1", 2)):
        options = {} if revision is None else {"revision": revision}
        assert equal(load(**options), routed_dit(num_layers=layers))


@both
def test_shards_and_variants_load_and_each_is_replaced_by_its_like_alone(hub, make, load):
    make().push_to_hub(REPO, max_shard_size="10KB", private=True)
    make().to(torch.bfloat16).push_to_hub(REPO, variant="bf16", max_shard_size="5KB")
    assert HfApi().model_info(REPO).private
    assert {f"{NAME}.safetensors.index.json", f"{NAME}.safetensors.index.bf16.json"} < files(hub)
    assert equal(load(), routed_dit())
    assert equal(load(variant="bf16", dtype=torch.bfloat16), routed_dit().to(torch.bfloat16))
    make(num_layers=1).push_to_hub(REPO, safe_serialization=False)
    assert not [path for path in files(hub) if path.endswith(("safetensors.index.json", f"{NAME}.safetensors"))]
    make(num_layers=1).push_to_hub(REPO)
    assert f"{NAME}.bin" not in files(hub)
    assert f"{NAME}.safetensors.index.bf16.json" in files(hub)
    assert equal(load(), routed_dit(num_layers=1))


def test_a_component_is_pushed_into_its_folder(hub):
    make_pipeline().push_to_hub(REPO)
    card = hub.files(REPO)["README.md"]
    routed_dit(num_layers=1).push_to_hub(REPO, subfolder="transformer")
    assert equal(load(subfolder="transformer"), routed_dit(num_layers=1))
    assert equal(load_from_pipeline(), routed_dit(num_layers=1))
    assert hub.files(REPO)["README.md"] == card


@both
def test_a_new_repository_gets_a_card_and_one_edited_by_hand_stays(hub, make, load):
    make().push_to_hub(REPO)
    titles = [commit.title for commit in HfApi().list_repo_commits(REPO)]
    assert titles == [f"Upload {type(make()).__name__}", "initial commit"]
    card = ModelCard.load(REPO)
    assert (card.data.library_name, card.data.tags) == ("diffusers", ["diffusers", "diffusers-dtr"])
    assert type(make()).__name__ in card.text
    HfApi().upload_file(path_or_fileobj=b"---\ntags: [mine]\n---\nBy hand.", path_in_repo="README.md", repo_id=REPO)
    make(num_layers=1).push_to_hub(REPO)
    assert hub.files(REPO)["README.md"] == b"---\ntags: [mine]\n---\nBy hand."


@both
def test_saving_with_a_push_makes_the_same_commit_without_paths_of_this_machine(hub, make, load, tmp_path):
    make().push_to_hub(REPO, max_shard_size="10KB")
    make().save_pretrained(tmp_path / "first")
    again = type(make()).from_pretrained(tmp_path / "first")
    again.save_pretrained(str(tmp_path / "tiny"), push_to_hub=True, repo_id=REPO)
    assert equal(load(), routed_dit())
    assert not [path for path in files(hub) if "-of-" in path or path.endswith("safetensors.index.json")]
    assert str(tmp_path) not in str(hub.files(REPO))
    assert "_name_or_path" not in json.loads(hub.files(REPO)["config.json" if make is routed_dit else CONFIG])
    assert len(HfApi().list_repo_commits(REPO)) == 3


@pytest.fixture
def log(caplog):
    """All that is logged, the client's and diffusers' too."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "huggingface_hub")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    with caplog.at_level(logging.DEBUG):
        yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


@both
@pytest.mark.parametrize("token", ["hf_guest", "hf_wrong", None])
def test_a_private_repository_needs_the_right_token_and_nothing_says_which(hub, make, load, token, monkeypatch, log):
    monkeypatch.delenv("HF_TOKEN")
    make().push_to_hub(REPO, private=True, token="hf_owner")
    with pytest.raises(OSError, match=REPO) as caught:
        load(token=token)
    chain, error = "", caught.value
    while error is not None:
        chain, error = chain + repr(error) + str(error), error.__context__
    assert str(token) not in log.text + chain or token is None
    assert equal(load(token="hf_owner"), routed_dit())
    commits = "".join(f"{commit.title} {commit.message}" for commit in HfApi(token="hf_owner").list_repo_commits(REPO))
    assert "hf_owner" not in log.text + commits + str(hub.files(REPO))


def test_a_full_disk_while_saving_leaves_the_pipeline_that_was_there_and_pushes_nothing(hub, tmp_path):
    save_pipeline(make_pipeline(), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # which configs are below and weights above
    with pytest.raises(Exception, match="File too large"):
        save_pipeline(make_pipeline(num_layers=2), tmp_path)
    with pytest.raises(Exception, match="File too large"):
        make_pipeline().push_to_hub(REPO)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert equal(DTRPipeline.from_pretrained(tmp_path).transformer, routed_dit())
    assert hub.requests == []
