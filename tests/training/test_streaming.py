"""Streams of images: their order, who sees what of it, and where a run goes on."""

import json
from functools import partial
from itertools import chain, islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi
from run_config import run_config
from streams import grey, make_parquet, make_tars

from diffusers_dtr.training.config import LabelledDataConfig
from diffusers_dtr.training.data import build_loader, load_data, load_images
from diffusers_dtr.training.data.streaming import StreamedBatches


pytestmark = pytest.mark.usefixtures("short_ends")

cpu = partial(Accelerator, cpu=True)  # each test its own: others forget the state that all share
ROWS = 12


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    captions = [f"number {number}" for number in range(ROWS)]
    rows = [grey(number) for number in range(ROWS)], [number % 3 for number in range(ROWS)]
    return make_parquet(tmp_path_factory.mktemp("data") / "parquet", *rows, text=captions)


def config_of(folder: Path | str, **options):
    common = {"resolution": 8, "center_crop": True, "max_train_steps": 9, "train_batch_size": 4, "streaming": True}
    common |= {"cache_dir": str(Path(folder).parent / "cache"), "validation_prompts": ["one"]}
    return run_config(dataset_name=str(folder), **{**common, **options})


def batches(folder: Path, buffer_size: int = 1, **options) -> StreamedBatches:
    stream = load_images(config_of(folder)).dataset
    return StreamedBatches(stream, 4, **{"seed": 0, "buffer_size": buffer_size, "ahead": 5, **options})


def numbers(found: list[list[tuple]]) -> list[int]:
    return [int(row["text"].split()[1]) for batch in found for _, _, row in batch]


def rows(found: list[list[tuple]]) -> list[tuple]:
    return [(epoch, index, row["text"], row["image"]["bytes"]) for epoch, index, row in chain(*found)]


def first(stream: StreamedBatches, count: int) -> list[list[tuple]]:
    return list(islice(iter(stream), count))


def test_a_buffer_of_one_keeps_the_order_of_the_files_in_every_epoch_which_batches_may_span(parquet):
    found = first(batches(parquet), 4)
    assert numbers(found) == [*range(ROWS), *range(4)]
    assert [item[:2] for batch in found for item in batch] == [divmod(place, ROWS) for place in range(16)]
    assert numbers(first(StreamedBatches(batches(parquet).rows, 5, seed=0, buffer_size=1), 3)) == [*range(12), 0, 1, 2]


def test_a_larger_buffer_shuffles_every_epoch_by_the_seed(parquet):
    epochs = numbers(first(batches(parquet, 8), 6))
    assert sorted(epochs[:ROWS]) == sorted(epochs[ROWS:]) == list(range(ROWS))
    assert list(range(ROWS)) != epochs[:ROWS] != epochs[ROWS:]
    assert epochs == numbers(first(batches(parquet, 8), 6))
    assert epochs != numbers(first(batches(parquet, 8, seed=1), 6))


@pytest.mark.parametrize(
    ("processes", "parts"), [(2, [[0, 1, 2, 3], [6, 7, 8, 9]]), (3, [[0, 3, 6, 9], [1, 4, 7, 10]])]
)
def test_processes_share_files_if_they_can_be_shared_out_and_rows_if_not(processes, parts, parquet):
    streams = [batches(parquet, num_processes=processes, process_index=number) for number in range(processes)]
    for stream, part in zip(streams, parts, strict=False):
        assert numbers(first(stream, 1)) == part
    places = [item[:2] for stream in streams for batch in first(stream, 1) for item in batch]
    assert len({*places}) == 4 * processes  # each has augmentations of its own


@pytest.mark.parametrize("step", range(7))
def test_without_a_buffer_a_stream_goes_on_to_the_bit_at_any_step(step, parquet):
    whole = batches(parquet)
    running = iter(whole)
    found = [next(running) for _ in range(step + 2)]  # workers are ahead of training
    state = json.loads(json.dumps(whole.state_at(step)))
    resumed = batches(parquet, start_step=step, state=state)
    assert first(resumed, 2) == found[step:]
    again = batches(parquet, start_step=step + 1, state=resumed.state_at(step + 1))
    assert first(again, 1) == found[step + 1 :]


@pytest.mark.parametrize("step", [1, 2])
def test_of_a_buffer_no_more_than_its_size_is_passed_over_or_repeated_and_the_next_epoch_is_whole(step, parquet):
    whole = batches(parquet, 3)
    running = iter(whole)
    found = [next(running) for _ in range(6)]
    later = first(batches(parquet, 3, start_step=step, state=whole.state_at(step)), 5)
    epochs = [
        [{row["text"] for epoch, _, row in items if epoch == wanted} for wanted in (0, 1)]
        for items in ([*chain(*found[:step])], [*chain(*later)])
    ]
    seen, rest = epochs[0][0], epochs[1][0]
    assert len(seen & rest) <= 3
    assert 0 < ROWS - len(seen | rest) <= 3
    second = [row["text"] for epoch, _, row in chain(*found) if epoch == 1]
    resumed = [row["text"] for epoch, _, row in chain(*later) if epoch == 1]
    count = min(len(second), len(resumed))
    assert count > 0
    assert resumed[:count] == second[:count]


def test_a_stream_of_the_hub_is_that_of_its_files_and_goes_on_to_the_bit(hub, parquet, tmp_path):
    HfApi().create_repo("owner/data", repo_type="dataset", private=True)
    HfApi().upload_folder(repo_id="owner/data", folder_path=parquet, repo_type="dataset")
    images = load_images(config_of("owner/data", cache_dir=str(tmp_path)))
    stream = partial(StreamedBatches, images.dataset, 4, seed=0, buffer_size=1)
    whole, found = stream(ahead=5), rows(first(batches(parquet), 5))
    assert rows(first(whole, 5)) == found
    assert rows(first(stream(start_step=2, state=whole.state_at(2)), 3)) == found[8:]


def test_workers_change_nothing(parquet):
    def samples(workers: int) -> list[dict]:
        config = config_of(parquet, random_flip=True, center_crop=False, dataloader_num_workers=workers)
        return list(islice(build_loader(config, load_data(config).dataset, cpu(), 0), 5))

    for one, other in zip(samples(0), samples(2), strict=True):
        assert one["caption"] == other["caption"]
        assert all(torch.equal(one[name], other[name]) for name in ("pixel_values", "labels", "epoch", "index"))


def test_a_stream_of_parquet_is_what_is_loaded_whole(parquet):
    config = config_of(parquet, shuffle_buffer_size=1, validation_split="train", max_held_out_images=5)
    streamed, whole = load_data(config), load_data(config.replace(streaming=False, shuffle_buffer_size=1000))
    assert streamed.num_classes == whole.num_classes == 3
    assert streamed.images.id2label == whole.images.id2label
    assert streamed.images.classes == whole.images.classes
    batch = next(iter(build_loader(config, streamed.dataset, cpu(), 0)))
    for place in range(4):
        sample = whole.dataset[0, place]
        assert torch.equal(batch["pixel_values"][place], sample["pixel_values"])
        assert batch["labels"][place] == sample["labels"]
        assert batch["caption"][place] == sample["caption"]
    assert len(streamed.held_out) == 5
    assert torch.equal(streamed.held_out[0, 4]["pixel_values"], whole.held_out[0, 4]["pixel_values"])


def test_tars_are_streamed_and_are_told_how_many_classes_there_are(tmp_path):
    captions = [f"number {number}" for number in range(ROWS)]
    rows = [grey(number) for number in range(ROWS)], [number % 3 for number in range(ROWS)]
    folder = make_tars(tmp_path / "tars", *rows, captions)
    columns = {"image_column": "png", "label_column": "cls", "caption_column": "txt"}
    with pytest.raises(ValueError, match="`--num_classes` must be that of the data, got None: 'cls' does not say"):
        load_images(config_of(folder, **columns))
    config = config_of(folder, **columns, num_classes=3, shuffle_buffer_size=1)
    batch = next(iter(build_loader(config, load_data(config).dataset, cpu(), 0)))
    assert batch["labels"].tolist() == [0, 1, 2, 0]
    assert batch["caption"] == captions[:4]
    few = config.replace(num_classes=2)
    with pytest.raises(ValueError, match=r"must hold labels in \[0, 2\), got 2 in 'cls'"):
        next(iter(build_loader(few, load_data(few).dataset, cpu(), 0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_column": "png"},
            "`image_column` must be one of the dataset's columns, image, label, text, got 'png'",
        ),
        ({"label_column": "text"}, "`label_column` must hold class labels or integers"),
        ({"caption_column": "label"}, "`caption_column` must hold strings"),
        ({"num_classes": 4}, "`--num_classes` must be that of the data, got 4: 'label' has 3 classes"),
    ],
)
def test_columns_are_checked_before_training(options, message, parquet):
    with pytest.raises(ValueError, match=message):
        load_images(config_of(parquet, **options))


def test_a_process_without_rows_is_told(tmp_path):
    folder = make_parquet(tmp_path / "one", [grey(0), grey(1)], [0, 1], files=1, text=["a 0", "a 1"])
    stream = batches(folder, num_processes=3, process_index=2)
    with pytest.raises(ValueError, match="must have a row for each of 3 processes, and process 2 found none"):
        next(iter(stream))


def without_rows(file: Path) -> None:
    pq.write_table(pq.read_table(file).slice(0, 0), file)


def with_other_pages(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:4] + bytes(200) + content[204:])


@pytest.mark.parametrize("damage", [without_rows, with_other_pages])
def test_a_file_that_cannot_be_read_is_told(damage, tmp_path):
    folder = make_parquet(tmp_path / "two", [grey(0), grey(1)], [0, 1], files=2, text=["a 0", "a 1"])
    damage(sorted(folder.glob("*.parquet"))[-1])
    with pytest.raises(ValueError, match=r"must have readable files: .*[^.]\. Take out one that is damaged or"):
        first(batches(folder), 1)


@pytest.mark.parametrize("states", [[], [{}, {}]])
def test_a_stream_goes_on_with_as_many_processes_as_it_had(states, parquet):
    config = config_of(parquet)
    with pytest.raises(ValueError, match="`--streaming` must go on as it was, on as many processes"):
        build_loader(config, load_data(config).dataset, cpu(), 3, states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train_steps": None}, "`--streaming` needs --max_train_steps"),
        ({"validation_epochs": 1}, "`--streaming` needs --validation_steps in place of"),
        ({"cache_text_embeddings": True}, "`--cache_text_embeddings` does not go with --streaming"),
        ({"validation_prompts": None}, "`--streaming` needs --validation_prompts"),
        ({"cache_latents": True}, "`--cache_latents` has an effect without --streaming only"),
        ({"max_train_samples": 3}, "`--max_train_samples` has an effect without --streaming only"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(options, message, parquet):
    with pytest.raises(ValueError, match=message):
        config_of(parquet, **options)


def test_a_stream_is_of_a_dataset_and_its_options_are_of_a_stream():
    with pytest.raises(ValueError, match="`--streaming` needs --dataset_name"):
        LabelledDataConfig(train_data_dir="images", streaming=True)
    for options in ({"shuffle_buffer_size": 5}, {"num_classes": 3}):
        with pytest.raises(ValueError, match="has an effect with --streaming only"):
            LabelledDataConfig(dataset_name="owner/data", **options)
