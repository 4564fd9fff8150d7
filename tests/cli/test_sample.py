"""`diffusers-dtr sample`: grids from folders and from a Hub."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from tiny_dit import routed_dit

from diffusers_dtr import DTRPipeline
from diffusers_dtr.cli import main


SIZE = 8
GAP = 6


@pytest.fixture
def pipeline():
    """Of pixels, with five classes; class 0 is called "1"."""
    model = routed_dit(in_channels=3, out_channels=3)
    return DTRPipeline(DDIMScheduler(), transformer=model, id2label={0: "1", 1: "cat, tabby", 2: "golden retriever"})


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def path(tmp_path):
    """The grid's."""
    return tmp_path / "new" / "grid.png"


def sample(folder, path, *arguments, num_images=1):
    """The grid's images before they were enlarged, `(rows, columns, height, width, channels)`."""
    flags = ["--num_inference_steps", "2", "--num_images", str(num_images), "--output", str(path)]
    assert main(["sample", str(folder), *flags, *arguments]) == 0
    columns = num_images if "--labels" in arguments else math.ceil(math.sqrt(num_images))
    grid = np.asarray(Image.open(path)).astype(int)
    scale = max(1, round(400 / (columns * SIZE)))
    step = SIZE * scale + GAP
    names = grid.shape[1] - columns * step + GAP
    rows, lefts = range(0, grid.shape[0], step), range(names, grid.shape[1], step)
    return np.stack(
        [[grid[top : top + step - GAP : scale, left : left + step - GAP : scale] for left in lefts] for top in rows]
    )


def expected(pipeline, label, seed=0, **arguments):
    """An image on its own."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    image = pipeline(label, num_inference_steps=2, generator=generator, **arguments).images[0]
    return np.asarray(image).astype(int)


def same(image, other):
    """Up to the rounding of a batch."""
    return abs(image - other).max() <= 1


def test_a_grid_has_a_row_of_images_for_every_label(folder, pipeline, path):
    grid = sample(folder, path, "--labels", "tabby", "4", "--seed", "7", num_images=3)
    assert grid.shape[:2] == (2, 3)
    for row, label in enumerate((1, 4)):
        for column in range(3):
            assert same(grid[row, column], expected(pipeline, label, 7 + column))
    assert not same(grid[0, 0], grid[0, 1])


def test_a_label_is_a_name_before_it_is_a_number(folder, pipeline, path):
    grid = sample(folder, path, "--labels", "1", "--labels", "golden retriever")
    assert same(grid[0, 0], expected(pipeline, 0))
    assert same(grid[1, 0], expected(pipeline, 2))


def test_images_without_labels_fill_a_square(folder, pipeline, path):
    grid = sample(folder, path, "--max_batch_size", "2", num_images=3)
    assert grid.shape[:2] == (2, 2)
    assert same(grid[1, 0], expected(pipeline, None, 2))
    assert (grid[1, 1] == 255).all()


@pytest.mark.parametrize(
    ("changed", "dtype"),
    [
        ({"guidance_scale": 4.0}, "float32"),
        ({"guidance_scale": 4.0, "guidance_interval": (0, 100)}, "float32"),
        ({"scheduler": DDPMScheduler}, "float32"),
        ({}, "bfloat16"),
    ],
    ids=str,
)
def test_every_option_is_used(folder, pipeline, path, changed, dtype):
    texts = {name: "DDPMScheduler" if name == "scheduler" else value for name, value in changed.items()}
    flags = [part for name, value in texts.items() for part in (f"--{name}", *map(str, np.ravel(value)))]
    image = sample(folder, path, *flags, "--labels", "3", "--device", "cpu", "--dtype", dtype)[0, 0]
    # Loaded in its precision: a cast would round the positions too, which are not weights.
    loaded = DTRPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    if "scheduler" in changed:
        loaded.scheduler = changed.pop("scheduler").from_config(loaded.scheduler.config)
    assert same(image, expected(loaded, 3, **changed))
    assert (image != expected(pipeline, 3)).any()


def test_a_private_repository_is_sampled_at_a_revision(hub, pipeline, path, monkeypatch):
    pipeline.push_to_hub("owner/model", private=True)
    revision = hub.repos["models", "owner/model"].resolve("main").sha
    DTRPipeline(DDIMScheduler(), transformer=routed_dit(in_channels=3, num_layers=1)).push_to_hub("owner/model")
    monkeypatch.delenv("HF_TOKEN")
    assert main(["sample", "owner/model", "--output", str(path)]) == 2
    grid = sample("owner/model", path, "--labels", "3", "--revision", revision, "--token", "hf_owner")
    assert same(grid[0, 0], expected(pipeline, 3))


def test_a_torch_that_is_built_for_a_gpu_does_without_one(folder, path, monkeypatch):
    def current_accelerator(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert sample(folder, path, "--labels", "0").shape[:2] == (1, 1)


def test_rows_have_the_names_of_their_classes(folder, tmp_path):
    for name, label in (("short", "3"), ("long", "golden retriever")):
        sample(folder, tmp_path / f"{name}.png", "--labels", label)
    short, long = (Image.open(tmp_path / name) for name in ("short.png", "long.png"))
    assert short.width < long.width
    assert np.asarray(long)[:, :50].min() == 0, "black on white"


def test_unconditional_pipelines_of_diffusers_are_sampled(tmp_path, path):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(8, **blocks, layers_per_block=1, norm_num_groups=4)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "p")
    assert sample(tmp_path / "p", path, num_images=2).shape == (1, 2, 8, 8, 3)
