"""Pipelines that are made of the components of others, without copying them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline
from tiny_autoencoders import tiny_vae
from tiny_dit import plain_dit, routed_dit


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_models import UNET, UNET_CONDITION
from tiny_text_encoders import stable_diffusion

from diffusers_dtr import DTRPipeline


NAMES = {0: "zero, nought", 1: "one"}


def sample(pipeline: DTRPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    labels = {"num_images": 1} if pipeline.num_classes is None else {"class_labels": [1]}
    generator = torch.Generator().manual_seed(0)
    return pipeline(**labels, num_inference_steps=2, generator=generator, output_type="np").images


@pytest.mark.parametrize("make", [DTRPipeline, DiTPipeline])
def test_a_pipeline_of_ours_comes_of_ours_and_of_diffusers_dit_with_its_names(make):
    original = make(scheduler=DDIMScheduler(), transformer=plain_dit(), vae=tiny_vae(), id2label=NAMES)
    made = DTRPipeline.from_pipe(original)
    assert made is not original
    assert {name: part for name, part in made.components.items() if part is not None} == {
        name: part for name, part in original.components.items() if part is not None
    }
    assert made.get_label_ids(["zero", "nought", "one"]) == [0, 0, 1]
    assert np.array_equal(sample(made), sample(DTRPipeline(**original.components)))


def test_an_unconditional_pipeline_of_diffusers_becomes_ours():
    made = DTRPipeline.from_pipe(DDPMPipeline(UNET.plain(), DDPMScheduler()))
    assert sample(made).shape == (1, 8, 8, 3)


def test_components_are_replaced_and_cast_where_that_is_asked_for():
    original = DTRPipeline(DDIMScheduler(), transformer=routed_dit().to(torch.bfloat16), vae=tiny_vae())
    other = DDPMScheduler()
    made = DTRPipeline.from_pipe(original, scheduler=other, id2label=NAMES)
    assert made.scheduler is other
    assert made.get_label_ids("one") == [1]
    assert made.transformer.dtype == torch.bfloat16
    assert DTRPipeline.from_pipe(original, dtype=torch.float16).transformer.dtype == torch.float16


def test_a_pipeline_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"than scheduler, .*, got a StableDiffusionPipeline with .*text_encoder"):
        DTRPipeline.from_pipe(stable_diffusion(UNET_CONDITION.routed()))
