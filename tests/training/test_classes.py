import logging

import datasets
import pytest
from PIL import Image

from diffusers_dtr.training.data.classes import match_classes
from diffusers_dtr.training.data.training_images import TrainingImages, training_images
from diffusers_dtr.training.run.resuming import RunState, class_settings


PETS = {0: "dog", 1: "cat", 2: "owl, night owl"}
CRANES = {0: "crane, bird", 1: "crane, machine"}


def make_images(names: list[str], *, named: bool = True) -> TrainingImages:
    """One image per class, in the order of the names."""
    labels = datasets.ClassLabel(names=names) if named else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    rows = {"image": [Image.new("L", (2, 2))] * len(names), "label": list(range(len(names)))}
    return training_images(datasets.Dataset.from_dict(rows, features))


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (PETS, {"cat": 1, "dog": 0, "owl": 2}),
        (PETS, {"night owl": 2, "cat": 1}),
        (PETS, {"ant": 3, "cat": 1, "bee": 4}),
        ({**PETS, 5: "a null class"}, {"ant": 6, "cat": 1}),
        ({0: "crane, bird", 1: "crane"}, {"crane": 1}),
        (CRANES, {"crane, bird": 0, "crane, machine": 1}),
    ],
    ids=[
        "any order",
        "a synonym",
        "new ones",
        "classes without names",
        "a whole name first",
        "the same repeated list",
    ],
)
def test_known_names_keep_their_labels_and_new_ones_get_those_behind(known, expected, caplog):
    num_classes = max(known) + 1
    images, kept = match_classes(make_images([*expected]), known, num_classes, new_classes=True)
    assert kept
    assert images.labels.tolist() == [*expected.values()]
    assert images.num_classes == max(num_classes, *(label + 1 for label in expected.values()))
    new = [name for name, label in expected.items() if label >= num_classes]
    assert images.id2label == known | {expected[name]: name for name in new}
    assert (f"New classes, from label {num_classes} on: {', '.join(new)}." in caplog.text) == bool(new)


def test_names_that_have_nothing_in_common_are_new_classes_said_once(caplog):
    images, known = match_classes(make_images(["ant", "bee", "fly"]), PETS, 3, new_classes=True)
    assert (known, images.labels.tolist(), images.id2label) == (False, [0, 1, 2], {0: "ant", 1: "bee", 2: "fly"})
    assert caplog.text.count("all of them are new classes") == 1


@pytest.mark.parametrize(
    ("names", "known", "new_classes", "message"),
    [
        (["crane"], CRANES, True, r"'crane' .* may be each of .* 0 \(crane, bird\), 1 \(crane, machine\)"),
        (["owl", "night owl"], PETS, True, "classes owl, night owl of the images are one class of the model, owl"),
        (["ant", "cat"], PETS, False, r"must be among dog, cat, owl, night owl, got ant\."),
        (["a", "b", "c", "d"], None, False, "The images have 4 classes, but the model knows 3"),
    ],
)
def test_classes_that_cannot_be_matched_are_refused(names, known, new_classes, message):
    with pytest.raises(ValueError, match=message):
        match_classes(make_images(names), known, 3, new_classes=new_classes)


@pytest.mark.parametrize(("known", "named"), [(PETS, False), (None, True), (None, False)])
def test_without_names_of_both_as_many_classes_are_the_same(known, named, caplog):
    images, kept = match_classes(make_images(["a", "b", "c"], named=named), known, 3, new_classes=True)
    assert (kept, images.labels.tolist(), images.num_classes) == (True, [0, 1, 2], 3)
    assert images.id2label == (known or ({0: "a", 1: "b", 2: "c"} if named else None))
    assert ("their numbers are taken to agree" in caplog.text) == (known is not None or named)


def test_without_names_of_both_another_number_of_classes_is_new(caplog):
    images, kept = match_classes(make_images(["a", "b"], named=False), PETS, 3, new_classes=True)
    assert (kept, images.num_classes, images.id2label) == (False, 2, None)
    assert "The 2 classes of the images are new ones" in caplog.text


def test_a_checkpoint_refuses_other_classes_whatever_is_allowed():
    state = RunState(global_step=3, settings=class_settings({0: "apple", 1: "cat"}))
    state.go_on(class_settings({0: "apple", 1: "cat"}))
    for other in ({0: "cat", 1: "zebra"}, {0: "apple"}, {0: "apple", 1: "cat", 2: "zebra"}):
        with pytest.raises(ValueError, match=r"`class \d` was \w+ and is \w+ now"):
            state.go_on(class_settings(other), allow_changes=True)


def test_logging_names_no_more_than_ten(caplog):
    caplog.set_level(logging.INFO)
    match_classes(make_images([f"n{number}" for number in range(40)]), PETS, 3, new_classes=True)
    assert "n9, … (40 in all)" in caplog.text
    assert "n10," not in caplog.text
