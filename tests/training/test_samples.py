"""Samples, and their order: functions of a seed and a place alone."""

from itertools import chain, islice

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_images import noise_image
from torch.utils.data import DataLoader

from diffusers_dtr.training.data import samples
from diffusers_dtr.training.data.images import ImageTransform, UnreadableImageError
from diffusers_dtr.training.data.samples import ImageDataset, TrainingBatches
from diffusers_dtr.training.data.training_images import training_images
from diffusers_dtr.training.randomness import generator_for


def make_dataset(rows: list | None = None, seed: int = 0, **columns) -> ImageDataset:
    pictures = [noise_image(12, 8, row) for row in range(6)]
    rows = pictures if rows is None else [pictures[0] if row is None else row for row in rows]
    table = datasets.Dataset.from_dict({"image": rows, "label": list(range(len(rows)))})
    images = training_images(table.cast_column("image", datasets.Image()), **columns)
    return ImageDataset(images, ImageTransform(resolution=8, random_flip=True), seed=seed)


def batches(dataset: ImageDataset, *, start_step: int = 0, count: int = 4, num_workers: int = 0) -> list[dict]:
    order = TrainingBatches(len(dataset), 4, seed=dataset.seed, start_step=start_step)
    return list(islice(DataLoader(dataset, batch_sampler=order, num_workers=num_workers), count))


def stream(batches: TrainingBatches, steps: int) -> list[tuple[int, int]]:
    return list(chain.from_iterable(islice(batches, steps)))


def test_a_batch_has_images_and_labels_if_there_are_any():
    batch = batches(make_dataset())[0]
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["index"])
    assert "labels" not in batches(make_dataset(label_column=None))[0]


def test_workers_and_resuming_change_nothing():
    dataset = make_dataset()
    uninterrupted = batches(dataset)
    for start in (0, 2):
        again = batches(dataset, start_step=start, count=4 - start, num_workers=2)
        for one, other in zip(again, uninterrupted[start:], strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_augmentation_changes_with_the_epoch_the_index_and_the_seed():
    one, other = (make_dataset([None] * 8, seed=seed, label_column=None) for seed in range(2))
    sets = [[one[n, 0] for n in range(8)], [one[0, n] for n in range(8)], [other[n, 0] for n in range(8)]]
    first, across, reseeded = ([sample["pixel_values"].numpy().tobytes() for sample in some] for some in sets)
    assert min(len(set(some)) for some in (first, across, reseeded)) > 3
    assert first != reseeded


def test_an_unreadable_image_is_named_by_a_worker():
    dataset = make_dataset([None, None, {"bytes": b"broken", "path": "2.png"}, None])
    with pytest.raises(UnreadableImageError, match=r"2\.png \(row 2\)"):
        batches(dataset, num_workers=1)


# ---- their order


@settings(max_examples=30)
@given(num_samples=st.integers(1, 20), batch_size=st.integers(1, 50), seed=st.integers(0, 2**40))
def test_every_epoch_has_every_sample_once(num_samples, batch_size, seed):
    steps = -(-3 * num_samples // batch_size)
    items = stream(TrainingBatches(num_samples, batch_size, seed=seed), steps)
    for epoch in range(3):
        everything = [(epoch, index) for index in range(num_samples)]
        assert sorted(items[epoch * num_samples : (epoch + 1) * num_samples]) == everything


@given(num_samples=st.integers(1, 20), num_processes=st.sampled_from([1, 2, 3, 6]), start_step=st.integers(0, 30))
def test_the_global_order_depends_neither_on_resuming_nor_on_the_number_of_processes(
    num_samples, num_processes, start_step
):
    options = {"seed": 3, "num_processes": num_processes, "start_step": start_step}
    processes = [
        islice(TrainingBatches(num_samples, 6 // num_processes, process_index=index, **options), 7)
        for index in range(num_processes)
    ]
    together = [*chain.from_iterable(chain.from_iterable(zip(*processes, strict=True)))]
    assert together == stream(TrainingBatches(num_samples, 6, seed=3), start_step + 7)[6 * start_step :]


def test_resuming_far_into_training_takes_no_detour(monkeypatch):
    asked = []
    monkeypatch.setattr(samples, "generator_for", lambda *place: asked.append(place) or generator_for(*place))
    batches = TrainingBatches(1000, 8, seed=0, start_step=10**12)
    assert next(iter(batches))[0][0] == 8 * 10**12 // 1000
    assert len(asked) == 1


def test_orders_differ_between_epochs_and_between_neighbouring_seeds():
    places = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(i for _, i in TrainingBatches(50, 50, seed=seed).batch(epoch)) for seed, epoch in places}) == 16
