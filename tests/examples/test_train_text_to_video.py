"""Runs of the text-to-video script from tiny pipelines of its families."""

import json
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file
from training_runs import EXAMPLES, arguments, load_script, record, run_main


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_pipelines import PIPELINES

from diffusers_dtr.training.families import TEXT_TO_VIDEO_FAMILIES


SCRIPT = EXAMPLES / "text_to_video" / "train_text_to_video.py"
NAMES = [name for name, tiny in PIPELINES.items() if tiny.pipeline_class in TEXT_TO_VIDEO_FAMILIES]
# Everything that draws at random, or has a state.
EVERYTHING = [
    *("--max_train_steps", 4, "--checkpointing_steps", 2, "--proportion_empty_prompts", 0.3, "--random_flip"),
    *("--routing_warmup_steps", 3, "--num_clusters", 2, "--balancing", "uncertainty", "--learning_rate", 1e-3),
    "--cache_text_embeddings",
]
WAYS = {"whole": ("--use_ema", "--gradient_checkpointing"), "lora": ("--rank", 2)}

pytestmark = pytest.mark.usefixtures("one_thread")


def make_videos(folder, count=4, num_frames=7):
    """Folders of noisy frames."""
    random, lines = np.random.default_rng(0), []
    for number in range(count):
        (folder / str(number)).mkdir(parents=True)
        for frame in range(num_frames):
            pixels = random.integers(40 * number, 40 * number + 100, (8, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(number) / f"{frame}.png")
        lines.append(json.dumps({"file_name": str(number), "text": f"number {'abcd'[number]}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def train(name, videos, output_dir, base, *flags):
    tiny = PIPELINES[name]
    length = ("--max_sequence_length", tiny.max_sequence_length)
    source = ("--pretrained_model_name_or_path", base, "--num_frames", 5, *length)
    flags = ("--resolution", tiny.size, "--train_batch_size", 2, *flags)
    return run_main(load_script(SCRIPT), arguments(videos, output_dir, *flags, source=source))


def sample(pipeline, tiny):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt="a two", **tiny.call, generator=generator, output_type="pt").frames


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_run_resumes_to_the_bit_and_its_result_samples_in_its_own_pipeline(name, way, tmp_path):
    tiny = PIPELINES[name]
    videos, base = make_videos(tmp_path / "videos"), tmp_path / "base"
    tiny.pipeline().save_pretrained(base)
    flags = [*EVERYTHING, *WAYS[way], "--validation_data_dir", videos]
    whole = train(name, videos, tmp_path / "whole", base, *flags)
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-2", run / "checkpoint-2")
    train(name, videos, run, base, *flags, "--resume_from_checkpoint", "latest")
    file = "pytorch_lora_weights.safetensors"
    file = file if way == "lora" else "transformer/diffusion_pytorch_model.safetensors"
    one, other = load_file(run / file), load_file(whole / file)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], value) for key, value in other.items())
    assert record(run)["results"]["validation_loss"] > 0
    (grid,) = (run / "samples").glob("*.png")
    assert Image.open(grid).size == (2 * 5 * tiny.size, 2 * tiny.size)  # three strips of five frames

    cls = getattr(diffusers, tiny.pipeline_class)
    before = sample(cls.from_pretrained(base), tiny)
    if way == "whole":
        trained = DiffusionPipeline.from_pretrained(run)
        assert type(trained) is cls
    else:
        trained = cls.from_pretrained(base)
        routing = {key: value for key, value in record(run)["model"]["config"].items() if key.startswith("routing_")}
        routed = TEXT_TO_VIDEO_FAMILIES[tiny.pipeline_class](tiny.size, 5, 25.0).routed_class
        trained.transformer = routed.from_transformer(trained.transformer, **routing)
        trained.load_lora_weights(run)
    assert type(trained.transformer).__name__ == f"DTR{tiny.denoiser_class}"
    assert not torch.equal(sample(trained, tiny), before)


def test_routed_adapters_leave_the_denoiser_unrouted(tmp_path):
    PIPELINES["wan"].pipeline().save_pretrained(tmp_path / "base")
    videos = make_videos(tmp_path / "videos")
    flags = ("--rank", 2, "--route_lora", "--max_train_steps", 1)
    run = train("wan", videos, tmp_path / "run", tmp_path / "base", *flags)
    assert record(run)["model"]["config"]["routing_type"] == "none"


def test_numbers_of_frames_that_latents_do_not_fill_are_refused(tmp_path):
    PIPELINES["wan"].pipeline().save_pretrained(tmp_path / "base")
    videos = make_videos(tmp_path / "videos")
    with pytest.raises(ValueError, match="`--num_frames` must be 1 more than a multiple of 2, got 4"):
        train("wan", videos, tmp_path / "run", tmp_path / "base", "--num_frames", 4)


def test_pipeline_with_two_denoisers_is_refused(tmp_path):
    pipeline = PIPELINES["wan"].pipeline()
    WanPipeline(**pipeline.components, boundary_ratio=0.9).save_pretrained(tmp_path / "base")
    videos = make_videos(tmp_path / "videos")
    with pytest.raises(ValueError, match="must have one denoiser, got a pipeline with one of high and one of low"):
        train("wan", videos, tmp_path / "run", tmp_path / "base")
