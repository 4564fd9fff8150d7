"""Nobody is warned of what they can do nothing about."""

import logging
import warnings
from contextlib import contextmanager

import pytest
from diffusers import DiffusionPipeline
from text_to_image_runs import FAMILIES, make_captioned_images
from text_to_image_runs import train as train_text_to_image
from training_runs import make_images, train

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.cli import main


LIBRARIES = ("diffusers", "transformers", "accelerate", "datasets", "huggingface_hub", "peft", "diffusers_dtr")


@contextmanager
def no_warnings():
    """Fails with all that is warned of inside, by Python's warnings or by the loggers of the libraries."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(f"{record.name}: {record.getMessage()}")
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does
        yield
    for logger in loggers:
        logger.removeHandler(handler)
    records += [f"{warning.filename}: {warning.message}" for warning in caught]
    assert "\n".join(records) == ""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    images = make_images(tmp_path_factory.mktemp("data") / "images")
    with no_warnings():
        folder = tmp_path_factory.mktemp("runs") / "run"
        flags = ["--use_ema", "--checkpointing_steps", 2, "--validation_data_dir", images]
        train(images, folder, *flags)
        train(images, folder, *flags, "--resume_from_checkpoint", "latest", "--max_train_steps", 4)
        source = ("--pretrained_model_name_or_path", folder)
        train(images, folder.with_name("fine"), *flags, "--random_flip", source=source)
    return folder


def test_training_resuming_and_fine_tuning_warn_of_nothing(run):
    pass  # `run` does


def test_loading_and_sampling_warn_of_nothing(run, tmp_path):
    with no_warnings():
        DTRPipeline.from_pretrained(run)
        DTRPipeline.from_pretrained(run, id2label={0: "x", 1: "y", 2: "z"})
        DiffusionPipeline.from_pretrained(run).save_pretrained(tmp_path / "again")
        DTRTransformer2DModel.from_pretrained(run / "checkpoint-2" / "transformer_ema")
        main(["inspect", str(run)])
        main(["convert", str(run), str(tmp_path / "converted")])
        main(["sample", str(run), "--labels", "a", "--num_inference_steps", "2", "--output", str(tmp_path / "a.png")])


@pytest.mark.parametrize(("name", "options"), [("sd", ()), ("sd3", ("--max_sequence_length", 16))])
def test_text_to_image_warns_of_nothing(name, options, tmp_path):
    images, plain = make_captioned_images(tmp_path / "images"), FAMILIES[name].save_plain(tmp_path / "plain")
    with no_warnings():
        train_text_to_image(name, images, tmp_path / "run", plain, *options)
        train_text_to_image(name, images, tmp_path / "lora", plain, *options, "--rank", 2, "--mixed_precision", "bf16")
