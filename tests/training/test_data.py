from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_dtr.training.data.images import UnreadableImageError
from diffusers_dtr.training.data.training_images import load_training_images, training_images


def make_folder(root: Path, classes=("cat", "dog"), per_class: int = 2) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            Image.new("RGB", (4, 4), (number, index, 0)).save(root / name / f"{index}.png")
    return root


def table(labels, feature=None, images=None) -> datasets.Dataset:
    images = [Image.new("L", (2, 2), value) for value in range(len(labels))] if images is None else images
    dataset = datasets.Dataset.from_dict({"image": images, "label": labels})
    dataset = dataset.cast_column("image", datasets.Image())
    return dataset if feature is None else dataset.cast_column("label", feature)


def test_folders_of_classes_are_labels(tmp_path):
    images = load_training_images(train_data_dir=make_folder(tmp_path / "data"), cache_dir=tmp_path / "cache")
    assert len(images) == 4
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.labels.dtype == np.int64
    assert images.id2label == {0: "cat", 1: "dog"}
    assert images.num_classes == 2
    assert [images.read(row).getpixel((0, 0)) for row in range(4)] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]


def test_classes_called_like_splits_are_classes(tmp_path):
    folder = make_folder(tmp_path / "data", classes=("plane", "test", "train"))
    images = load_training_images(train_data_dir=folder, cache_dir=tmp_path / "cache")
    assert images.id2label == {0: "plane", 1: "test", 2: "train"}
    assert len(images) == 6


def test_a_local_folder_can_be_named_as_a_dataset(tmp_path):
    folder = make_folder(tmp_path / "data")
    images = load_training_images(dataset_name=str(folder), split="train[:3]", cache_dir=tmp_path / "cache")
    assert images.labels.tolist() == [0, 0, 1]


def test_images_without_labels_are_for_unconditional_training(tmp_path):
    folder = make_folder(tmp_path / "data")
    images = load_training_images(train_data_dir=folder, label_column=None, cache_dir=tmp_path / "cache")
    assert (images.labels, images.num_classes, images.id2label) == (None, None, None)


def test_folders_may_be_named_like_patterns(tmp_path):
    folder = make_folder(tmp_path / "data [1]*")
    assert len(load_training_images(train_data_dir=folder, cache_dir=tmp_path / "cache")) == 4


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone"):
        load_training_images(train_data_dir=tmp_path / "gone")


@pytest.mark.parametrize("argument", ["image_column", "label_column"])
def test_a_missing_column_is_named_with_the_columns_there_are_and_the_flag(argument):
    with pytest.raises(ValueError, match=f"columns, image, label, got 'picture'. Choose another with `--{argument}`"):
        training_images(table([0, 1]), **{argument: "picture"})


def test_a_column_of_something_else_holds_no_images():
    with pytest.raises(ValueError, match=r"`image_column` must name a column of images, got 'label'"):
        training_images(table([0, 1]), image_column="label")


def test_a_dataset_without_rows_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        training_images(table([0]).select([]))


@pytest.mark.parametrize("dtype", ["int64", "uint8"])
def test_integers_are_labels(dtype):
    images = training_images(table([3, 0, 4], datasets.Value(dtype)))
    assert images.labels.dtype == np.int64
    assert (images.labels.tolist(), images.num_classes, images.id2label) == ([3, 0, 4], 5, None)


def test_names_of_classes_come_with_class_labels():
    images = training_images(table([1, 0, 1], datasets.ClassLabel(names=["a", "b", "c"])))
    assert (images.num_classes, images.id2label) == (3, {0: "a", 1: "b", 2: "c"})


def test_the_first_label_out_of_range_is_named_without_decoding_images():
    broken = [{"bytes": b"broken", "path": None}] * 4
    with pytest.raises(ValueError, match=r"in \[0, 5\), got -1 in row 2 of 'label' \(2 such rows\)"):
        training_images(table([0, 4, -1, -1], images=broken))


def test_a_missing_label_is_named():
    with pytest.raises(ValueError, match="none in row 1"):
        training_images(table([0, None, 2]))


@pytest.mark.parametrize("labels", [["a", "b"], [0.5, 1.0], [[0], [1]]])
def test_labels_of_other_types_are_an_error(labels):
    with pytest.raises(ValueError, match="class labels or integers"):
        training_images(table(labels))


def test_an_unreadable_image_is_named_by_path_and_row(tmp_path):
    folder = make_folder(tmp_path / "data")
    (folder / "dog" / "0.png").write_bytes(b"")
    images = load_training_images(train_data_dir=folder, cache_dir=tmp_path / "cache")
    with pytest.raises(UnreadableImageError, match=r"dog/0\.png \(row 2\) .*Replace it, or leave it out"):
        images.read(2)


def test_an_unreadable_image_without_a_path_is_named_by_its_row():
    images = training_images(table([0, 1], images=[{"bytes": b"x", "path": None}, None]))
    for row in range(2):
        with pytest.raises(UnreadableImageError, match=f"image row {row} cannot be read"):
            images.read(row)
