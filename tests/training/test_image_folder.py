import json
import logging
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from diffusers_dtr.training.data import match_classes
from diffusers_dtr.training.data.image_folder import scan_folder, unzip
from diffusers_dtr.training.data.training_images import TrainingImages, load_training_images


UNLABELLED = {"label_column": None}
CAPTIONED = {"label_column": None, "caption_column": "text"}


@pytest.fixture(autouse=True)
def messages(caplog):
    caplog.set_level(logging.INFO, logger="diffusers_dtr")
    return caplog


def put(root: Path, *places: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number, place in enumerate(places):
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".avif"):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
        else:
            path.write_text("no image")
    return root


def captions(folder: Path, *names: str, **columns: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"file_name": name, "text": f"caption of {name}", **columns} for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def load(folder: Path, **options) -> TrainingImages:
    return load_training_images(train_data_dir=folder, cache_dir=folder.parent / "cache", **options)


def used(images: TrainingImages, folder: Path) -> list[str]:
    return [str(Path(images.dataset[row]["image"]["path"]).relative_to(folder)) for row in range(len(images))]


@pytest.mark.parametrize(
    "places",
    [
        ["cat/indoor/0.png", "cat/outdoor/0.png", "dog/indoor/0.png"],
        ["cat/0.png", "dog/more/of/them/0.png"],
        ["__background__/0.png", "10/0.png", "2/0.png", "train/0.png", "a [1]*/0.png", "x=1/0.png"],
        ["test/0.png", "train/0.png"],
    ],
    ids=["folders in class folders", "unequal depth", "special names", "splits with images"],
)
def test_the_folder_at_the_top_is_the_class(places, tmp_path):
    folder = put(tmp_path / "data [1]*", *places)
    images = load(folder)
    classes = [images.id2label[label] for label in images.labels]
    assert dict(zip(used(images, folder), classes, strict=True)) == {place: place.split("/")[0] for place in places}
    assert images.labels.dtype == np.int64
    assert images.num_classes == len(set(classes))
    assert [images.read(row).getpixel((0, 0))[0] for row in range(len(images))] == [
        places.index(place) for place in used(images, folder)
    ]


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_every_format_that_pillow_opens_counts(tmp_path):
    folder = put(tmp_path / "data", "ant/0.avif", "bee/0.png")
    shutil.copy(folder / "bee/0.png", folder / "bee/1.PNG")
    Image.new("RGB", (4, 4)).save(folder / "bee/2.qoi")
    assert used(load(folder), folder) == ["ant/0.avif", "bee/0.png", "bee/1.PNG", "bee/2.qoi"]


def test_links_are_followed_unless_they_lead_nowhere_or_in_a_circle(tmp_path, messages):
    folder = put(tmp_path / "data", "dog/0.png")
    elsewhere = put(tmp_path / "elsewhere", "0.png", "one.png")
    os.symlink(elsewhere, folder / "cat")
    os.symlink(elsewhere / "one.png", folder / "dog" / "1.png")
    os.symlink(folder / "dog" / "gone.png", folder / "dog" / "2.png")
    os.symlink(folder, folder / "dog" / "all")
    assert used(load(folder), folder) == ["cat/0.png", "cat/one.png", "dog/0.png", "dog/1.png"]
    assert "1 links that lead nowhere (dog/2.png)" in messages.text
    assert "1 links to a folder that they are in (dog/all)" in messages.text


def test_every_file_is_used_or_counted_by_reason_with_three_examples(tmp_path, messages):
    others = ["readme.txt", "cat/a.heic", "cat/b.tar", "dog/c.csv", "cat/.hidden.png", ".git/x.png", "loose.png"]
    folder = captions(put(tmp_path / "data", "cat/0.png", "dog/0.png", "bee/only.heic", *others), "cat/0.png")
    (folder / "run_of_training").mkdir()
    (folder / "run_of_training" / "run_config.json").write_text("{}")
    (folder / "ant").mkdir()
    os.mkfifo(folder / "cat" / "2.png")
    assert load(folder).id2label == {0: "cat", 1: "dog"}
    (line,) = [message for message in messages.messages if "files used" in message]
    assert "2 of 13 files used; left out are" in line
    assert "2 hidden (.git/x.png, cat/.hidden.png)" in line
    assert "5 not of a format that Pillow opens (bee/only.heic, cat/a.heic, cat/b.tar, …)" in line
    assert "1 not in a class folder (loose.png)" in line
    assert "1 of metadata that no flag asks for (metadata.jsonl)" in line
    assert "1 folders of training runs (run_of_training)" in line
    assert "1 neither files nor folders (cat/2.png)" in line
    assert "Folders without images are no classes: ant, bee, run_of_training." in messages.text


def test_without_labels_all_images_are_used_wherever_they_lie(tmp_path):
    folder = captions(put(tmp_path / "data", "0.png", "a/1.png", "a/b/2.png"), "0.png")
    images = load(folder, **UNLABELLED)
    assert used(images, folder) == ["0.png", "a/1.png", "a/b/2.png"]
    assert (images.labels, images.num_classes, images.id2label) == (None, None, None)


@pytest.mark.parametrize(
    ("places", "options", "found"),
    [
        (["0.png", "1.png"], {}, "at least 2 class folders of images, found images: 2 in the folder itself"),
        (["cat/0.png", "1.png"], {}, r"1 in the folder itself \(1\.png\), 1 in 'cat' .*train_unconditional"),
        (["n/a/0.png", "n/b/0.png"], {}, "If the folders in it are the classes, name .*data/n"),
        (["train/a/0.png", "test/b/0.png"], {}, "found test, train, which are splits"),
        (["train/1.png", "test/1.png"], UNLABELLED, "found test, train, which are splits"),
        ([], {}, "must hold images, found nothing"),
        (["a.heic"], {}, r"must hold images, found 1 not of a format that Pillow opens \(a.heic\)"),
        (["0.png"], CAPTIONED, r"must have a metadata\.jsonl.* 'text' .* found images: 1 in the folder"),
        (["all.zip"], {}, r"all\.zip cannot be unpacked: File is not a zip file"),
        (["0.png", "metadata.jsonl"], CAPTIONED, r"has metadata that cannot be read, metadata\.jsonl: "),
    ],
)
def test_what_a_folder_holds_and_what_is_expected_is_said(places, options, found, tmp_path):
    with pytest.raises(ValueError, match=found):
        load(put(tmp_path / "data", *places), **options)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone"):
        load(tmp_path / "gone")


def test_files_are_found_in_the_order_of_their_places(tmp_path):
    folder = put(tmp_path / "data", "b/0.png", "a/1.png", "a-b/0.png", "a/0.png")
    assert [file.place for file in scan_folder(folder)] == ["a/0.png", "a/1.png", "a-b/0.png", "b/0.png"]


def test_an_accent_of_its_own_makes_no_other_class(tmp_path, messages):
    folder = put(tmp_path / "images", "caf\u00e9/1.png", "cafe\u0301/2.png", "tea/1.png")
    images = load(folder)
    assert images.id2label == {0: "caf\u00e9", 1: "tea"}
    matched, _ = match_classes(images, {0: "tea", 1: "cafe\u0301"}, 2)
    assert matched.labels.tolist() == [1, 1, 0]
    assert "Folders without images" not in messages.text


# ---- metadata


def test_images_that_the_metadata_do_not_list_are_counted(tmp_path, messages):
    folder = captions(put(tmp_path / "data", *(f"{number}.png" for number in range(5))), "3.png", "0.png")
    images = load(folder, **CAPTIONED)
    assert used(images, folder) == ["3.png", "0.png"]
    assert images.captions[0] == ["caption of 3.png"]
    assert "2 of 5 files used; left out are 3 not listed in the metadata (1.png, 2.png, 4.png)" in messages.text


def test_every_folder_may_have_metadata_of_its_own(tmp_path):
    folder = put(tmp_path / "data", "a/0.png", "b/0.png")
    for name in "ab":
        captions(folder / name, "0.png")
    assert used(load(folder, **CAPTIONED), folder) == ["a/0.png", "b/0.png"]


def test_labels_of_the_metadata_are_labels(tmp_path):
    folder = captions(put(tmp_path / "data", "0.png", "1.png"), "0.png", "1.png", label=4)
    assert load(folder).labels.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["0.png", "1.png"], r"list images which cannot be found \(1\): .*1\.png"), ([], "metadata.jsonl: it is empty")],
)
def test_metadata_must_list_images_that_are_there(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(captions(put(tmp_path / "data", "0.png"), *names), **CAPTIONED)


# ---- zip files


@pytest.mark.parametrize("source", ["train_data_dir", "dataset_name"])
def test_a_zipped_image_folder_is_one(source, tmp_path):
    captions(put(tmp_path / "source", "0.png", "1.png"), "0.png", "1.png")
    shutil.make_archive(tmp_path / "data" / "train", "zip", tmp_path / "source")
    images = load_training_images(**{source: str(tmp_path / "data")}, **CAPTIONED, cache_dir=tmp_path / "cache")
    assert [images.read(row).getpixel((0, 0)) for row in range(2)] == [(0, 0, 0), (1, 0, 0)]
    assert images.captions[1] == ["caption of 1.png"]


def test_folders_in_a_zip_file_are_classes(tmp_path):
    put(tmp_path / "source", "cat/0.png", "dog/a/0.png")
    shutil.make_archive(tmp_path / "data" / "all", "zip", tmp_path / "source")
    images = load(put(tmp_path / "data", "fox/0.png"))
    assert [images.id2label[label] for label in images.labels] == ["cat", "dog", "fox"]


def test_a_zip_file_that_changes_is_unpacked_again(tmp_path):
    for name in ("one.png", "two.png"):
        put(tmp_path / name[:3], name)
        archive = shutil.make_archive(tmp_path / "data" / "all", "zip", tmp_path / name[:3])
        assert os.listdir(unzip(archive, tmp_path / "cache")) == [name]


def test_a_zip_file_that_claims_too_much_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("1.png", bytes(200_000_000))
    with pytest.raises(ValueError, match="would unpack to 200000000"):
        unzip(str(tmp_path / "images.zip"), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


# ---- fingerprints


def test_a_changed_file_makes_another_dataset(tmp_path):
    folder = put(tmp_path / "data", "a/0.png", "b/0.png")
    first, again = load(folder), load(folder)
    assert first.dataset._fingerprint == again.dataset._fingerprint
    Image.new("RGB", (9, 9)).save(folder / "a/0.png")
    assert load(folder).dataset._fingerprint != first.dataset._fingerprint


def test_rows_in_another_order_are_another_dataset(tmp_path):
    folder = put(tmp_path / "data", "0.png", "1.png")
    one = load(captions(folder, "0.png", "1.png"), **CAPTIONED)
    assert load(captions(folder, "1.png", "0.png"), **CAPTIONED).dataset._fingerprint != one.dataset._fingerprint
