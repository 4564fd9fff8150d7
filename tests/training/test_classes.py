import logging

import datasets
import pytest
from PIL import Image

from diffusers_dtr.training.data.classes import match_classes
from diffusers_dtr.training.data.training_images import TrainingImages, training_images
from diffusers_dtr.training.run.resuming import RunState, class_settings


def make_images(names: list[str], *, named: bool = True) -> TrainingImages:
    """One image per class, in the order of the names."""
    labels = datasets.ClassLabel(names=names) if named else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    rows = {"image": [Image.new("L", (2, 2))] * len(names), "label": list(range(len(names)))}
    return training_images(datasets.Dataset.from_dict(rows, features))


def matched(names: list[str], known: dict, num_classes: int | None = None, **options) -> dict[str, int]:
    """The labels of classes by their names, of a model that may get new ones."""
    images, kept = match_classes(make_images(names), known, num_classes or len(known), new_classes=True, **options)
    assert kept
    assert all(images.id2label[label] for label in images.labels.tolist())
    assert images.num_classes == max([num_classes or len(known), *(label + 1 for label in images.labels.tolist())])
    return dict(zip(names, images.labels.tolist(), strict=True))


PETS = {0: "dog", 1: "cat", 2: "owl, night owl"}


@pytest.mark.parametrize("names", [["cat", "dog", "owl"], ["owl", "dog"], ["cat"], ["night owl", "cat"]])
def test_known_names_keep_their_labels_in_any_order(names):
    known = {"dog": 0, "cat": 1, "owl": 2, "night owl": 2}
    assert matched(names, PETS) == {name: known[name] for name in names}


def test_new_names_get_labels_behind_the_known_ones_and_are_said(caplog):
    assert matched(["ant", "cat", "bee"], PETS) == {"ant": 3, "cat": 1, "bee": 4}
    assert "New classes, from label 3 on: ant, bee." in caplog.text


def test_names_that_have_nothing_in_common_are_new_classes_said_once(caplog):
    images, known = match_classes(make_images(["ant", "bee", "fly"]), PETS, 3, new_classes=True)
    assert (known, images.labels.tolist(), images.id2label) == (False, [0, 1, 2], {0: "ant", 1: "bee", 2: "fly"})
    assert caplog.text.count("all of them are new classes") == 1


def test_classes_of_the_model_may_be_without_names():
    assert matched(["cat", "ant"], {4: "cat"}, num_classes=10) == {"cat": 4, "ant": 10}


def test_a_whole_name_goes_before_a_part_of_another():
    assert matched(["crane"], {0: "crane, bird", 1: "crane"}) == {"crane": 1}


def test_the_same_list_matches_although_it_repeats_names():
    known = {0: "crane, bird", 1: "crane, machine"}
    assert matched(["crane, bird", "crane, machine"], known) == {"crane, bird": 0, "crane, machine": 1}


def test_a_name_of_several_classes_is_refused():
    with pytest.raises(ValueError, match=r"'crane' .* may be each of .* 0 \(crane, bird\), 1 \(crane, machine\)"):
        matched(["crane"], {0: "crane, bird", 1: "crane, machine"})


def test_two_names_of_one_class_are_refused():
    with pytest.raises(ValueError, match="classes owl, night owl of the images are one class of the model, owl"):
        matched(["owl", "night owl"], PETS)


def test_unknown_names_are_refused_where_the_model_gets_no_new_classes():
    with pytest.raises(ValueError, match=r"must be among dog, cat, owl, night owl, got ant\."):
        match_classes(make_images(["ant", "cat"]), PETS, 3)


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


def test_numbers_above_those_of_the_model_are_refused_where_it_gets_no_new_classes():
    with pytest.raises(ValueError, match="The images have 3 classes, but the model knows 2"):
        match_classes(make_images(["a", "b", "c"], named=False), None, 2)


# ---- resuming


def test_a_checkpoint_refuses_other_classes_whatever_is_allowed():
    state = RunState(global_step=3, settings=class_settings({0: "apple", 1: "cat"}))
    state.go_on(class_settings({0: "apple", 1: "cat"}))
    for other in ({0: "cat", 1: "zebra"}, {0: "apple"}, {0: "apple", 1: "cat", 2: "zebra"}):
        with pytest.raises(ValueError, match=r"`class \d` was \w+ and is \w+ now"):
            state.go_on(class_settings(other), allow_changes=True)


def test_logging_names_no_more_than_ten(caplog):
    caplog.set_level(logging.INFO)
    names = [f"n{number}" for number in range(40)]
    match_classes(make_images(names), PETS, 3, new_classes=True)
    assert "n9, … (40 in all)" in caplog.text
    assert "n10," not in caplog.text
