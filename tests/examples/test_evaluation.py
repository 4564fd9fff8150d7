"""Evaluation of pipelines: samples, features, metrics, held-out losses, and what the card is told."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
)
from evaluation_runs import SCRIPT, evaluate, evaluation_folder, flags, samples, tiny_unet, use_small_shards
from PIL import Image
from training_runs import EXAMPLES, finish, launch, load_script, make_images

from diffusers_dtr.model_card import build_model_card


pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
folder = pytest.fixture(evaluation_folder, scope="module")
small_shards = pytest.fixture(use_small_shards, autouse=True)


@pytest.mark.parametrize(
    ("pipeline", "condition", "more"),
    [
        ("labelled", "class_labels", ["--guidance_scale", 1.5, "--scheduler", "DDPMScheduler"]),
        ("unconditional", None, ["--scheduler", "EulerAncestralDiscreteScheduler"]),
        ("text", "prompt", ["--resolution", 16, "--guidance_scale", 2, "--dtype", "bfloat16"]),
    ],
)
def test_pipelines_of_every_kind_are_measured(folder, tmp_path, pipeline, condition, more):
    data = ["--validation_data_dir", folder / "held out"]
    if pipeline == "text":
        data = ["--train_data_dir", folder / "captioned", "--validation_data_dir", folder / "captioned"]
    argv = flags(folder, tmp_path / "out", *data, "--max_held_out_images", 8, *more, pipeline=pipeline)
    report = evaluate(argv)
    metrics, losses = report["metrics"], report["held_out_loss"]
    assert metrics["settings"]["samples"] == 10
    assert all(np.isfinite(metrics[name]) for name in ("frechet_distance", "kid", "precision", "recall"))
    assert 1 <= metrics["inception_score"] <= 3
    assert report["network"]["name"] == "colours.pt"
    assert str(tmp_path) not in json.dumps(report)
    for axis in ("per_cluster", "per_log_snr_bin"):
        assert len(losses[axis]) == 8
        assert all(part["loss"] > 0 for part in losses[axis])
    bins = [loss["loss"] for loss in losses["per_log_snr_bin"]]
    assert np.mean(bins) == pytest.approx(losses["mean"])
    labels = np.load(tmp_path / "out" / "samples" / "00000.npz").get("labels")
    assert (labels is None) == (condition != "class_labels")
    assert Image.open(tmp_path / "out" / "samples.png").size[0] > 0
    card = str(build_model_card(folder / pipeline)) if pipeline == "labelled" else ""
    entries = json.loads((folder / pipeline / "metrics.json").read_text())
    assert [entry["type"] for entry in entries] == ["fd", "inception_score", "precision", "recall", "kid", "mse"]
    assert all(entry["name"] in card for entry in entries) or pipeline != "labelled"


def test_dit_pipelines_of_diffusers_need_no_thousand_classes(folder, tmp_path):
    argv = flags(folder, tmp_path, "--scheduler", "EulerAncestralDiscreteScheduler", pipeline="dit")
    assert evaluate(argv)["settings"]["pipeline_class"] == "DTRPipeline"


def test_samples_do_not_depend_on_the_batch_size_or_on_what_was_there(folder, tmp_path):
    stochastic = ["--scheduler", "DDPMScheduler"]
    whole = evaluate(flags(folder, tmp_path / "whole", *stochastic))
    evaluate(flags(folder, tmp_path / "other", *stochastic, "--batch_size", 3))
    one, other = (samples(tmp_path / name).astype(int) for name in ("whole", "other"))
    assert abs(one - other).max() <= 1  # rounding
    shards = sorted((tmp_path / "whole" / "samples").iterdir())
    assert [path.name for path in shards] == ["00000.npz", "00001.npz", "00002.npz"]
    times = [path.stat().st_mtime_ns for path in shards]
    shards[1].unlink()
    again = evaluate(flags(folder, tmp_path / "whole", *stochastic))
    assert np.array_equal(samples(tmp_path / "whole"), one)
    assert again["metrics"] == whole["metrics"]
    assert [shards[number].stat().st_mtime_ns for number in (0, 2)] == [times[0], times[2]]


def test_defaults_are_those_of_the_pipeline_as_it_was_saved(folder, tmp_path):
    settings = evaluate(flags(folder, tmp_path / "dit", pipeline="dit"))["settings"]
    assert settings["guidance_scale"] == 4.0
    assert settings["num_inference_steps"] == 2


def test_a_finished_evaluation_gets_its_held_out_loss_later(folder, tmp_path):
    first = evaluate(flags(folder, tmp_path / "out"))
    held_out = ("--validation_data_dir", folder / "held out", "--max_held_out_images", 4)
    second = evaluate(flags(folder, tmp_path / "out", *held_out))
    assert second["held_out_loss"]["mean"] > 0
    assert second["metrics"] == first["metrics"]


def test_labels_are_balanced_or_in_the_proportions_of_the_data(folder, tmp_path):
    make_images(tmp_path / "images", count=10)
    for labels in ("balanced", "data"):
        argv = ["--train_data_dir", tmp_path / "images", "--labels", labels, "--save_npz"]
        evaluate(flags(folder, tmp_path / labels, *argv))
        found = np.load(tmp_path / labels / "samples.npz")["arr_1"]
        assert np.bincount(found).tolist() == [4, 3, 3]
        assert (found.tolist() == [number % 3 for number in range(10)]) == (labels == "balanced")


def test_saved_samples_and_statistics_give_the_same_figures(folder, tmp_path):
    statistics = ["--statistics", tmp_path / "statistics.npz"]
    first = evaluate(flags(folder, tmp_path / "first", "--save_npz", "--save_png", *statistics))
    data = np.load(tmp_path / "first" / "samples.npz")
    assert (data["arr_0"].dtype, data["arr_0"].shape) == (np.uint8, (10, 8, 8, 3))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "first" / "png" / "000007.png")), data["arr_0"][7])
    network = ["--feature_extractor", folder / "colours.pt", *statistics]
    for name in ("samples.npz", "png"):
        argv = ["--samples", tmp_path / "first" / name, "--output_dir", tmp_path / name, "--resolution", 8, *network]
        report = evaluate([str(flag) for flag in argv])
        assert report["metrics"] == first["metrics"]
        assert report["reference"] == first["reference"]
    again = evaluate(flags(folder, tmp_path / "first", "--save_npz", *statistics))
    assert again["metrics"] == first["metrics"]
    for other in (["--train_data_dir", folder / "held out"], ["--max_train_samples", 9]):
        with pytest.raises(ValueError, match=r"`--statistics` .* are of .*'images': 24, .* not of .*'images': 9"):
            evaluate(flags(folder, tmp_path / "new", *other, *statistics))
    assert not (tmp_path / "new").exists()
    npz = tmp_path / "first" / "samples.npz"
    argv = ["--samples", npz, "--reference", npz, *network[:2], "--output_dir", tmp_path / "itself"]
    itself = evaluate([str(flag) for flag in argv])["metrics"]
    assert itself["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (itself["precision"], itself["recall"]) == (1, 1)


def test_other_pipelines_are_called_as_they_are_and_flags_that_they_do_not_take_refused(folder, tmp_path):
    unet = tiny_unet(num_class_embeds=3)
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()).save_pretrained(tmp_path / "pipeline")
    argv = flags(folder, tmp_path / "out", pipeline=tmp_path / "pipeline")
    assert evaluate(argv)["settings"]["pipeline_class"] == "ConsistencyModelPipeline"
    assert np.load(tmp_path / "out" / "samples" / "00000.npz")["labels"].tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="ConsistencyModelPipeline takes no --guidance_scale"):
        evaluate([*argv, "--guidance_scale", "2"])


@pytest.mark.filterwarnings("ignore:.*mostly that of the few images")
def test_inception_is_run_end_to_end_from_a_file_of_weights(folder, tmp_path):
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3",
        reason="torch-fidelity or a torchvision of this torch is not installed",
        exc_type=(ImportError, RuntimeError),
    )

    class Untrained(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments, **options): ...

    torch.save({}, tmp_path / "none.pth")
    untrained = Untrained("inception-v3-compat", ["2048"], str(tmp_path / "none.pth"))
    torch.save(untrained.state_dict(), tmp_path / "weights.pth")
    weights = ["--feature_extractor", "inception", "--feature_weights", tmp_path / "weights.pth", "--num_samples", 4]
    report = evaluate(flags(folder, tmp_path / "out", "--max_train_samples", 4, *weights))
    assert report["network"]["name"] == "inception"
    assert (report["metrics"]["settings"]["features"], report["metrics"]["settings"]["samples"]) == (2048, 4)
    entries = json.loads((folder / "labelled" / "metrics.json").read_text())
    assert {"FID", "Inception score", "Precision", "Recall", "KID"} <= {entry["name"] for entry in entries}
    shard = next((tmp_path / "out" / "features").glob("*/00000.npz"))
    images = torch.from_numpy(samples(tmp_path / "out")).permute(0, 3, 1, 2)
    assert np.allclose(np.load(shard)["features"], untrained(images)[0], atol=1e-5)
    torch.save({"weights": Path("code")}, tmp_path / "weights.pth")
    with pytest.raises(pickle.UnpicklingError):
        evaluate(flags(folder, tmp_path / "new", *weights))


@pytest.mark.slow
def test_one_and_two_processes_draw_the_same_set(folder, tmp_path):
    """With whole shards, as users have them: one process draws both, or two one each."""
    reports = []
    for processes in (1, 2):
        argv = flags(folder, tmp_path / str(processes), "--num_samples", 300, "--batch_size", 64)
        argv += ["--validation_data_dir", str(folder / "held out"), "--scheduler", "DDPMScheduler"]
        finish(launch(argv, processes, SCRIPT))
        reports.append(json.loads((tmp_path / str(processes) / "evaluation.json").read_text()))
    assert [report["hardware"]["processes"] for report in reports] == [1, 2]
    assert np.array_equal(samples(tmp_path / "1"), samples(tmp_path / "2"))
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert reports[0]["held_out_loss"]["mean"] == pytest.approx(reports[1]["held_out_loss"]["mean"], rel=1e-6)


def test_zip_files_are_unpacked_into_the_cache_that_is_named(folder, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "data" / "images"), "zip", folder / "images")
    evaluate(
        flags(folder, tmp_path / "out", "--train_data_dir", Path(archive).parent, "--cache_dir", tmp_path / "cache")
    )
    assert [*(tmp_path / "cache").rglob("*.png")]


def test_two_evaluations_may_write_one_file_at_once(tmp_path, monkeypatch):
    script, path = load_script(EXAMPLES / "evaluation" / "evaluation_samples.py"), tmp_path / "settings.json"
    with script.written_whole(path) as partial:
        partial.write_text("1")
        with monkeypatch.context() as other_process:
            other_process.setattr("os.getpid", lambda: 0)
            script.write_json(path, 2)
            assert script.read_json(path) == 2
    assert script.read_json(path) == 1
    assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(OSError, match="full"), script.written_whole(path) as partial:
        raise OSError("the disk is full")
    assert script.read_json(path) == 1
