"""Text-to-image runs with aspect-ratio buckets: resumed, by several processes, from cached latents, of squares."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from text_to_image_runs import FAMILIES, SCRIPT, make_captioned_images, saved_weights, train
from training_runs import arguments, assert_close_weights, assert_equal_weights, finish, launch, weights


BUCKETS = ("--aspect_ratio_buckets", "8,8;8,16;16,8", "--random_flip")
# Of three epochs, in which squares and tall images fill one step.
LONG = ("--max_train_steps", 6, "--checkpointing_steps", 4)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Four wide images, two square and two tall ones."""
    folder = make_captioned_images(tmp_path_factory.mktemp("data") / "images")
    for number in range(8):
        size = (24, 6) if number % 2 else (3, 12) if number % 4 == 0 else (9, 8)
        pixels = np.asarray(Image.open(folder / f"{number}.png").resize(size))
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return FAMILIES["sd"].save_plain(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="module")
def whole(images, base, tmp_path_factory) -> Path:
    return train("sd", images, tmp_path_factory.mktemp("runs") / "whole", base, *BUCKETS, *LONG)


def shapes_of(name, images, output_dir, base, monkeypatch, *flags) -> list[tuple]:
    """Of the latents of every step."""
    cls, shapes = FAMILIES[name].family.routed_class, []
    forward = cls.forward

    def spy(model, *inputs, **options):
        if model.training:
            shapes.append(tuple((inputs[0] if inputs else options["hidden_states"]).shape))
        return forward(model, *inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", spy)
        train(name, images, output_dir, base, *flags)
    return shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_are_of_the_sizes_of_the_images_and_the_rest_of_squares(name, images, base, tmp_path, monkeypatch):
    base = base if name == "sd" else FAMILIES[name].save_plain(tmp_path / "base")
    flags = (*BUCKETS, "--max_train_steps", 8, "--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    shapes = shapes_of(name, images, tmp_path / "run", base, monkeypatch, *flags, "--validation_data_dir", images)
    counts = {shape: shapes.count(shape) for shape in shapes}
    assert counts == {(1, 4, 8, 16): 8, (1, 4, 8, 8): 4, (1, 4, 16, 8): 4}  # of two epochs
    assert shapes[::2] == shapes[1::2]
    record = json.loads((tmp_path / "run" / "training_config.json").read_text())
    assert record["results"]["validation_loss"] > 0


def test_a_resumed_run_ends_as_the_uninterrupted_one(images, base, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    run = train("sd", images, tmp_path / "run", base, *BUCKETS, *LONG, "--resume_from_checkpoint", "latest")
    assert_equal_weights(run, whole, "unet")
    assert saved_weights(run).keys() == saved_weights(whole).keys()
    with pytest.raises(ValueError, match="`--aspect_ratio_buckets` was 8,8;8,16;16,8 and is None now"):
        train("sd", images, tmp_path / "run", base, *LONG, "--resume_from_checkpoint", "latest")


def test_cached_latents_train_what_images_train(images, base, tmp_path):
    runs = [
        train("sd", images, tmp_path / str(len(flags)), base, *BUCKETS, "--center_crop", *flags)
        for flags in ((), ("--cache_latents",))
    ]
    # Latents are rounded by the batch that they are encoded in, and Adam divides by small gradients.
    assert_close_weights(*(weights(run, "unet") for run in runs), 1e-4)


def test_squares_alone_are_trained_as_without_buckets(base, tmp_path):
    images = make_captioned_images(tmp_path / "images", count=6)
    for path in images.glob("*.png"):
        Image.open(path).crop((0, 0, 8, 8)).resize((10, 10)).save(path)
    runs = [train("sd", images, tmp_path / str(len(flags)), base, *flags, "--random_flip") for flags in ((), BUCKETS)]
    assert_equal_weights(*runs, "unet")


def test_sizes_that_a_denoiser_has_no_positions_for_are_refused_before_it_is_loaded(images, tmp_path, monkeypatch):
    base, cls = FAMILIES["sd3"].save_plain(tmp_path / "base"), FAMILIES["sd3"].family.routed_class
    monkeypatch.setattr(cls, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="`--aspect_ratio_buckets` must be at most"):
        train("sd3", images, tmp_path / "run", base, "--aspect_ratio_buckets", "8,8;8,4096")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_that_accumulates(images, base, tmp_path):
    source = ("--pretrained_model_name_or_path", base)
    flags = (*BUCKETS, *LONG, "--train_batch_size", 2)
    argv = arguments(images, tmp_path / "two", *flags, source=source)
    finish(launch(argv, num_processes=2, script=SCRIPT))
    one = train("sd", images, tmp_path / "one", base, *flags, "--gradient_accumulation_steps", 2)
    assert_close_weights(weights(tmp_path / "two", "unet"), weights(one, "unet"))
