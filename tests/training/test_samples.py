"""Samples, and their order: functions of a seed and a place alone."""

from itertools import chain, islice

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_dtr.training.data import samples
from diffusers_dtr.training.data.images import ImageTransform, UnreadableImageError
from diffusers_dtr.training.data.samples import ImageDataset, TrainingBatches
from diffusers_dtr.training.data.training_images import TrainingImages, training_images
from diffusers_dtr.training.randomness import generator_for


TRANSFORM = ImageTransform(resolution=8, random_flip=True)


def make_images(broken=(), count: int = 6, label_column: str | None = "label") -> TrainingImages:
    random = np.random.default_rng(0)
    rows = [Image.fromarray(random.integers(0, 256, (8, 12, 3), dtype=np.uint8)) for _ in range(count)]
    rows = [{"bytes": b"broken", "path": f"{row}.png"} if row in broken else rows[row] for row in range(count)]
    dataset = datasets.Dataset.from_dict({"image": rows, "label": list(range(count))})
    return training_images(dataset.cast_column("image", datasets.Image()), label_column=label_column)


def batches(dataset: ImageDataset, *, start_step: int = 0, count: int = 4, num_workers: int = 0) -> list[dict]:
    order = TrainingBatches(len(dataset), 4, seed=dataset.seed, start_step=start_step)
    return list(islice(DataLoader(dataset, batch_sampler=order, num_workers=num_workers), count))


def stream(batches: TrainingBatches, steps: int) -> list[tuple[int, int]]:
    return list(chain.from_iterable(islice(batches, steps)))


# ---- samples


def test_a_batch_has_images_and_labels_if_there_are_any():
    batch = batches(ImageDataset(make_images(), TRANSFORM, seed=0))[0]
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["index"])
    assert "labels" not in batches(ImageDataset(make_images(label_column=None), TRANSFORM, seed=0))[0]


def test_workers_and_resuming_change_nothing():
    dataset = ImageDataset(make_images(), TRANSFORM, seed=0)
    uninterrupted = batches(dataset)
    for start in (0, 2):
        again = batches(dataset, start_step=start, count=4 - start, num_workers=2)
        for one, other in zip(again, uninterrupted[start:], strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_augmentation_changes_with_the_epoch_the_index_and_the_seed():
    images = make_images()
    images = TrainingImages(images.dataset.select([0] * 8), images.image_column)
    samples = [
        ImageDataset(images, TRANSFORM, seed=seed)[epoch, index]["pixel_values"]
        for seed, epochs, indices in ((0, range(8), [0]), (0, [0], range(8)), (1, range(8), [0]))
        for epoch in epochs
        for index in indices
    ]
    for start in (0, 8, 16):
        assert len({sample.numpy().tobytes() for sample in samples[start : start + 8]}) > 3
    assert any(not torch.equal(one, other) for one, other in zip(samples[:8], samples[16:], strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named(num_workers):
    with pytest.raises(UnreadableImageError, match=r"2\.png \(row 2\)"):
        batches(ImageDataset(make_images(broken=[2]), TRANSFORM, seed=0), num_workers=num_workers)


# ---- their order


@settings(max_examples=30)
@given(num_samples=st.integers(1, 20), batch_size=st.integers(1, 50), seed=st.integers(0, 2**40))
def test_every_epoch_has_every_sample_once(num_samples, batch_size, seed):
    steps = -(-3 * num_samples // batch_size)
    items = stream(TrainingBatches(num_samples, batch_size, seed=seed), steps)
    for epoch in range(3):
        assert sorted(items[epoch * num_samples : (epoch + 1) * num_samples]) == [
            (epoch, index) for index in range(num_samples)
        ]


@given(num_samples=st.integers(1, 20), batch_size=st.integers(1, 9), start_step=st.integers(0, 30))
def test_resuming_at_a_step_continues_the_uninterrupted_stream(num_samples, batch_size, start_step):
    uninterrupted = islice(TrainingBatches(num_samples, batch_size, seed=3), start_step, start_step + 4)
    resumed = TrainingBatches(num_samples, batch_size, seed=3, start_step=start_step)
    assert list(islice(resumed, 4)) == list(uninterrupted)


@given(num_samples=st.integers(1, 20), num_processes=st.sampled_from([1, 2, 3, 6]))
def test_the_global_order_does_not_depend_on_the_number_of_processes(num_samples, num_processes):
    processes = [
        TrainingBatches(num_samples, 6 // num_processes, seed=3, num_processes=num_processes, process_index=index)
        for index in range(num_processes)
    ]
    together = [item for step in range(7) for process in processes for item in process.batch(step)]
    assert together == stream(TrainingBatches(num_samples, 6, seed=3), 7)


def test_resuming_far_into_training_takes_no_detour(monkeypatch):
    batches = TrainingBatches(1000, 8, seed=0, start_step=10**12)
    asked = []
    monkeypatch.setattr(samples, "generator_for", lambda *place: asked.append(place) or generator_for(*place))
    assert next(iter(batches))[0][0] == 8 * 10**12 // 1000
    assert len(asked) == 1


def test_orders_differ_between_epochs_and_between_neighbouring_seeds():
    orders = {
        tuple(index for _, index in TrainingBatches(50, 50, seed=seed).batch(epoch))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16
