"""What an evaluation refuses, and when it tells other samples, data and networks from those that it has."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
)
from evaluation_runs import Colours, evaluate, evaluation_folder, flags, use_small_shards
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_dtr import DTRTransformer2DModel


pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
folder = pytest.fixture(evaluation_folder, scope="module")
small_shards = pytest.fixture(use_small_shards, autouse=True)


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
