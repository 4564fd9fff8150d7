import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from run_config import run_config
from test_images import noise_image
from tiny_autoencoders import tiny_vae
from tiny_dit import routed_dit

from diffusers_dtr.training import TrainingConfig, load_data, load_images
from diffusers_dtr.training.config import TextConfig
from diffusers_dtr.training.data.loading import build_loader, clean_samples, held_out_dataset, held_out_samples


CPU = torch.device("cpu")
# A denoiser and an autoencoder of grey images
GREY = routed_dit(in_channels=1, out_channels=1)
VAE = tiny_vae(in_channels=1, out_channels=1)


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(10):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(12, 8, number).convert("L").save(path)
    return tmp_path / "images"


def config_of(folder: Path, **options) -> TrainingConfig:
    """Of labelled images without captions."""
    folders = {name: str(folder.parent / name.split("_")[0]) for name in ("cache_dir", "output_dir")}
    fixed = {"train_data_dir": str(folder), **folders, "resolution": 8, "seed": 3, "train_batch_size": 4}
    return replace(run_config(**{**fixed, **options}), text=None)


def batches(config: TrainingConfig, count: int, *, step: int = 0, vae=None) -> list[dict]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    dataset = load_data(config, model=GREY, vae=vae).dataset
    return list(islice(build_loader(config, dataset, accelerator, step), count))


def held_out(folder: Path, validation: Path | None = None, *, images=None, vae=None, **options):
    config = config_of(folder, validation_data_dir=str(validation or folder), **options)
    dataset = held_out_dataset(config, images or load_images(config), 1)
    return held_out_samples(dataset, vae, config.validation.max_held_out_images, config.run.train_batch_size, CPU)


def test_loader_begins_at_the_batch_of_the_step(folder):
    config = config_of(folder)
    for one, other in zip(batches(config, 6)[4:], batches(config, 2, step=2), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_reading_images_leaves_the_global_random_state_alone(folder):
    state = torch.get_rng_state()
    batches(config_of(folder, random_flip=True), 3)
    held_out(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_learned_are_pixels_or_latents_cached_or_not(folder):
    config = config_of(folder, center_crop=True, random_flip=True, vae_name_or_path="vae")
    fresh, cached = batches(config, 4), batches(config.replace(cache_latents=True), 4, vae=VAE)
    assert torch.equal(clean_samples(fresh[0], None, 3, CPU), fresh[0]["pixel_values"])
    for pair in zip(fresh, cached, strict=True):
        latents = [clean_samples(batch, VAE, 3, CPU) for batch in pair]
        torch.testing.assert_close(*latents, rtol=0, atol=1e-5)
        assert torch.equal(*(batch["labels"] for batch in pair))


def test_latents_without_an_autoencoder_cannot_be_cached(folder):
    pixels = {"pretrained_model_name_or_path": "owner/pixels", "center_crop": True, "cache_latents": True}
    with pytest.raises(ValueError, match="`--cache_latents` needs an autoencoder"):
        batches(config_of(folder, **pixels), 1)


@pytest.mark.parametrize("held_out_too", [False, True])
def test_images_are_resized_as_the_flag_says(held_out_too, folder):
    results = set()
    for mode in ("nearest", "bilinear", "lanczos"):
        options = {"resolution": 4, "center_crop": True, "image_interpolation_mode": mode}
        data = load_data(config_of(folder, validation_data_dir=str(folder), **options), model=GREY)
        dataset = data.held_out if held_out_too else data.dataset
        results.add(dataset[0, 0]["pixel_values"].numpy().tobytes())
    assert len(results) == 3


def test_so_many_samples_are_drawn_with_the_seed_and_keep_their_classes(folder):
    def drawn(**options) -> list[str]:
        images = load_images(config_of(folder, **options))
        assert images.id2label == {0: "a", 1: "b"}
        names = [Path(row["image"]["path"]) for row in images.dataset]
        assert [path.parent.name for path in names] == [images.id2label[label] for label in images.labels.tolist()]
        return [path.name for path in names]

    every = drawn()
    some, other = drawn(max_train_samples=5), drawn(max_train_samples=5, seed=4)
    assert len(some) == len(other) == 5
    assert set(some) < set(every)
    assert some == drawn(max_train_samples=5) != other
    assert drawn(max_train_samples=99) == every


def test_captions_are_those_of_the_samples_that_are_drawn(folder):
    lines = [json.dumps({"file_name": f"{name}/{n}.png", "text": f"{n}"}) for n in range(10) for name in ["ab"[n % 2]]]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    config = config_of(folder, max_train_samples=4, label_column=None)
    images = load_images(replace(config, text=TextConfig()))
    paths = [Path(row["image"]["path"]) for row in images.dataset]
    assert [[path.stem] for path in paths] == [images.captions[row] for row in range(4)]


# ---- held-out images


def test_without_validation_data_there_are_no_held_out_images(folder):
    config = config_of(folder)
    assert held_out_dataset(config, load_images(config), 1) is None


@pytest.mark.parametrize("vae", [None, VAE])
def test_every_held_out_image_is_there_once_whatever_the_seed_and_the_augmentation(vae, folder):
    samples, batch = held_out(folder, vae=vae)
    assert samples.shape == ((10, 1, 8, 8) if vae is None else (10, 4, 4, 4))
    assert len(samples.flatten(1).unique(dim=0)) == 10
    assert batch["labels"].bincount().tolist() == [5, 5]
    limited, other = held_out(folder, random_flip=True, seed=9, vae=vae, max_held_out_images=6)
    assert torch.equal(limited, samples[:6])
    assert torch.equal(other["labels"], batch["labels"][:6])


def test_unlabelled_training_needs_no_held_out_labels(folder):
    images = load_images(config_of(folder, label_column=None))
    assert "labels" not in held_out(folder, images=images)[1]


def test_held_out_images_are_of_the_classes_of_the_training_images(folder, tmp_path):
    for name in "bc":
        (tmp_path / "validation" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "validation" / name / "0.png")
        if name == "b":  # numbered in their order, and without class a, the folder of b would be taken for a's
            _, batch = held_out(folder, tmp_path / "validation")
            assert batch["labels"].tolist() == [1]
    with pytest.raises(ValueError, match=r"must be among a, b, got c\."):
        held_out(folder, tmp_path / "validation")
