"""Runs of the text-to-image and text-to-video scripts from tiny pipelines of the families that people fine-tune."""

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
from text_to_image_runs import SCRIPT, make_captioned_images, saved_weights
from training_runs import EXAMPLES, arguments, load_script, record, run_main


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_pipelines import PIPELINES

from diffusers_dtr.training.families import TEXT_TO_IMAGE_FAMILIES, TEXT_TO_VIDEO_FAMILIES


pytestmark = pytest.mark.usefixtures("one_thread")

VIDEO_SCRIPT = EXAMPLES / "text_to_video" / "train_text_to_video.py"
# Everything that draws at random, or has a state.
EVERYTHING = [
    *("--max_train_steps", 4, "--checkpointing_steps", 2, "--proportion_empty_prompts", 0.3, "--random_flip"),
    *("--routing_warmup_steps", 3, "--num_clusters", 2, "--balancing", "uncertainty", "--learning_rate", 1e-3),
    "--cache_text_embeddings",
]
WAYS = {"whole": ("--use_ema", "--gradient_checkpointing"), "lora": ("--rank", 2)}


def is_video(name):
    return PIPELINES[name].pipeline_class in TEXT_TO_VIDEO_FAMILIES


def family_of(tiny):
    families = {**TEXT_TO_IMAGE_FAMILIES, **TEXT_TO_VIDEO_FAMILIES}
    clip = (5, 25.0) if tiny.pipeline_class in TEXT_TO_VIDEO_FAMILIES else ()
    return families[tiny.pipeline_class](tiny.size, *clip)


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


def train(name, data, output_dir, base, *flags):
    tiny = PIPELINES[name]
    source = ["--pretrained_model_name_or_path", base]
    if tiny.max_sequence_length is not None:
        source += ["--max_sequence_length", tiny.max_sequence_length]
    own = ("--num_frames", 5, "--train_batch_size", 2) if is_video(name) else ("--center_crop", "--cache_latents")
    script = load_script(VIDEO_SCRIPT if is_video(name) else SCRIPT)
    return run_main(script, arguments(data, output_dir, "--resolution", tiny.size, *own, *flags, source=source))


def sample(pipeline, tiny):
    pipeline.set_progress_bar_config(disable=True)
    call = {**tiny.call, "generator": torch.Generator().manual_seed(0), "output_type": "pt", "return_dict": False}
    return pipeline(prompt=["a two"] * 3, **call)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("way", WAYS)
def test_run_resumes_to_the_bit_and_its_result_samples_in_its_own_pipeline(name, way, tmp_path):
    tiny, base = PIPELINES[name], tmp_path / "base"
    data = (make_videos if is_video(name) else make_captioned_images)(tmp_path / "data")
    tiny.pipeline().save_pretrained(base)
    flags = [*EVERYTHING, *WAYS[way], "--validation_data_dir", data]
    whole = train(name, data, tmp_path / "whole", base, *flags)
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-2", run / "checkpoint-2")
    train(name, data, run, base, *flags, "--resume_from_checkpoint", "latest")
    one, other = saved_weights(run), saved_weights(whole)
    assert one
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], value) for key, value in other.items())
    assert record(run)["results"]["validation_loss"] > 0
    (grid,) = (run / "samples").glob("*.png")
    # Three images, or strips of five frames
    assert Image.open(grid).size == (2 * tiny.size * (5 if is_video(name) else 1), 2 * tiny.size)

    cls, family = getattr(diffusers, tiny.pipeline_class), family_of(tiny)
    before = sample(cls.from_pretrained(base), tiny)
    if way == "whole":
        trained = DiffusionPipeline.from_pretrained(run)
        assert type(trained) is cls
    else:
        trained = cls.from_pretrained(base)
        routing = {key: value for key, value in record(run)["model"]["config"].items() if key.startswith("routing_")}
        convert = getattr(family.routed_class, f"from_{family.denoiser}")
        setattr(trained, family.denoiser, convert(getattr(trained, family.denoiser), **routing))
        trained.load_lora_weights(run)
    assert type(getattr(trained, family.denoiser)).__name__ == f"DTR{tiny.denoiser_class}"
    after = sample(trained, tiny)
    assert after.isfinite().all()
    assert not torch.equal(after, before)


@pytest.fixture
def wan(tmp_path):
    PIPELINES["wan"].pipeline().save_pretrained(tmp_path / "base")
    make_videos(tmp_path / "videos")
    return lambda *flags: train("wan", tmp_path / "videos", tmp_path / "run", tmp_path / "base", *flags)


def test_routed_adapters_leave_the_denoiser_unrouted(wan):
    run = wan("--rank", 2, "--route_lora", "--max_train_steps", 1)
    assert record(run)["model"]["config"]["routing_type"] == "none"


def test_numbers_of_frames_that_latents_do_not_fill_are_refused(wan):
    with pytest.raises(ValueError, match="`--num_frames` must be 1 more than a multiple of 2, got 4"):
        wan("--num_frames", 4)


def test_pipeline_with_two_denoisers_is_refused(wan, tmp_path):
    pipeline = PIPELINES["wan"].pipeline()
    WanPipeline(**pipeline.components, boundary_ratio=0.9).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="must have one denoiser, got a pipeline with one of high and one of low"):
        wan()
