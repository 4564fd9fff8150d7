"""The digits of the text-to-image README: prepared and trained on for a step."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from text_to_image_runs import every_family, train
from training_runs import EXAMPLES, load_script


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A few images where prepare_digits.py puts all of them."""
    folder = tmp_path_factory.mktemp("digits")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True)
            pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / str(digit) / f"{digit}.png")
    return folder


def prepare(digits: Path, name: str, folder: Path) -> Path:
    script = load_script(EXAMPLES / "digits" / "prepare_text_to_image.py")
    flags = ["--digits_dir", digits, "--family", name, "--output_dir", folder, "--vae_steps", 2]
    script.main(script.parse_args(list(map(str, flags))))
    return folder


@every_family
def test_prepared_pipeline_trains_on_the_prepared_captions(name, digits, tmp_path):
    data = prepare(digits, name, tmp_path / "data")
    flags = ["--resolution", 16, "--max_train_steps", 1, "--validation_data_dir", data / "test"]
    train(name, data / "train", tmp_path / "run", data / "pipeline", *flags)
    trained = DiffusionPipeline.from_pretrained(tmp_path / "run")
    options = {"use_resolution_binning": False} if name == "pixart" else {}
    image = trained("a handwritten seven", num_inference_steps=2, output_type="np", **options).images[0]
    assert image.shape == (16, 16, 1)
    lines = [json.loads(line) for line in (data / "train" / "metadata.jsonl").read_text().splitlines()]
    assert {line["text"][0] for line in lines} == {f"a handwritten {digit}" for digit in NAMES}
    pipeline = DiffusionPipeline.from_pretrained(data / "pipeline")
    tokenizers = [part for part_name, part in pipeline.components.items() if part_name.startswith("tokenizer")]
    for tokenizer in tokenizers:
        tokens = [tuple(tokenizer(f"a handwritten {digit}")["input_ids"]) for digit in NAMES]
        assert len(set(tokens)) == 10
        assert max(map(len, tokens)) <= 8  # what the README's commands leave room for
