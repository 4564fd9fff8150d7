"""`diffusers-dtr sample`: grids from folders and from a Hub."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from tiny_dit import routed_dit

from diffusers_dtr import DTRPipeline
from diffusers_dtr.cli import main


SIZE = 8


@pytest.fixture
def pipeline():
    """Of pixels, with five classes; class 0 is called "1"."""
    model = routed_dit(in_channels=3, out_channels=3)
    return DTRPipeline(DDIMScheduler(), transformer=model, id2label={0: "1", 1: "cat, tabby", 2: "golden retriever"})


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def sample(folder, output, *arguments):
    code = main(["sample", str(folder), "--num_inference_steps", "2", "--output", str(output), *arguments])
    assert code == 0
    return tiles(output)


def tiles(path):
    """The grid's images, `(rows, columns, height, width, channels)`."""
    grid = np.asarray(Image.open(path)).astype(int)
    rows, columns = (length // SIZE for length in grid.shape[:2])
    return grid.reshape(rows, SIZE, columns, SIZE, 3).swapaxes(1, 2)


def expected(pipeline, label, seed, **arguments):
    """An image on its own."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    image = pipeline(label, num_inference_steps=2, generator=generator, **arguments).images[0]
    return np.asarray(image).astype(int)


def same(image, other):
    """Up to the rounding of a batch."""
    return abs(image - other).max() <= 1


def test_a_grid_has_a_row_of_images_for_every_label(folder, pipeline, tmp_path):
    grid = sample(folder, tmp_path / "new" / "grid.png", "--labels", "tabby", "4", "--num_images", "3", "--seed", "7")
    assert grid.shape[:2] == (2, 3)
    for row, label in enumerate((1, 4)):
        for column in range(3):
            assert same(grid[row, column], expected(pipeline, label, 7 + column))
    assert not same(grid[0, 0], grid[0, 1])


def test_a_label_is_a_name_before_it_is_a_number(folder, pipeline, tmp_path):
    grid = sample(folder, tmp_path / "g.png", "--labels", "1", "--labels", "golden retriever", "--num_images", "1")
    assert same(grid[0, 0], expected(pipeline, 0, 0))
    assert same(grid[1, 0], expected(pipeline, 2, 0))


def test_images_without_labels_fill_a_square(folder, pipeline, tmp_path):
    grid = sample(folder, tmp_path / "grid.png", "--num_images", "3", "--max_batch_size", "2")
    assert grid.shape[:2] == (2, 2)
    assert same(grid[1, 0], expected(pipeline, None, 2))
    assert not grid[1, 1].any()


def test_the_same_command_writes_the_same_file(folder, tmp_path):
    for name in ("first.png", "second.png"):
        sample(folder, tmp_path / name, "--labels", "3")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_guidance_and_scheduler_are_used(folder, pipeline, tmp_path):
    grid = sample(
        folder, tmp_path / "grid.png", "--labels", "3", "--guidance_scale", "4", "--scheduler", "DDPMScheduler"
    )
    assert not same(grid[0, 0], expected(pipeline, 3, 0, guidance_scale=4.0))
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert same(grid[0, 0], expected(pipeline, 3, 0, guidance_scale=4.0))
    assert not same(grid[0, 0], expected(pipeline, 3, 0))


def test_precision_is_used(folder, tmp_path):
    grid = sample(folder, tmp_path / "grid.png", "--labels", "3", "--dtype", "bfloat16", "--num_images", "1")
    # Loaded in it: a cast would round the positions too, which are not weights.
    loaded = DTRPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert same(grid[0, 0], expected(loaded, 3, 0))


def test_a_repository_is_sampled_at_a_revision(hub, pipeline, tmp_path):
    pipeline.push_to_hub("owner/model", private=True)
    revision = hub.repos["models", "owner/model"].resolve("main").sha
    DTRPipeline(DDIMScheduler(), transformer=routed_dit(in_channels=3, num_layers=1)).push_to_hub("owner/model")
    grid = sample("owner/model", tmp_path / "grid.png", "--labels", "3", "--revision", revision)
    assert same(grid[0, 0], expected(pipeline, 3, 0))


def test_a_given_token_is_used(hub, pipeline, tmp_path, monkeypatch):
    pipeline.push_to_hub("owner/model", private=True)
    monkeypatch.delenv("HF_TOKEN")
    assert main(["sample", "owner/model", "--output", str(tmp_path / "grid.png")]) == 2
    sample("owner/model", tmp_path / "grid.png", "--token", "hf_owner")


def test_nothing_is_written_over(folder, tmp_path, capsys):
    (tmp_path / "grid.png").write_text("mine")
    assert main(["sample", str(folder), "--output", str(tmp_path / "grid.png")]) == 2
    assert "grid.png' exists already" in capsys.readouterr().err
    assert (tmp_path / "grid.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "dog"], "`class_labels` has no class named 'dog'. Known names: 1, cat"),
        (["--labels", "6"], "`class_labels` must be in [0, 5], got 6."),
        (["--guidance_scale", "2"], "`guidance_scale`=2.0, which is above 1, needs `class_labels`"),
        (["--output", "grid.jpeg"], "The output must end in `.png`, got 'grid.jpeg'."),
    ],
)
def test_what_cannot_be_sampled_is_one_line_on_stderr(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(folder), *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("diffusers-dtr sample: ")
    assert message in last
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_an_unknown_scheduler_is_refused_before_anything_is_loaded(capsys):
    for name in ("Foo", "DDPMPipeline", "utils"):
        with pytest.raises(SystemExit, match="2"):
            main(["sample", "owner/none", "--scheduler", name])
        assert f"must be a scheduler of diffusers, such as DDIMScheduler, got '{name}'" in capsys.readouterr().err


def test_a_torch_that_is_built_for_a_gpu_does_without_one(folder, tmp_path, monkeypatch):
    built_for = torch.device("cuda")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: None if check_available else built_for
    )
    assert sample(folder, tmp_path / "grid.png", "--num_images", "1", "--labels", "0").shape[:2] == (1, 1)


def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(folder, tmp_path, capsys):
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(SystemExit, match="2"):
            main(["sample", "owner/none", "--device", name])
        assert f"must be a device of this machine, such as cpu, got '{name}'" in capsys.readouterr().err
    sample(folder, tmp_path / "grid.png", "--device", "cpu")
