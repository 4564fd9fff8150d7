import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from diffusers_dtr.training.data.captions import CaptionedDataset, Captions
from diffusers_dtr.training.data.images import ImageTransform
from diffusers_dtr.training.data.samples import ImageDataset
from diffusers_dtr.training.data.training_images import load_training_images


class Rows:
    """Samples that tell their row and no more."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: tuple[int, int]) -> dict:
        epoch, index = item
        return {"epoch": epoch, "index": index}


def captions(*rows, **features) -> Captions:
    return Captions(datasets.Dataset.from_dict({"text": list(rows)}, **features), "text")


def drawn(dataset: CaptionedDataset, epochs: range) -> list[str]:
    return [dataset[epoch, index]["caption"] for epoch in epochs for index in range(len(dataset))]


@pytest.mark.parametrize("rows", [("one", "two"), (["one"], ["two", "three"])])
def test_a_row_has_one_or_several_captions(rows):
    first, second = captions(*rows)[0], captions(*rows)[1]
    assert first == ["one"]
    assert second[0] == "two"
    assert list(captions(*rows).all()) == [*first, *second]


def test_format_of_the_dataset_does_not_matter():
    rows = datasets.Dataset.from_dict({"text": [["one"], ["two", "three"]]})
    formatted = Captions(rows.with_format("numpy"), "text")
    assert [formatted[row] for row in range(2)] == [["one"], ["two", "three"]]
    assert sorted(formatted.all()) == ["one", "three", "two"]


@pytest.mark.parametrize("missing", [None, [], ["one", None]])
def test_a_row_without_a_caption_is_named(missing):
    whole = "one" if missing is None else ["one"]
    with pytest.raises(ValueError, match=r"`caption_column` must have a caption in every row, got .* in row 2"):
        captions(whole, whole, missing)


def test_a_column_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"`caption_column` must hold strings .* got 'text', which holds Value"):
        captions(1, 2)


def test_each_of_a_rows_captions_is_drawn_about_equally_often():
    dataset = CaptionedDataset(Rows(1), captions(["a", "b", "c", "d"]), seed=0)
    counts = [drawn(dataset, range(2000)).count(letter) for letter in "abcd"]
    assert all(abs(count - 500) < 100 for count in counts)  # five standard deviations


def test_a_caption_depends_on_its_place_and_seed_alone():
    options = {"captions": captions(*[["a", "b", "c", "d"]] * 20), "proportion_empty": 0.3}
    dataset = CaptionedDataset(Rows(20), seed=1, **options)
    first, second = drawn(dataset, range(1)), drawn(dataset, range(1, 2))
    assert drawn(dataset, range(1)) == first
    assert second != first
    assert drawn(CaptionedDataset(Rows(20), seed=2, **options), range(1)) != first


def test_the_asked_for_share_of_captions_is_empty():
    dataset = CaptionedDataset(Rows(10), captions(*"abcdefghij"), seed=0, proportion_empty=0.1)
    empty = drawn(dataset, range(400)).count("")
    assert abs(empty - 400) < 95  # five standard deviations


def test_which_caption_is_drawn_does_not_depend_on_how_many_are_empty():
    rows = captions(*[["a", "b", "c", "d"]] * 50)
    without = drawn(CaptionedDataset(Rows(50), rows, seed=0), range(1))
    some = drawn(CaptionedDataset(Rows(50), rows, seed=0, proportion_empty=0.5), range(1))
    assert all(one in ("", other) for one, other in zip(some, without, strict=True))
    assert "" in some
    assert set(some) != {""}


def test_without_a_seed_every_row_has_its_first_caption():
    dataset = CaptionedDataset(Rows(2), captions(["a", "b"], ["c", "d"]))
    assert drawn(dataset, range(3)) == ["a", "c"] * 3


def make_image_folder(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    lines = []
    for number, name in enumerate(names):
        Image.new("L", (8, 8), 40 * number).save(folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": f"about {name}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_captions_of_an_image_folder_belong_to_its_images(tmp_path):
    folder = make_image_folder(tmp_path / "images", ["a", "b", "c"])
    images = load_training_images(
        train_data_dir=folder, label_column=None, caption_column="text", cache_dir=tmp_path / "cache"
    )
    dataset = ImageDataset(images, ImageTransform(8, channels=1), seed=0)
    captioned = CaptionedDataset(dataset, images.captions, seed=0)
    assert drawn(captioned, range(1)) == ["about a", "about b", "about c"]


def test_a_column_that_is_not_there_is_refused_and_the_others_are_named(tmp_path):
    folder = make_image_folder(tmp_path / "images", ["a"])
    with pytest.raises(ValueError, match=r"`caption_column` must be one of .*image, text, got 'caption'"):
        load_training_images(
            train_data_dir=folder, label_column=None, caption_column="caption", cache_dir=tmp_path / "cache"
        )
