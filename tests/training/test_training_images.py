"""What tables and datasets of images must hold."""

import logging

import datasets
import numpy as np
import pytest
from PIL import Image
from test_image_folder import put

from diffusers_dtr.training.data.images import UnreadableImageError
from diffusers_dtr.training.data.training_images import load_training_images, training_images


def table(labels, feature=None, images=None) -> datasets.Dataset:
    images = [Image.new("L", (2, 2), value) for value in range(len(labels))] if images is None else images
    dataset = datasets.Dataset.from_dict({"image": images, "label": labels})
    dataset = dataset.cast_column("image", datasets.Image())
    return dataset if feature is None else dataset.cast_column("label", feature)


@pytest.mark.parametrize("dtype", ["int64", "uint8"])
def test_integers_are_labels(dtype):
    images = training_images(table([3, 0, 4], datasets.Value(dtype)))
    assert images.labels.dtype == np.int64
    assert (images.labels.tolist(), images.num_classes, images.id2label) == ([3, 0, 4], 5, None)


def test_names_of_classes_come_with_class_labels_and_those_without_an_image_are_named(caplog):
    caplog.set_level(logging.INFO, logger="diffusers_dtr")
    images = training_images(table([2, 0, 2], datasets.ClassLabel(names=["a", "b", "c"])))
    assert (images.num_classes, images.id2label) == (3, {0: "a", 1: "b", 2: "c"})
    assert "3 classes: a, b, c." in caplog.text
    assert "1 of them have no image: b." in caplog.text


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        *(
            ([0, 1], {name: "picture"}, f"columns, image, label, got 'picture'. Choose another with `--{name}`")
            for name in ("image_column", "label_column", "caption_column")
        ),
        ([0, 1], {"image_column": "label"}, "`image_column` must name a column of images, got 'label'"),
        ([], {}, "at least one row"),
        ([0, 4, -1, -1], {}, r"in \[0, 5\), got -1 in row 2 of 'label' \(2 such rows\)"),
        ([0, None, 2], {}, "none in row 1"),
        *((labels, {}, "class labels or integers") for labels in (["a", "b"], [0.5, 1.0], [[0], [1]])),
    ],
)
def test_columns_that_cannot_be_used_are_named_without_decoding_images(labels, options, message):
    with pytest.raises(ValueError, match=message):
        training_images(table(labels, images=[{"bytes": b"broken", "path": None}] * len(labels)), **options)


def test_unreadable_images_are_named_by_path_and_row():
    rows = [{"bytes": b"x", "path": None}, None, {"bytes": b"", "path": "dog/0.png"}]
    images = training_images(table([0, 1, 1], images=rows))
    for row, name in enumerate(["row 0", "row 1", r"dog/0\.png \(row 2\)"]):
        with pytest.raises(UnreadableImageError, match=f"image {name} cannot be read: .*Replace it, or leave it out"):
            images.read(row)


def test_a_local_folder_can_be_named_as_a_dataset_and_what_that_leaves_out_is_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="diffusers_dtr")
    folder = put(tmp_path / "data", "train/a/0.png", "train/b/0.png", "train/b/1.png", "test/a/0.png")
    images = load_training_images(dataset_name=str(folder), split="train[:2]", cache_dir=tmp_path / "cache")
    assert images.labels.tolist() == [0, 1]
    assert "2 of 4 files used; left out are 2 not in the split 'train[:2]'" in caplog.text
    assert "For a folder of images `--train_data_dir` takes seconds." in caplog.messages[0]
