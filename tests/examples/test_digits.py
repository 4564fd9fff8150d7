import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from training_runs import EXAMPLES, MODEL, SCRIPT, arguments, load_script, record, run_main

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel


DIGITS = EXAMPLES / "digits"


def prepare(folder: Path) -> Path:
    script = load_script(DIGITS / "prepare_digits.py")
    script.main(script.parse_args(["--output_dir", str(folder)]))
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("digits") / "digits")


def train_on_digits(digits: Path, output_dir: Path, *flags: object) -> Path:
    held_out = ["--validation_data_dir", digits / "test"]
    return run_main(load_script(SCRIPT), arguments(digits / "train", output_dir, *held_out, *flags))


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> Path:
    return train_on_digits(digits, tmp_path_factory.mktemp("run") / "run")


def evaluate(pipeline: Path, digits: Path, samples: Path, capsys) -> dict:
    capsys.readouterr()
    script = load_script(DIGITS / "evaluate_digits.py")
    argv = ["--pipeline", pipeline, "--digits_dir", digits, "--samples", samples]
    few = ["--num_per_digit", 2, "--num_inference_steps", 2]
    script.main(script.parse_args([str(value) for value in [*argv, *few]]))
    return json.loads(capsys.readouterr().out)


def test_every_scan_is_written_once_with_its_digit_and_split_the_same_every_time(digits, tmp_path):
    scans, paths = load_digits(), list(digits.glob("*/*/*.png"))
    assert sorted(int(path.stem) for path in paths) == list(range(1797))
    for path in paths:
        index = int(path.stem)
        assert int(path.parent.name) == scans.target[index]
        assert np.array_equal(np.round(np.asarray(Image.open(path)) * (16 / 255)), scans.images[index])
    for digit in range(10):
        counts = [len(list((digits / split / str(digit)).iterdir())) for split in ("train", "test")]
        assert counts[1] / sum(counts) == pytest.approx(0.2, abs=0.005)
    one, other = ({path.name for path in folder.glob("test/*/*")} for folder in (digits, prepare(tmp_path)))
    assert one == other


def test_evaluation_draws_all_digits_and_leaves_its_figures_for_the_card(run, digits, tmp_path, capsys):
    report = evaluate(run, digits, tmp_path / "samples.png", capsys)
    assert Image.open(tmp_path / "samples.png").size == (28 + 2 * 54, 10 * 54)
    assert len(report["held_out_denoising_loss_per_eighth_of_timesteps"]) == 8
    assert report["classifier_accuracy_on_held_out_digits"] > 0.98
    accuracy, loss = json.loads((run / "metrics.json").read_text())
    assert accuracy["value"] == report["share_of_samples_read_as_asked"]
    assert (accuracy["settings"]["samples"], accuracy["settings"]["num_inference_steps"]) == (20, 2)
    assert loss["value"] == report["held_out_denoising_loss"]
    assert loss["settings"]["images"] == 360
    assert str(tmp_path) not in (run / "metrics.json").read_text()


def test_real_digits_would_be_read_as_asked(run, digits, tmp_path, capsys, monkeypatch):
    """With a sampler that returns held-out scans, the share is the classifier's accuracy on real digits."""
    scans = load_digits()

    def real(pipeline, class_labels, **options):
        held_out = {label: sorted((digits / "test" / str(label)).iterdir()) for label in range(10)}
        chosen = [int(held_out[label].pop().stem) for label in class_labels.tolist()]
        return type("Output", (), {"images": scans.images[chosen][..., None] / 16})

    monkeypatch.setattr(DTRPipeline, "__call__", real)
    assert evaluate(run, digits, tmp_path / "samples.png", capsys)["share_of_samples_read_as_asked"] >= 0.9


def test_config_of_the_demo_is_a_model():
    config = json.loads((DIGITS / "model_config.json").read_text())
    assert DTRTransformer2DModel(**config, sample_size=8, num_embeds_ada_norm=10).num_parameters() < 2_000_000


@pytest.mark.slow
def test_loss_falls_in_every_eighth_of_the_timesteps_within_200_steps(digits, tmp_path):
    model = {**MODEL, "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16, "norm_eps": 1e-6}
    flags = ["--train_batch_size", 64, "--learning_rate", 2e-3, "--use_ema", "--ema_max_decay", 0.95]
    torch.manual_seed(0)
    losses = []
    for steps in (1, 200):
        run = train_on_digits(
            digits, tmp_path / str(steps), "--model_config", model, *flags, "--max_train_steps", steps
        )
        losses.append([record(run)["results"][f"validation_loss/eighth_{number}"] for number in range(8)])
    assert all(after < before for before, after in zip(*losses, strict=True)), losses
