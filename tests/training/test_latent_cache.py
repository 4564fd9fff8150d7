import pickle
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny_autoencoders import tiny_taesd, tiny_vae
from torch.utils.data import DataLoader

from diffusers_dtr.latents import encode_images
from diffusers_dtr.training.data.encoder_cache import cache_latents
from diffusers_dtr.training.data.images import ImageTransform, UnreadableImageError
from diffusers_dtr.training.data.samples import ImageDataset, TrainingBatches
from diffusers_dtr.training.data.training_images import TrainingImages, load_training_images
from diffusers_dtr.training.randomness import posterior_generators


NORMALISATION = {"scaling_factor": 0.5, "shift_factor": 0.2}
TRANSFORM = ImageTransform(resolution=8, center_crop=True, random_flip=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for row in range(6):
        path = tmp_path / "data" / "ab"[row // 3] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def load(folder: Path, **options) -> TrainingImages:
    return load_training_images(train_data_dir=folder, cache_dir=folder.parent / "datasets", **options)


def caches(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache").iterdir())


def cache(folder: Path, *, vae=None, transform=TRANSFORM, images=None, **options):
    images = load(folder) if images is None else images
    options = {"seed": 7, "batch_size": 4} | options
    return cache_latents(vae or tiny_vae(**NORMALISATION), images, transform, folder.parent / "cache", **options)


def batches(dataset, num_workers: int = 0) -> list[dict]:
    order = TrainingBatches(len(dataset), 4, seed=7)
    return list(islice(DataLoader(dataset, batch_sampler=order, num_workers=num_workers), 4))


@pytest.mark.parametrize("make_vae", [tiny_vae, tiny_taesd])
@pytest.mark.parametrize("random_flip", [False, True])
def test_cached_latents_are_those_encoded_on_the_fly(folder, make_vae, random_flip):
    vae, images, transform = make_vae(), load(folder), replace(TRANSFORM, random_flip=random_flip)
    cached = cache(folder, vae=vae, images=images, transform=transform)
    fresh = ImageDataset(images, transform, seed=7)
    for left, right in zip(batches(cached), batches(fresh), strict=True):
        generators = posterior_generators(7, right["epoch"], right["index"])
        torch.testing.assert_close(left["latents"], encode_images(vae, right["pixel_values"], generators))
        assert torch.equal(left["labels"], right["labels"])
        assert all(torch.equal(left[name], right[name]) for name in ("index", "original_size", "crop_top_left"))


def test_every_epoch_draws_a_sample_of_its_own(folder):
    cached = cache(folder)
    assert torch.equal(cached[3, 0]["latents"], cached[3, 0]["latents"])
    assert not torch.equal(cached[3, 0]["latents"], cached[4, 0]["latents"])


def test_a_pickled_dataset_does_not_hold_the_latents(folder):
    cached = cache(folder)
    expected = cached[0, 1]["latents"]
    pickled = pickle.dumps(cached)
    assert len(pickled) < len(pickle.dumps(cached.images)) + 2000
    assert torch.equal(pickle.loads(pickled)[0, 1]["latents"], expected)


def test_images_without_labels_make_samples_without_labels(folder):
    assert "labels" not in cache(folder, images=load(folder, label_column=None))[0, 0]


def test_labels_are_not_part_of_the_cache(folder):
    cache(folder)
    images = load(folder)
    relabelled = replace(images, labels=images.labels + 5)
    assert cache(folder, images=relabelled)[0, 0]["labels"] == 5
    assert len(caches(folder)) == 1


def test_a_second_run_encodes_nothing(folder, monkeypatch):
    first = cache(folder)[2, 3]["latents"]
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(cache(folder)[2, 3]["latents"], first)
    assert not torch.equal(cache(folder, seed=8)[2, 3]["latents"], first)


def test_making_a_cache_leaves_the_global_generator_alone(folder):
    vae, images = tiny_vae(**NORMALISATION), load(folder)
    state = torch.get_rng_state()
    cache(folder, vae=vae, images=images)
    assert torch.equal(torch.get_rng_state(), state)


def test_decoding_workers_make_the_same_cache(folder):
    alone = cache(folder).rows.read(range(6))
    shutil.rmtree(folder.parent / "cache")
    again = cache(folder, num_workers=2).rows.read(range(6))
    assert all(torch.equal(again[name], alone[name]) for name in ("moments", "original_size"))


def change_weights(vae):
    vae.decoder.conv_out.bias.data[0] += 1


def change_config(vae):
    vae.register_to_config(scaling_factor=0.6)


@pytest.mark.parametrize("change", [change_weights, change_config])
def test_another_vae_has_another_cache(folder, change):
    cache(folder)
    vae = tiny_vae(**NORMALISATION)
    change(vae)
    cache(folder, vae=vae)
    assert len(caches(folder)) == 2


@pytest.mark.parametrize("changed", [{"resolution": 4}, {"random_flip": False}])
def test_another_transform_has_another_cache(folder, changed):
    cache(folder)
    cache(folder, transform=replace(TRANSFORM, **changed))
    assert len(caches(folder)) == 2


def test_changed_images_have_another_cache(folder):
    before = cache(folder)[0, 0]["latents"]
    Image.new("RGB", (8, 8), "red").save(folder / "a" / "0.png")
    after = cache(folder)[0, 0]["latents"]
    assert not torch.equal(before, after)


def test_where_a_vae_was_loaded_from_does_not_matter(folder, tmp_path):
    vae = tiny_vae(**NORMALISATION)
    cache(folder, vae=vae)
    vae.save_pretrained(tmp_path / "vae")
    cache(folder, vae=AutoencoderKL.from_pretrained(tmp_path / "vae"))
    assert len(caches(folder)) == 1


def test_an_interrupted_run_leaves_no_cache(folder):
    (folder / "b" / "5.png").write_bytes(b"broken")
    with pytest.raises(UnreadableImageError, match=r"5\.png \(row 5\)"):
        cache(folder, batch_size=2)
    assert caches(folder) == []
