"""Training from a stream: what of a run from a folder, and of an unbroken run, it is equal to."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_engines import start
from text_to_image_runs import FAMILIES, SCRIPT
from training_runs import SCRIPT as CLASS_CONDITIONAL
from training_runs import (
    arguments,
    assert_close_weights,
    assert_equal_weights,
    finish,
    load_script,
    make_images,
    record,
    run_main,
    same_weights,
    train,
    weights,
)

from diffusers_dtr.training.data.samples import TrainingBatches


sys.path.append(str(Path(__file__).parents[1] / "training"))

from streams import grey, make_parquet, make_tars


pytestmark = pytest.mark.usefixtures("one_thread", "short_ends")

FILES = ("--streaming", "--shuffle_buffer_size", 1)
COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images in a folder, and in parquet files in the order in which a run of seed 0 first sees them."""
    folder = tmp_path_factory.mktemp("data")
    paths = sorted(make_images(folder / "images").rglob("*.png"))
    sampler = TrainingBatches(COUNT, COUNT, seed=0)
    paths = [paths[index] for _, index in sampler.batch(0)]
    images = [Image.open(path) for path in paths]
    make_parquet(folder / "parquet", images, ["abc".index(path.parent.name) for path in paths])
    return folder


def streamed_arguments(folder: Path, output_dir: Path, *flags: object) -> list[str]:
    argv = arguments(folder / "images", output_dir, "--center_crop", "--max_train_steps", 6, *flags)
    place = argv.index("--train_data_dir")
    argv[place : place + 2] = ["--dataset_name", str(folder / "parquet")]
    return argv


def stream(folder: Path, output_dir: Path, *flags: object) -> Path:
    return run_main(load_script(CLASS_CONDITIONAL), streamed_arguments(folder, output_dir, *flags))


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory) -> Path:
    """Beyond an epoch, which is of six steps."""
    flags = (*FILES, "--max_train_steps", 8, "--checkpointing_steps", 4)
    return stream(folder, tmp_path_factory.mktemp("runs") / "unbroken", *flags)


def test_a_stream_in_the_order_of_the_folder_trains_the_same_to_the_bit(folder, tmp_path):
    flags = ("--center_crop", "--max_train_steps", 6, "--validation_data_dir", folder / "images")
    from_folder = train(folder / "images", tmp_path / "folder", *flags)
    flags = (*FILES, "--validation_split", "train", "--dataloader_num_workers", 1)
    streamed = stream(folder, tmp_path / "streamed", *flags)
    assert_equal_weights(streamed, from_folder)
    assert "num_images" not in record(streamed)
    held_out = [record(run)["results"]["validation_loss"] for run in (streamed, from_folder)]
    assert held_out[0] == pytest.approx(held_out[1], rel=0.1)  # the same images with other noise
    assert not same_weights(streamed, stream(folder, tmp_path / "shuffled", "--streaming"))


def test_without_a_buffer_a_run_goes_on_to_the_bit_with_any_number_of_workers(folder, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken / "checkpoint-4", run / "checkpoint-4")
    more = ("--dataloader_num_workers", 2, "--resume_from_checkpoint", "latest")
    stream(folder, run, *FILES, "--max_train_steps", 8, *more)
    assert_equal_weights(run, unbroken)


def test_with_a_buffer_a_run_goes_on_with_other_images_of_the_epoch(folder, tmp_path):
    flags = ("--streaming", "--shuffle_buffer_size", 6, "--checkpointing_steps", 3)
    one, other = (stream(folder, tmp_path / name, *flags) for name in ("one", "other"))
    assert_equal_weights(one, other)
    run = tmp_path / "run"
    shutil.copytree(one / "checkpoint-3", run / "checkpoint-3")
    stream(folder, run, *flags, "--resume_from_checkpoint", "latest")
    assert not same_weights(run, one)


def test_a_run_from_a_folder_does_not_go_on_as_a_stream(folder, tmp_path):
    run = train(folder / "images", tmp_path / "run")
    with pytest.raises(ValueError, match="`--streaming` was False and is True now"):
        stream(folder, run, *FILES, "--resume_from_checkpoint", "latest")
    flags = ("--resume_from_checkpoint", "latest", "--allow_changed_settings")
    with pytest.raises(ValueError, match="`--streaming` must go on as it was"):
        stream(folder, run, *FILES, *flags)


def test_tars_with_captions_train_text_to_image(tmp_path):
    captions = [f"number {number}" for number in range(8)]
    tars = make_tars(tmp_path / "tars", [grey(number) for number in range(8)], [0] * 8, captions)
    base = FAMILIES["pixart"].save_plain(tmp_path / "base")
    argv = ["--pretrained_model_name_or_path", base, "--dataset_name", tars, "--image_column", "png"]
    argv += ["--caption_column", "txt", "--streaming", "--validation_prompts", "one", "--resolution", 8]
    argv += ["--train_batch_size", 4, "--max_train_steps", 2, "--num_validation_images", 1, "--report_to", "none"]
    argv += ["--validation_num_inference_steps", 2, "--max_sequence_length", 16, "--output_dir", tmp_path / "run"]
    run = run_main(load_script(SCRIPT), [*map(str, argv)])
    assert json.loads((run / "checkpoint-2" / "training_state.json").read_text())["streams"][0]["epoch"] == 0
    assert (run / "model_index.json").exists()


TWO = (*FILES, "--checkpointing_steps", 2, "--max_train_steps", 4)


@pytest.fixture(scope="module")
def unbroken_of_two(folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken of two"
    finish(start("ddp", CLASS_CONDITIONAL, streamed_arguments(folder, run, *TWO)))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_two_processes_share_a_stream_and_go_on_to_the_bit_but_not_as_one(engine, folder, unbroken_of_two, tmp_path):
    run, resumed = tmp_path / "run", (*TWO, "--resume_from_checkpoint", "latest")
    finish(start(engine, CLASS_CONDITIONAL, streamed_arguments(folder, run, *TWO, "--max_train_steps", 2)))
    states = json.loads((run / "checkpoint-2" / "training_state.json").read_text())["streams"]
    assert [state["place"] for state in states] == [8, 8]
    shutil.copytree(run, tmp_path / "alone")
    with pytest.raises(ValueError, match="the checkpoint is of 2 processes that streamed, and this run has 1"):
        stream(folder, tmp_path / "alone", *resumed)
    finish(start(engine, CLASS_CONDITIONAL, streamed_arguments(folder, run, *resumed)))
    assert_close_weights(weights(run), weights(unbroken_of_two), 0 if engine == "ddp" else 1e-5)
