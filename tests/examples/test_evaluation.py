"""Evaluation of pipelines: samples, features, metrics, held-out losses, and what the card is told."""

import json
import math
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from text_to_image_runs import FAMILIES, make_captioned_images
from tiny_autoencoders import tiny_vae
from tiny_dit import plain_dit, with_random_weights
from torch import nn
from training_runs import EXAMPLES, NUM_CLASSES, finish, launch, load_script, make_images, run_main

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.model_card import build_model_card


pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
SCRIPT = EXAMPLES / "evaluation" / "evaluate.py"


class Colours(nn.Module):
    """A network of six features and three logits."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.float().flatten(2) / 255
        features = torch.cat([pixels.mean(2), pixels.std(2)], 1)
        return features, 5 * features[:, :3]


def tiny_unet(**config) -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    unet = UNet2DModel(8, **blocks, layers_per_block=1, norm_num_groups=2, add_attention=False, **config)
    return with_random_weights(unet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, a network and pipelines, which tests leave as they are."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_images(folder / "images")
    make_images(folder / "held out", count=9)
    make_captioned_images(folder / "captioned")
    torch.jit.script(Colours()).save(folder / "colours.pt")
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "patch_size": 4}
    dit = with_random_weights(DTRTransformer2DModel(**config, sample_size=8, num_embeds_ada_norm=NUM_CLASSES))
    names = dict(enumerate("abc"))
    DTRPipeline(DDIMScheduler(), transformer=dit, id2label=names).save_pretrained(folder / "labelled")
    DiTPipeline(plain_dit(), tiny_vae(), DDIMScheduler()).save_pretrained(folder / "dit")
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder / "unconditional")
    FAMILIES["sd"].save_plain(folder / "text")
    return folder


def flags(folder: Path, output_dir: Path, *more: object, pipeline: str = "labelled") -> list[str]:
    data = ["--train_data_dir", folder / "images", "--cache_dir", folder / "cache"]
    few = ["--num_samples", 10, "--num_inference_steps", 2, "--batch_size", 4]
    network = ["--feature_extractor", folder / "colours.pt", "--output_dir", output_dir]
    return [str(flag) for flag in ["--pipeline", folder / pipeline, *data, *few, *network, *more]]


def evaluate(argv: list[str]) -> dict:
    output_dir = run_main(load_script(SCRIPT), argv)
    return json.loads((output_dir / "evaluation.json").read_text())


@pytest.fixture(autouse=True)
def small_shards(monkeypatch) -> None:
    load_script(SCRIPT)
    monkeypatch.setattr(sys.modules["evaluation_samples"], "SHARD", 4)


def samples(output_dir: Path) -> np.ndarray:
    return np.concatenate([np.load(path)["images"] for path in sorted((output_dir / "samples").iterdir())])


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


def test_folder_of_other_settings_or_weights_is_refused(folder, tmp_path):
    evaluate(flags(folder, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"other settings \(num_inference_steps, seed\)"):
        evaluate(flags(folder, tmp_path / "out", "--seed", 1, "--num_inference_steps", 3))
    with pytest.raises(ValueError, match=r"other settings .*models_hash"):
        evaluate(flags(folder, tmp_path / "out", pipeline="unconditional"))


def nan_in(pipeline: Path, target: Path, part: str) -> Path:
    """A copy of a pipeline whose weights of one name are not finite."""
    shutil.copytree(pipeline, target, ignore=shutil.ignore_patterns("metrics.json"))
    (file,) = (target / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: value * math.nan if part in name else value for name, value in tensors.items()}, file)
    return target


def test_what_is_not_finite_is_not_measured(folder, tmp_path, monkeypatch):
    broken = nan_in(folder / "labelled", tmp_path / "nan", "proj_out")
    with pytest.raises(FloatingPointError, match="DTRPipeline draws images that are not finite"):
        evaluate(flags(folder, tmp_path / "out", pipeline=str(broken)))
    assert not (tmp_path / "out").exists()
    assert not (broken / "metrics.json").exists()

    class Divided(Colours):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean([2, 3]) / 0

    torch.jit.script(Divided()).save(tmp_path / "divided.pt")
    with pytest.raises(ValueError, match=r"divided.pt must give finite features \(n, d\), got \(4, 3\), of which 12"):
        evaluate(flags(folder, tmp_path / "divided", "--feature_extractor", tmp_path / "divided.pt"))

    forward = DTRTransformer2DModel.forward

    def late(self, noisy, timestep, **kwargs):
        broken = torch.where(timestep > 900, math.nan, 1.0).reshape(-1, 1, 1, 1)
        return (forward(self, noisy, timestep, **kwargs)[0] * broken,)

    monkeypatch.setattr(DTRTransformer2DModel, "forward", late)  # two steps of DDIM come to no such timestep
    with pytest.raises(FloatingPointError, match="held-out loss is not finite"):
        evaluate(flags(folder, tmp_path / "late", "--validation_data_dir", folder / "held out"))


def test_changed_data_are_measured_anew_and_changed_samples_refused(folder, tmp_path):
    shutil.copytree(folder / "images", tmp_path / "images")
    data = ("--train_data_dir", tmp_path / "images")
    evaluate(flags(folder, tmp_path / "out", *data))
    extra = next((tmp_path / "images").rglob("*.png"))
    Image.new("RGB", (8, 8), "magenta").save(extra.with_name("another.png"))
    again, fresh = (evaluate(flags(folder, tmp_path / name, *data))["metrics"] for name in ("out", "fresh"))
    assert again == fresh
    given = ["--samples", tmp_path / "images", "--resolution", 8, *data, "--output_dir", tmp_path / "given"]
    given = [str(flag) for flag in [*given, "--feature_extractor", folder / "colours.pt"]]
    evaluate(given)
    Image.new("RGB", (8, 8), "cyan").save(extra)
    with pytest.raises(ValueError, match=r"other settings \(samples_key\)"):
        evaluate(given)


@pytest.mark.parametrize(
    ("pipeline", "change"),
    [
        ("labelled", lambda pipeline: pipeline.transformer.register_to_config(routing_type="none")),
        ("dit", lambda pipeline: pipeline.vae.decoder.conv_out.weight.data.mul_(3)),
    ],
)
def test_a_pipeline_with_other_settings_or_parts_is_another_one(folder, tmp_path, pipeline, change):
    evaluate(flags(folder, tmp_path / "out", pipeline=pipeline))
    other = DiffusionPipeline.from_pretrained(folder / pipeline)
    change(other)
    other.save_pretrained(tmp_path / pipeline)
    with pytest.raises(ValueError, match=r"other settings \(models_hash, pipeline\)"):
        evaluate(flags(folder, tmp_path / "out", pipeline=str(tmp_path / pipeline)))


def test_statistics_of_other_images_are_refused_though_name_and_number_are_the_same(folder, tmp_path):
    for name in ("one", "other"):
        shutil.copytree(folder / "images", tmp_path / name / "images")
    for path in (tmp_path / "other" / "images").rglob("*.png"):
        Image.new("RGB", (8, 8), "magenta").save(path)
    statistics = ("--statistics", tmp_path / "statistics.npz")
    evaluate(flags(folder, tmp_path / "out", "--train_data_dir", tmp_path / "one" / "images", *statistics))
    with pytest.raises(ValueError, match=r"`--statistics` .* are of .*'some_sha256'"):
        evaluate(flags(folder, tmp_path / "new", "--train_data_dir", tmp_path / "other" / "images", *statistics))


def test_what_cannot_be_drawn_or_compared_is_told_before_a_folder_is_begun(folder, tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    for pipeline, more, message in (
        ("unconditional", ["--guidance_scale", 2], "guidance"),
        ("labelled", ["--reference", tmp_path / "large.npz"], "images of 16 pixels a side, the samples of 8"),
        ("labelled", ["--reference", tmp_path / "few.npz"], "At least 4 samples and images are needed, got 3"),
        ("labelled", ["--max_train_samples", 3], "At least 4 samples and images are needed, got 3"),
        ("labelled", ["--validation_data_dir", folder / "held out", "--num_clusters", 2000], r"in \[1, 1000\]"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(flags(folder, tmp_path / "out", *more, pipeline=pipeline))
        assert not (tmp_path / "out").exists()
    evaluate(flags(folder, tmp_path / "out", pipeline="unconditional"))


def test_defaults_are_those_of_the_pipeline_as_it_was_saved(folder, tmp_path):
    settings = evaluate(flags(folder, tmp_path / "dit", pipeline="dit"))["settings"]
    assert settings["guidance_scale"] == 4.0
    assert settings["num_inference_steps"] == 2


@pytest.mark.parametrize("damaged", ["settings.json", "samples/00000.npz", "features/*/00000.npz", "statistics.npz"])
def test_a_damaged_file_is_named(folder, tmp_path, damaged):
    argv = flags(folder, tmp_path, "--statistics", tmp_path / "statistics.npz")
    evaluate(argv)
    (file,) = tmp_path.glob(damaged)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{file.name}' must be a whole .*: remove it"):
        evaluate(argv)
    file.unlink()
    evaluate(argv)


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


def test_networks_are_never_mixed(folder, tmp_path):
    evaluate(flags(folder, tmp_path / "out", "--statistics", tmp_path / "statistics.npz"))

    class Others(Colours):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean([2, 3])

    torch.jit.script(Others()).save(tmp_path / "others.pt")
    other = ["--feature_extractor", tmp_path / "others.pt"]
    with pytest.raises(ValueError, match=r"of the network colours.pt .*features of others.pt"):
        evaluate(flags(folder, tmp_path / "new", "--statistics", tmp_path / "statistics.npz", *other))
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(ValueError, match="do not say of which network"):
        evaluate(flags(folder, tmp_path / "new", "--statistics", tmp_path / "foreign.npz"))
    assert not (tmp_path / "new").exists()
    # Two networks in one folder, on the same samples
    first = (tmp_path / "out" / "evaluation.json").read_text()
    assert evaluate(flags(folder, tmp_path / "out", *other))["metrics"]["inception_score"] is None
    (kept,) = (tmp_path / "out").glob("evaluation-*.json")
    assert kept.read_text() == first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "x.npz"], "Exactly one of --pipeline and --samples"),
        (["--dataset_name", "x"], "At most one of --dataset_name and --train_data_dir"),
        (["--scheduler", "NoScheduler"], "must be a scheduler of diffusers, such as DDIMScheduler, got 'NoScheduler'"),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "what it is, epsilon, got FlowMatchEuler.*flow"),
        (["--scheduler", "EDMEulerScheduler"], "output for what it is, epsilon, got EDMEulerScheduler.* for edm"),
        (["--feature_weights", "x.pt"], "`--feature_weights` are those of `--feature_extractor inception`"),
        (["--feature_extractor", __file__], "is a file, but no TorchScript"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(folder, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        evaluate(flags(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_flags_of_drawing_are_refused_for_samples_that_are_there(folder, tmp_path):
    argv = ["--samples", folder / "images", "--reference", "x.npz", "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="not drawn: leave --guidance_scale, --save_png out"):
        evaluate([*map(str, [*argv, "--guidance_scale", 2, "--save_png"])])
    assert not (tmp_path / "out").exists()


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


def test_classifier_learns_tells_its_accuracy_and_is_a_network(folder, tmp_path):
    script = load_script(EXAMPLES / "evaluation" / "train_feature_extractor.py")
    make_images(tmp_path / "images", count=90)
    data = ["--train_data_dir", tmp_path / "images", "--validation_data_dir", folder / "held out"]
    size = ["--resolution", 8, "--width", 4, "--num_train_epochs", 20, "--batch_size", 16, "--learning_rate", 0.05]
    argv = [*data, *size, "--cache_dir", folder / "cache", "--output", tmp_path / "network.pt"]
    script.main(script.parse_args([str(flag) for flag in argv]))
    report = evaluate(flags(folder, tmp_path / "out", "--feature_extractor", tmp_path / "network.pt"))
    assert report["network"]["accuracy"] >= 8 / 9
    assert report["metrics"]["settings"]["features"] == 16
    assert 1 <= report["metrics"]["inception_score"] <= 3
    with pytest.raises(ValueError, match=r"`--output` must be a new file, got .*network.pt"):
        script.main(script.parse_args([str(flag) for flag in argv]))


def test_classifier_takes_a_last_image_alone_and_refuses_to_diverge(folder, tmp_path):
    script = load_script(EXAMPLES / "evaluation" / "train_feature_extractor.py")
    make_images(tmp_path / "images", count=17)
    data = ["--train_data_dir", tmp_path / "images", "--validation_data_dir", folder / "held out", "--resolution", 8]
    argv = [str(flag) for flag in [*data, "--width", 4, "--num_train_epochs", 2, "--batch_size", 16, "--output"]]
    script.main(script.parse_args([*argv, str(tmp_path / "network.pt")]))
    with pytest.raises(FloatingPointError, match="The loss is nan in epoch 2: lower `--learning_rate`"):
        script.main(script.parse_args([*argv, str(tmp_path / "other.pt"), "--learning_rate", "1e18"]))
    assert not (tmp_path / "other.pt").exists()


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
