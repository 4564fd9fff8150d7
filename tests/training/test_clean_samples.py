import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from run_config import run_config
from tiny_dit import routed_dit

from diffusers_dtr.training import TrainingConfig, load_data, load_images
from diffusers_dtr.training.config import TextConfig
from diffusers_dtr.training.data.loading import (
    build_loader,
    clean_samples,
    held_out_dataset,
    held_out_samples,
)
from diffusers_dtr.training.data.training_images import TrainingImages


CPU = torch.device("cpu")
# A denoiser of grey images
GREY = routed_dit(in_channels=1, out_channels=1)


@pytest.fixture
def folder(tmp_path) -> Path:
    random = np.random.default_rng(0)
    for number in range(10):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 12), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def config_of(folder: Path, **options) -> TrainingConfig:
    """Of labelled images without captions."""
    folders = {name: str(folder.parent / name.split("_")[0]) for name in ("cache_dir", "output_dir")}
    fixed = {"train_data_dir": str(folder), **folders, "resolution": 8, "seed": 3, "train_batch_size": 4}
    return replace(run_config(**{**fixed, **options}), text=None)


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2).eval()


def batches(config: TrainingConfig, count: int, *, step: int = 0, accumulation: int = 1, vae=None) -> list[dict]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    dataset = load_data(config, model=GREY, vae=vae).dataset
    return list(islice(build_loader(config, dataset, accelerator, step), count))


def test_loader_begins_at_the_batch_of_the_step(folder):
    config = config_of(folder)
    whole, rest = batches(config, 6, accumulation=2), batches(config, 2, step=2, accumulation=2)
    for one, other in zip(whole[4:], rest, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_making_batches_leaves_the_global_random_state_alone(folder):
    state = torch.get_rng_state()
    batches(config_of(folder, random_flip=True), 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_pixels_of_a_batch_are_what_is_learned(folder):
    (batch,) = batches(config_of(folder), 1)
    clean = clean_samples(batch, None, 3, CPU)
    assert clean.shape == (4, 1, 8, 8)
    assert torch.equal(clean, batch["pixel_values"])


def test_cached_latents_are_the_encoded_pixels(folder):
    vae = tiny_vae()
    config = config_of(folder, center_crop=True, random_flip=True, vae_name_or_path="vae")
    fresh = batches(config, 4)
    for batch, cached in zip(fresh, batches(config.replace(cache_latents=True), 4, vae=vae), strict=True):
        latents = [clean_samples(samples, vae, 3, CPU) for samples in (batch, cached)]
        torch.testing.assert_close(*latents, rtol=0, atol=1e-5)
        assert torch.equal(cached["labels"], batch["labels"])


def test_latents_without_an_autoencoder_cannot_be_cached(folder):
    pixels = {"pretrained_model_name_or_path": "owner/pixels", "center_crop": True, "cache_latents": True}
    with pytest.raises(ValueError, match="`--cache_latents` needs an autoencoder"):
        batches(config_of(folder, **pixels), 1)


def held_out(
    folder: Path, validation: Path | None = None, *, images: TrainingImages | None = None, vae=None, **options
):
    config = config_of(folder, validation_data_dir=str(validation or folder), **options)
    dataset = held_out_dataset(config, images or load_images(config), 1)
    return held_out_samples(dataset, vae, config.validation.max_held_out_images, config.run.train_batch_size, CPU)


def test_without_validation_data_there_are_no_held_out_images(folder):
    config = config_of(folder)
    assert held_out_dataset(config, load_images(config), 1) is None


@pytest.mark.parametrize("latents", [False, True])
def test_held_out_samples_do_not_depend_on_the_seed_or_the_augmentation(latents, folder):
    vae = tiny_vae() if latents else None
    plain = held_out(folder, vae=vae)
    other = held_out(folder, random_flip=True, seed=9, vae=vae)
    assert plain[0].shape == (10, 4 if latents else 1, 8, 8)
    assert plain[1]["labels"].bincount().tolist() == [5, 5]
    assert torch.equal(plain[0], other[0])
    assert torch.equal(plain[1]["labels"], other[1]["labels"])


def test_reading_held_out_images_leaves_the_global_random_state_alone(folder):
    state = torch.get_rng_state()
    held_out(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_held_out_image_is_there_once_up_to_the_limit(folder):
    samples, _ = held_out(folder)
    assert len(samples.flatten(1).unique(dim=0)) == 10
    limited, batch = held_out(folder, max_held_out_images=6)
    assert torch.equal(limited, samples[:6])
    assert len(batch["labels"]) == 6


def test_unlabelled_training_needs_no_held_out_labels(folder):
    images = load_images(config_of(folder, label_column=None))
    assert "labels" not in held_out(folder, images=images)[1]


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


@pytest.mark.parametrize("held_out_too", [False, True])
def test_images_are_resized_as_the_flag_says(held_out_too, folder):
    modes = ("nearest", "bilinear", "lanczos")
    results = []
    for mode in modes:
        options = {"resolution": 4, "center_crop": True, "image_interpolation_mode": mode}
        data = load_data(config_of(folder, validation_data_dir=str(folder), **options), model=GREY)
        dataset = data.held_out if held_out_too else data.dataset
        results.append(dataset[0, 0]["pixel_values"])
    assert not any(torch.equal(results[one], results[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def put_images(folder: Path, names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / name / "0.png")
    return folder


def test_held_out_images_have_the_labels_that_the_training_images_have_for_their_classes(folder, tmp_path):
    """Folders are numbered in their order: without class a, class b would be taken for it."""
    _, batch = held_out(folder, put_images(tmp_path / "validation", "b"))
    assert batch["labels"].tolist() == [1]


def test_held_out_images_must_be_of_classes_that_are_trained_on(folder, tmp_path):
    with pytest.raises(ValueError, match=r"must be among a, b, got c\."):
        held_out(folder, put_images(tmp_path / "validation", "bc"))
