"""Runs of the text-to-image script from tiny pipelines of the families that people fine-tune."""

import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from text_to_image_runs import SCRIPT, make_captioned_images
from training_runs import arguments, load_script, record, run_main


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_pipelines import PIPELINES

from diffusers_dtr.training.families import TEXT_TO_IMAGE_FAMILIES


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
NAMES = [name for name, tiny in PIPELINES.items() if tiny.pipeline_class in TEXT_TO_IMAGE_FAMILIES]
every_family = pytest.mark.parametrize("name", NAMES)

# Everything that draws at random, or has a state.
EVERYTHING = [
    *("--max_train_steps", 4, "--checkpointing_steps", 2, "--proportion_empty_prompts", 0.3, "--random_flip"),
    *("--routing_warmup_steps", 3, "--num_clusters", 2, "--balancing", "uncertainty", "--learning_rate", 1e-3),
    *("--center_crop", "--cache_latents", "--cache_text_embeddings"),
]
WAYS = {"whole": ("--use_ema", "--gradient_checkpointing"), "lora": ("--rank", 2)}


def train(name, images, output_dir, base, *flags):
    tiny = PIPELINES[name]
    length = () if tiny.max_sequence_length is None else ("--max_sequence_length", tiny.max_sequence_length)
    source = ("--pretrained_model_name_or_path", base, "--resolution", tiny.size, *length)
    argv = arguments(images, output_dir, *source, *flags, source=())
    return run_main(load_script(SCRIPT), argv)


def sample(pipeline, tiny):
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a two"] * 3
    return pipeline(prompt=prompts, **tiny.call, generator=torch.Generator().manual_seed(0), output_type="pt").images


def saved_weights(run):
    """Of the result, and of the last checkpoint."""
    files = [run / "pytorch_lora_weights.safetensors", *run.glob("*/diffusion_pytorch_model.safetensors")]
    files += (run / "checkpoint-4").rglob("*.safetensors")
    return {
        f"{file.relative_to(run)}/{key}": value
        for file in files
        if file.exists()
        for key, value in load_file(file).items()
    }


@every_family
@pytest.mark.parametrize("way", WAYS)
def test_run_resumes_to_the_bit_and_its_result_samples_in_its_own_pipeline(name, way, tmp_path):
    tiny = PIPELINES[name]
    images = make_captioned_images(tmp_path / "images")
    base = tmp_path / "base"
    tiny.pipeline().save_pretrained(base)
    whole = train(name, images, tmp_path / "whole", base, *EVERYTHING, *WAYS[way])
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-2", run / "checkpoint-2")
    train(name, images, run, base, *EVERYTHING, *WAYS[way], "--resume_from_checkpoint", "latest")
    one, other = saved_weights(run), saved_weights(whole)
    assert one
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], value) for key, value in other.items())

    cls, family = getattr(diffusers, tiny.pipeline_class), TEXT_TO_IMAGE_FAMILIES[tiny.pipeline_class]
    before = sample(cls.from_pretrained(base), tiny)
    if way == "whole":
        trained = DiffusionPipeline.from_pretrained(run)
        assert type(trained) is cls
    else:
        trained = cls.from_pretrained(base)
        routing = {key: value for key, value in record(run)["model"]["config"].items() if key.startswith("routing_")}
        convert = getattr(family(tiny.size).routed_class, f"from_{family.denoiser}")
        setattr(trained, family.denoiser, convert(getattr(trained, family.denoiser), **routing))
        trained.load_lora_weights(run)
    assert type(getattr(trained, family.denoiser)).__name__ == f"DTR{tiny.denoiser_class}"
    after = sample(trained, tiny)
    assert after.isfinite().all()
    assert not torch.equal(after, before)
