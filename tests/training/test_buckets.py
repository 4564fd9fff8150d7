"""Images of a few sizes: which size an image has, and steps whose images are of one."""

import sys
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from run_config import DEFAULT
from test_images import noise_image
from tiny_autoencoders import tiny_vae


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_models import PIXART, SD3, UNET_CONDITION

from diffusers_dtr.latents import encode_images
from diffusers_dtr.training.config import CaptionedDataConfig
from diffusers_dtr.training.data import training_images as module
from diffusers_dtr.training.data.buckets import (
    AspectRatioBuckets,
    BucketedBatches,
    auto_sizes,
    read_sizes,
    resolve_buckets,
)
from diffusers_dtr.training.data.encoder_cache import cache_latents
from diffusers_dtr.training.data.images import Augmentation, ImageTransform, UnreadableImageError
from diffusers_dtr.training.data.samples import ImageDataset, TrainingBatches
from diffusers_dtr.training.data.training_images import training_images
from diffusers_dtr.training.families.text_to_image import Flux, Sana, StableDiffusion, StableDiffusion3
from diffusers_dtr.training.randomness import posterior_generators


SIZES = [(8, 8), (16, 4), (4, 16)]


def buckets_of(*counts: int) -> AspectRatioBuckets:
    """So many images of every size, mixed."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    return AspectRatioBuckets(
        [(number + 1, 1) for number in range(len(counts))], np.random.default_rng(0).permutation(numbers)
    )


def batches(buckets, batch_size=2, micro_batches=2, **options) -> BucketedBatches:
    options = {"seed": 3, "num_processes": micro_batches} | options
    return BucketedBatches(len(buckets.numbers), batch_size, buckets=buckets, micro_batches=micro_batches, **options)


def step_of(buckets, size, number, seed=3) -> list[tuple[int, int]]:
    return BucketedBatches(len(buckets.numbers), size, buckets=buckets, micro_batches=1, seed=seed).batch(number)


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any)


# ---- steps


@settings(max_examples=60)
@given(counts=COUNTS, size=st.integers(1, 12), epochs=st.integers(1, 4))
def test_a_step_is_of_one_bucket_and_every_image_is_seen_in_every_epoch_or_carried_over(counts, size, epochs):
    buckets = buckets_of(*counts)
    num_steps = sum(epochs * count // size for count in counts)
    steps = [step_of(buckets, size, number) for number in range(num_steps)]
    assert all(len({buckets.numbers[row] for _, row in step}) == 1 for step in steps)
    seen = Counter(chain.from_iterable(steps))
    assert not seen or max(seen.values()) == 1  # of every (epoch, row)
    for number, count in enumerate(counts):
        items = sorted(item for item in seen if buckets.numbers[item[1]] == number)
        assert len(items) == epochs * count - epochs * count % size
        whole = len(items) // count if count else 0
        rows = np.flatnonzero(buckets.numbers == number).tolist()
        assert [item for item in items if item[0] < whole] == [(epoch, row) for epoch in range(whole) for row in rows]


@given(
    counts=COUNTS,
    shape=st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 2), (6, 1)]),
    start=st.integers(0, 40),
    seed=st.integers(0, 3),
)
def test_neither_processes_nor_accumulation_nor_resuming_change_the_stream(counts, shape, start, seed):
    buckets, (num_processes, accumulated) = buckets_of(*counts), shape
    micro_batches = num_processes * accumulated
    options = {"micro_batches": micro_batches, "num_processes": num_processes, "seed": seed}
    processes = [
        islice(
            batches(buckets, 6 // micro_batches, start_step=start * accumulated, process_index=index, **options),
            3 * accumulated,
        )
        for index in range(num_processes)
    ]
    together = [*chain.from_iterable(chain.from_iterable(zip(*processes, strict=True)))]
    assert together == [*chain.from_iterable(step_of(buckets, 6, start + n, seed) for n in range(3))]


@given(count=st.integers(1, 20), num_processes=st.integers(1, 3), number=st.integers(0, 2))
def test_one_bucket_is_the_stream_of_squares(count, num_processes, number):
    counts = [0, 0, 0]
    counts[number] = count
    options = {"seed": 5, "num_processes": num_processes, "process_index": num_processes - 1, "start_step": 7}
    ours = batches(buckets_of(*counts), 4, num_processes, **options)
    assert [*islice(ours, 9)] == [*islice(TrainingBatches(count, 4, **options), 9)]


def test_steps_of_buckets_are_spread_over_an_epoch_and_orders_differ():
    buckets = buckets_of(40, 20)
    steps = [step_of(buckets, 2, number) for number in range(60)]
    kinds = [int(buckets.numbers[step[0][1]]) for step in steps]
    assert [sum(kinds[start : start + 6]) for start in range(0, 60, 6)] == [2] * 10
    assert [row for step in steps[:30] for _, row in step] != [row for step in steps[30:] for _, row in step]
    assert step_of(buckets, 2, 0) != step_of(buckets, 2, 0, seed=4)


def test_far_steps_take_no_detour_and_small_buckets_are_named(caplog):
    buckets = buckets_of(1000, 3)
    far = step_of(buckets, 8, 10**12)
    assert far[0][0] == pytest.approx(8 * 10**12 / 1003, rel=1e-9)
    assert "Bucket 2,1 has 3 images, fewer than the 8 of a step, which has them 2.7 times, so" in caplog.text


# ---- sizes


def dataset_of(images: list, **save) -> module.TrainingImages:
    table = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    return training_images(table, label_column=None)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_of_decoded_images_though_no_pixel_is_decoded(file_format, orientation, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{file_format.lower()}"
    noise_image(12, 8).save(path, file_format, exif=exif)
    images = dataset_of([str(path)])
    expected = images.read(0).size
    for cls in {Image.Image, *(type(Image.open(path)),)}:
        monkeypatch.setattr(cls, "load", lambda *_: pytest.fail("decoded"))
    assert images.size(0) == expected == ((8, 12) if orientation in (6, 8) else (12, 8))


def test_sizes_are_read_once_for_a_dataset_and_a_broken_file_is_named(tmp_path, monkeypatch):
    images = dataset_of([noise_image(12, 8), noise_image(5, 9)])
    read = [read_sizes(images, tmp_path, num_workers) for num_workers in (0, 1)]
    monkeypatch.setattr(module, "upright_size", lambda _: pytest.fail("read again"))
    assert [sizes.tolist() for sizes in (*read, read_sizes(images, tmp_path))] == [[[12, 8], [5, 9]]] * 3
    monkeypatch.undo()
    with pytest.raises(UnreadableImageError, match=r"7\.png \(row 1\)"):
        read_sizes(dataset_of([noise_image(2, 2), {"bytes": b"broken", "path": "7.png"}]), tmp_path)


def test_an_image_is_of_the_bucket_of_the_nearest_ratio():
    image_sizes = np.array([(8, 8), (80, 90), (4, 20), (100, 10), (10, 19), (10, 21)])
    buckets = AspectRatioBuckets.nearest(SIZES, image_sizes)
    sizes = [buckets.size(row) for row in range(len(image_sizes))]
    assert sizes == [(8, 8), (8, 8), (16, 4), (4, 16), (8, 8), (16, 4)]
    order = np.argsort([buckets.place(row) for row in range(6)])
    assert [buckets.size(row) for row in order] == sorted(sizes, key=lambda size: size[0] / size[1])


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 8), (1024, 16), (1024, 32), (16, 8), (8, 8), (256, 2)])
def test_sizes_found_are_multiples_of_about_as_many_pixels_with_the_square_among_them(resolution, multiple):
    sizes = auto_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert len({height / width for height, width in sizes}) == len(sizes)
    assert {size[::-1] for size in sizes} == {*sizes}
    for size in sizes:
        assert all(side % multiple == 0 for side in size)
        assert abs(size[0] * size[1] - resolution**2) <= max(size) * multiple / 2


def test_sizes_of_a_rectangle_are_covered_cropped_and_told():
    image, transform = noise_image(30, 20), ImageTransform((8, 16))  # resized to 16 by 10
    pixels = transform(image, Augmentation(crop=(0.0, 0.99)))
    expected = image.resize((16, 10), Image.Resampling.BILINEAR).crop((0, 2, 16, 10))
    assert np.array_equal(((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy(), np.asarray(expected))
    told = transform.micro_conditions(image.size, Augmentation(crop=(0.0, 0.99)))
    assert {name: value.tolist() for name, value in told.items()} == {
        "original_size": [20, 30],
        "crop_top_left": [2, 0],
        "target_size": [8, 16],
    }
    assert ImageTransform((16, 8))(noise_image(1, 1000), Augmentation()).shape == (3, 16, 8)


def config_of(**data):
    parts = {name: getattr(DEFAULT, name) for name in ("run", "model", "text")}
    source = {"train_data_dir": "images", "resolution": 64}
    return type(DEFAULT)(**parts, data=CaptionedDataConfig(**{**source, **data}))


def resolved(sizes, family, model_config=None, resolution=64):
    config = config_of(aspect_ratio_buckets=sizes, resolution=resolution)
    return resolve_buckets(config, family(resolution), tiny_vae(), model_config or {}).data.aspect_ratio_buckets


def test_sizes_are_those_that_the_family_can_have():
    assert resolved(None, Flux) is None
    assert resolved("64,64;32,128", StableDiffusion) == resolved("32,128;64,64", StableDiffusion) == "32,128;64,64"
    assert resolved("auto", Sana) == "32,96;64,64;96,32"
    with pytest.raises(ValueError, match="`--aspect_ratio_buckets` must be of multiples of 8, got 60,64"):
        resolved("64,64;60,64", StableDiffusion)
    with pytest.raises(ValueError, match="at most 4 times the pixels of `--resolution` 64, got 99992,8"):
        resolved("99992,8", StableDiffusion)
    known = {"patch_size": 2, "pos_embed_max_size": 20}  # of four pixels each
    assert resolved("80,48", StableDiffusion3, known) == "80,48"
    with pytest.raises(ValueError, match="`--aspect_ratio_buckets` must be at most 80, got 88: the denoiser knows 20"):
        resolved("88,48", StableDiffusion3, known)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aspect_ratio_buckets": "8x8"}, "must be auto, or heights and widths such as '512,512;448,576', got '8x8'"),
        ({"aspect_ratio_buckets": "8,8;"}, "must be auto, or heights"),
        ({"aspect_ratio_buckets": "0,8"}, "must be auto, or heights"),
        ({"aspect_ratio_buckets": "8,8;4,8;16,16"}, "must have one size of a ratio of sides, got 8,8;4,8;16,16"),
        ({"dataset_name": "d", "train_data_dir": None, "streaming": True}, "has an effect without --streaming only"),
        ({"latents_dir": "l", "train_data_dir": None, "center_crop": True}, "has an effect without --latents_dir on"),
    ],
)
def test_what_cannot_be_heeded_is_refused(options, message):
    with pytest.raises(ValueError, match=f"`--aspect_ratio_buckets` {message}"):
        config_of(**{"aspect_ratio_buckets": "auto", **options})


@pytest.mark.slow
@pytest.mark.parametrize(("family", "graphs"), [(UNET_CONDITION, 2), (PIXART, 4), (SD3, 4)], ids=repr)
def test_a_compiled_denoiser_has_graphs_for_all_sizes_after_a_few(family, graphs):
    torch._dynamo.reset()
    model, compiled = family.routed().train(), []
    model.compile(fullgraph=True, backend=lambda module, inputs: compiled.append(module) or module.forward)
    inputs = family.inputs(torch.tensor([5, 900]))
    name = next(name for name in ("sample", "hidden_states") if name in inputs)
    for size in 2 * [(8, 8), (12, 6), (6, 12), (16, 4), (4, 16), (10, 8), (8, 10)]:
        model(**{**inputs, name: torch.randn(*inputs[name].shape[:2], *size)})
    assert len(compiled) <= graphs


# ---- latents


@pytest.mark.parametrize("random_flip", [False, True])
def test_cached_latents_of_several_sizes_are_those_encoded_on_the_fly(random_flip, tmp_path):
    images = dataset_of([noise_image(*size, seed) for seed, size in enumerate([(16, 4), (8, 8), (4, 16), (9, 8)])])
    buckets = AspectRatioBuckets.nearest(SIZES, read_sizes(images, tmp_path))
    vae, transform = tiny_vae(), ImageTransform(8, center_crop=True, random_flip=random_flip)
    cached = cache_latents(vae, images, transform, tmp_path, seed=7, batch_size=2, buckets=buckets)
    fresh = ImageDataset(images, transform, seed=7, buckets=buckets)
    for place in [(0, 0), (0, 1), (1, 2), (2, 3)]:
        left, right = cached[place], fresh[place]
        generators = posterior_generators(7, *([number] for number in place))
        torch.testing.assert_close(left["latents"], encode_images(vae, right["pixel_values"][None], generators)[0])
        assert left["latents"].shape[1:] == torch.Size(side // 2 for side in buckets.size(place[1]))
        assert all(torch.equal(left[key], right[key]) for key in ("original_size", "crop_top_left", "target_size"))
    others = AspectRatioBuckets.nearest(SIZES[:2], read_sizes(images, tmp_path))
    cache_latents(vae, images, transform, tmp_path, seed=7, batch_size=2, buckets=others)
    assert len([*tmp_path.glob("latents-*")]) == 2
