import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from training_runs import EXAMPLES, MODEL, SCRIPT, arguments, load_script, run_main

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel


DIGITS = EXAMPLES / "digits"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    script = load_script(DIGITS / "prepare_digits.py")
    folder = tmp_path_factory.mktemp("digits") / "digits"
    script.main(script.parse_args(["--output_dir", str(folder)]))
    return folder


def train_on_digits(digits: Path, output_dir: Path, *flags: object) -> Path:
    held_out = ["--validation_data_dir", digits / "test"]
    return run_main(load_script(SCRIPT), arguments(digits / "train", output_dir, *held_out, *flags))


def evaluate(pipeline: Path, digits: Path, samples: Path, capsys) -> dict:
    script = load_script(DIGITS / "evaluate_digits.py")
    argv = ["--pipeline", pipeline, "--digits_dir", digits, "--samples", samples]
    few = ["--num_per_digit", 2, "--num_inference_steps", 2]
    script.main(script.parse_args([str(value) for value in [*argv, *few]]))
    return json.loads(capsys.readouterr().out)


def test_every_scan_is_written_once_with_its_digit(digits):
    scans = load_digits()
    paths = list(digits.glob("*/*/*.png"))
    assert sorted(int(path.stem) for path in paths) == list(range(1797))
    for path in paths:
        index = int(path.stem)
        assert int(path.parent.name) == scans.target[index]
        assert np.array_equal(np.round(np.asarray(Image.open(path)) * (16 / 255)), scans.images[index])


def test_every_digit_is_held_out_in_its_share(digits):
    for digit in range(10):
        counts = [len(list((digits / split / str(digit)).iterdir())) for split in ("train", "test")]
        assert counts[1] / sum(counts) == pytest.approx(0.2, abs=0.005)


def test_split_is_the_same_every_time(digits, tmp_path):
    script = load_script(DIGITS / "prepare_digits.py")
    script.main(script.parse_args(["--output_dir", str(tmp_path)]))
    one, other = ({path.name for path in folder.glob("test/*/*")} for folder in (digits, tmp_path))
    assert one == other


def test_evaluation_draws_all_digits_and_reports_loss_and_readability(digits, tmp_path, capsys):
    run = train_on_digits(digits, tmp_path / "run")
    capsys.readouterr()
    report = evaluate(run, digits, tmp_path / "samples.png", capsys)
    assert Image.open(tmp_path / "samples.png").size == (28 + 2 * 54, 10 * 54)
    assert len(report["held_out_denoising_loss_per_eighth_of_timesteps"]) == 8
    assert report["classifier_accuracy_on_held_out_digits"] > 0.98
    assert 0 <= report["share_of_samples_read_as_asked"] <= 1


def test_evaluation_leaves_its_figures_for_the_card_of_the_pipeline(digits, tmp_path, capsys):
    run = train_on_digits(digits, tmp_path / "run")
    capsys.readouterr()
    report = evaluate(run, digits, tmp_path / "samples.png", capsys)
    accuracy, loss = json.loads((run / "metrics.json").read_text())
    assert accuracy["value"] == report["share_of_samples_read_as_asked"]
    assert accuracy["settings"]["samples"] == 20
    assert accuracy["settings"]["num_inference_steps"] == 2
    assert loss["value"] == report["held_out_denoising_loss"]
    assert loss["settings"]["images"] == 360
    assert str(tmp_path) not in (run / "metrics.json").read_text()


def test_real_digits_would_be_read_as_asked(digits, tmp_path, capsys, monkeypatch):
    """With a sampler that returns held-out scans, the share is the classifier's accuracy on real digits."""
    run = train_on_digits(digits, tmp_path / "run")
    scans = load_digits()

    def real(pipeline, class_labels, **options):
        held_out = {int(path.stem) for path in digits.glob("test/*/*.png")}
        chosen = [
            next(i for i in sorted(held_out) if scans.target[i] == label and not held_out.discard(i))
            for label in class_labels.tolist()
        ]
        return type("Output", (), {"images": scans.images[chosen][..., None] / 16})

    monkeypatch.setattr(DTRPipeline, "__call__", real)
    capsys.readouterr()
    assert evaluate(run, digits, tmp_path / "samples.png", capsys)["share_of_samples_read_as_asked"] >= 0.9


def test_config_of_the_demo_is_a_model():
    config = json.loads((DIGITS / "model_config.json").read_text())
    assert DTRTransformer2DModel(**config, sample_size=8, num_embeds_ada_norm=10).num_parameters() < 2_000_000


@pytest.mark.slow
def test_loss_falls_in_every_eighth_of_the_timesteps_within_200_steps(digits, tmp_path):
    model = {**MODEL, "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16, "norm_eps": 1e-6}
    flags = ["--train_batch_size", 64, "--learning_rate", 2e-3, "--use_ema", "--ema_max_decay", 0.95]
    common = ["--model_config", model, *flags, "--max_train_steps"]
    torch.manual_seed(0)
    losses = {}
    for steps in (1, 200):
        run = train_on_digits(digits, tmp_path / str(steps), *common, steps)
        results = json.loads((run / "training_config.json").read_text())["results"]
        losses[steps] = [results[f"validation_loss/eighth_{number}"] for number in range(8)]
    assert all(after < before for before, after in zip(losses[1], losses[200], strict=True)), losses
