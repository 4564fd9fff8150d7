"""A text-to-image run that is interrupted and resumed ends with the weights of the uninterrupted one, to the bit."""

import shutil

import pytest
import torch
from text_to_image_runs import FAMILIES, make_captioned_images, saved_weights, train


pytestmark = pytest.mark.usefixtures("one_thread")

# Everything that draws at random, or has a state.
EVERYTHING = [
    *("--max_train_steps", 4, "--checkpointing_steps", 2, "--proportion_empty_prompts", 0.3, "--random_flip"),
    *("--routing_warmup_steps", 3, "--lr_scheduler", "cosine", "--gradient_accumulation_steps", 2),
    *("--num_clusters", 2, "--balancing", "uncertainty"),
]
CACHES = ["--center_crop", "--cache_latents", "--cache_text_embeddings"]
# What the README's commands train with.
AS_IN_README = dict.fromkeys(FAMILIES, ("--use_ema", *CACHES))
AS_IN_README["sd3"] += ("--timestep_sampling", "logit_normal")


LORA = ["--rank", 2, "--use_ema", "--ema_type", "power", "--optimizer", "muon"]


@pytest.mark.parametrize(("name", "way"), [("sd", "lora"), ("pixart", "full"), ("sd3", "full")])
def test_resumed_run_ends_with_the_uninterrupted_weights(name, way, tmp_path):
    way = AS_IN_README[name] if way == "full" else LORA
    images = make_captioned_images(tmp_path / "images")
    pipeline = FAMILIES[name].save_plain(tmp_path / "base")
    whole = train(name, images, tmp_path / "whole", pipeline, *EVERYTHING, *way)
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-2", run / "checkpoint-2")
    train(name, images, run, pipeline, *EVERYTHING, *way, "--resume_from_checkpoint", "latest")
    one, other = (saved_weights(folder) for folder in (run, whole))
    assert one.keys() == other.keys()
    assert one
    assert all(torch.equal(one[key], value) for key, value in other.items())
