from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_dtr.training.data.batches import TrainingBatches
from diffusers_dtr.training.data.images import ImageTransform, UnreadableImageError
from diffusers_dtr.training.data.samples import ImageDataset, collate_samples
from diffusers_dtr.training.data.training_images import TrainingImages, training_images


TRANSFORM = ImageTransform(resolution=8, random_flip=True)


def make_images(broken=(), count: int = 6, label_column: str | None = "label") -> TrainingImages:
    random = np.random.default_rng(0)
    rows = [Image.fromarray(random.integers(0, 256, (8, 12, 3), dtype=np.uint8)) for _ in range(count)]
    rows = [{"bytes": b"broken", "path": f"{row}.png"} if row in broken else rows[row] for row in range(count)]
    dataset = datasets.Dataset.from_dict({"image": rows, "label": list(range(count))})
    return training_images(dataset.cast_column("image", datasets.Image()), label_column=label_column)


def batches(dataset: ImageDataset, *, start_step: int = 0, count: int = 4, num_workers: int = 0) -> list[dict]:
    order = TrainingBatches(len(dataset), 4, seed=dataset.seed, start_step=start_step)
    loader = DataLoader(dataset, batch_sampler=order, num_workers=num_workers, collate_fn=collate_samples)
    return list(islice(loader, count))


def assert_same(left: list[dict], right: list[dict]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert one["unreadable"] == other["unreadable"]
        assert all(torch.equal(one[key], other[key]) for key in ("pixel_values", "labels", "epoch", "index"))


def test_a_batch_has_images_and_labels():
    batch = batches(ImageDataset(make_images(), TRANSFORM, seed=0))[0]
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["index"])
    assert batch["unreadable"] == []


def test_images_without_labels_make_batches_without_labels():
    assert "labels" not in batches(ImageDataset(make_images(label_column=None), TRANSFORM, seed=0))[0]


@pytest.mark.parametrize("broken", [(), (1, 4)])
def test_workers_and_resuming_change_nothing(broken):
    dataset = ImageDataset(make_images(broken), TRANSFORM, seed=0, on_unreadable="skip")
    uninterrupted = batches(dataset)
    assert_same(batches(dataset, num_workers=2), uninterrupted)
    assert_same(batches(dataset, start_step=2, count=2, num_workers=2), uninterrupted[2:])


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


def test_an_unreadable_image_is_an_error_by_default():
    dataset = ImageDataset(make_images(broken=[2]), TRANSFORM, seed=0)
    with pytest.raises(UnreadableImageError, match=r"2\.png \(row 2\)"):
        dataset[0, 2]


def test_an_error_in_a_worker_still_names_the_image():
    with pytest.raises(UnreadableImageError, match=r"2\.png \(row 2\)"):
        batches(ImageDataset(make_images(broken=[2]), TRANSFORM, seed=0), num_workers=1)


def test_the_next_readable_row_takes_the_place_of_unreadable_ones():
    transform = ImageTransform(resolution=8, center_crop=True)
    dataset = ImageDataset(make_images(broken=[0, 3, 4, 5]), transform, seed=0, on_unreadable="skip")
    sample = dataset[0, 3]
    assert torch.equal(sample["pixel_values"], dataset[0, 1]["pixel_values"])
    assert (sample["index"], sample["row"], sample["labels"]) == (3, 1, 1)
    assert sample["unreadable"] == [f"{row}.png (row {row})" for row in (3, 4, 5, 0)]


def test_a_batch_names_all_images_that_were_passed_over():
    dataset = ImageDataset(make_images(broken=[1, 4]), TRANSFORM, seed=0, on_unreadable="skip")
    first_epoch = batches(dataset, count=3)
    assert {len(batch["labels"]) for batch in first_epoch} == {4}
    assert {name for batch in first_epoch for name in batch["unreadable"]} == {"1.png (row 1)", "4.png (row 4)"}


def test_no_readable_image_at_all_is_an_error():
    dataset = ImageDataset(make_images(broken=range(6)), TRANSFORM, seed=0, on_unreadable="skip")
    with pytest.raises(UnreadableImageError, match="None of the 6 images can be read"):
        dataset[0, 3]


def test_an_unknown_policy_is_an_error():
    with pytest.raises(ValueError, match=r"`on_unreadable` must be one of error, skip, got 'ignore'"):
        ImageDataset(make_images(), TRANSFORM, seed=0, on_unreadable="ignore")
