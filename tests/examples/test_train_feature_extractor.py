"""The classifier that gives features without a download."""

import pytest
from evaluation_runs import evaluate, evaluation_folder, flags, use_small_shards
from training_runs import EXAMPLES, load_script, make_images


pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
folder = pytest.fixture(evaluation_folder, scope="module")
small_shards = pytest.fixture(use_small_shards, autouse=True)


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
