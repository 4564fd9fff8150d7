"""What a training script shares on the Hub, when, and what a failing network does to it."""

import json
import socket
from pathlib import Path

import pytest
import torch
from hub_faults import AnswerStatus
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from training_runs import make_images, same_weights, train, weights

from diffusers_dtr import DTRPipeline


DIGITS = ["--push_to_hub", "--hub_model_id", "owner/digits"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


def hub_files(hub, branch: str = "main") -> set[str]:
    return set(hub.repos["models", "owner/digits"].branches[branch].files)


def logged_steps(folder: Path) -> list[int]:
    """The steps at which TensorBoard's files have a loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(folder / "class-conditional")).Reload().Scalars("loss")]


def test_a_pushed_run_loads_from_the_hub_and_says_all_but_secrets(hub, images, tmp_path, monkeypatch):
    output_dir = tmp_path / "run"
    typed = ["--hub_token", "hf_owner", "--output_dir", str(output_dir)]
    monkeypatch.setattr("sys.argv", ["train.py", *typed, "--max_train_steps", "3"])
    flags = ["--hub_token", "hf_owner", "--hub_private_repo", "--hub_strategy", "checkpoint"]
    flags += ["--report_to", "tensorboard", "--validation_data_dir", images, "--num_clusters", 3]
    run = train(images, output_dir, *DIGITS, *flags, "--balancing", "uncertainty")
    shown = {"samples/step-00000003.png", "loss_per_cluster.png", "loss_history.jsonl", "training_config.json"}
    assert hub_files(hub) >= {"README.md", "model_index.json", "last-checkpoint/training_state.json", *shown}
    assert not [path for path in hub_files(hub) if path.startswith(("checkpoint-", ".p", "latents"))]
    assert hub.repos["models", "owner/digits"].private
    pipeline = DTRPipeline.from_pretrained("owner/digits")
    for name, weight in weights(run).items():
        assert torch.equal(pipeline.transformer.state_dict()[name], weight)
    fetched = Path(HfApi().snapshot_download("owner/digits", local_dir=tmp_path / "hub"))
    assert logged_steps(fetched / "logs") == [3]
    assert socket.gethostname() not in str(hub_files(hub))
    for path in hub_files(hub):
        content = (fetched / path).read_bytes()
        for private in (b"hf_owner", str(tmp_path).encode(), str(images).encode(), str(Path.home()).encode() + b"/"):
            assert private not in content, path

    record = json.loads((run / "training_config.json").read_text())
    assert record["command"] == "accelerate launch train.py --output_dir path/to/run --max_train_steps 3"
    assert (record["model"]["class"], record["num_images"]) == ("DTRTransformer2DModel", 24)
    card = ModelCard.load(run / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(record["results"]["validation_loss"], abs=1e-5)
    assert result.metric_args["images"] == record["held_out"]["images"] == 24
    loading = 'DTRPipeline.from_pretrained("owner/digits")\nimages = pipe(\n'
    for text in ("uncertainty", loading, "accelerate launch train.py \\\n", "trained from scratch on 24 images"):
        assert text in card.text


@pytest.mark.parametrize("flags", [(), ("--hub_revision", "experiment")])
def test_card_that_was_edited_on_the_hub_keeps_the_edit(flags, hub, images, tmp_path):
    run = train(images, tmp_path / "first", *DIGITS, *flags)
    edited = (run / "README.md").read_text() + "\nTrained in the garden.\n"
    where = {"repo_id": "owner/digits", "revision": flags[-1] if flags else None}
    HfApi().upload_file(**where, path_or_fileobj=edited.encode(), path_in_repo="README.md")
    again = train(images, tmp_path / "second", *DIGITS, *flags, "--seed", 5)
    assert "Trained in the garden." in (again / "README.md").read_text()
    shared = Path(HfApi().hf_hub_download(**where, filename="README.md")).read_text()
    assert "Trained in the garden." in shared


def test_result_goes_to_a_branch_or_a_pull_request(hub, images, tmp_path):
    train(images, tmp_path / "branch", *DIGITS, "--hub_revision", "experiment", "--hub_strategy", "checkpoint")
    shared = {"model_index.json", "last-checkpoint/training_state.json"}
    assert shared <= hub_files(hub, "experiment")
    assert not shared & hub_files(hub)
    train(images, tmp_path / "request", *DIGITS, "--hub_create_pr")
    assert "model_index.json" not in hub_files(hub)
    assert DTRPipeline.from_pretrained("owner/digits", revision="refs/pr/1").transformer is not None


def test_a_wrong_token_stops_the_run_before_training(hub, images, tmp_path):
    with pytest.raises(HfHubHTTPError):
        train(images, tmp_path / "run", *DIGITS, "--hub_token", "hf_wrong")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_latest_checkpoint_is_shared_while_training_and_resumes_elsewhere(hub, images, tmp_path):
    flags = ["--max_train_steps", 4, "--checkpointing_steps", 2, "--use_ema"]
    whole = train(images, tmp_path / "whole", *DIGITS, *flags, "--hub_strategy", "checkpoint")
    assert "last-checkpoint/training_state.json" in hub_files(hub)
    fetched = HfApi().snapshot_download("owner/digits", allow_patterns="last-checkpoint/*", local_dir=tmp_path / "hub")
    checkpoint = Path(fetched) / "last-checkpoint"
    assert json.loads((checkpoint / "training_state.json").read_text())["global_step"] == 4
    assert same_weights(checkpoint, whole / "checkpoint-4")
    longer = train(images, tmp_path / "longer", *flags, "--max_train_steps", 6, "--resume_from_checkpoint", checkpoint)
    assert json.loads((longer / "checkpoint-6" / "training_state.json").read_text())["global_step"] == 6


def test_network_that_fails_neither_stops_the_training_nor_loses_its_result(hub, images, tmp_path, waits, caplog):
    hub.faults.append(AnswerStatus(method="POST", path=r"/commit/", status=503, times=3))
    flags = ["--max_train_steps", 4, "--checkpointing_steps", 2, "--hub_strategy", "checkpoint"]
    run = train(images, tmp_path / "run", *DIGITS, *flags)
    assert any("failed, will be tried again" in message for message in caplog.messages)
    assert "model_index.json" in hub_files(hub)
    assert DTRPipeline.from_pretrained(run).transformer is not None


def test_push_that_is_refused_is_an_error_and_the_result_complete_on_disk(hub, images, tmp_path, waits):
    hub.faults.append(AnswerStatus(method="POST", path=r"/commit/", status=403, times=100))
    with pytest.raises(HfHubHTTPError, match="403"):
        train(images, tmp_path / "run", *DIGITS)
    assert DTRPipeline.from_pretrained(tmp_path / "run").transformer is not None
    assert (tmp_path / "run" / "README.md").exists()
