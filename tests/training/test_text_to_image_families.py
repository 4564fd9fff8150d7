"""Every family's denoiser is told and asked in training what its own pipeline tells and asks it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.utils import make_image_grid
from run_config import run_config


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_pipelines import PIPELINES

from diffusers_dtr.latents import latent_channels
from diffusers_dtr.noise_levels import NoiseLevels
from diffusers_dtr.training.families import TEXT_TO_IMAGE_FAMILIES, TEXT_TO_VIDEO_FAMILIES
from diffusers_dtr.training.families.parts import build_text_encoder, sample_texts


PROMPTS = ["a one", "two", "number three"]
FAMILIES = {**TEXT_TO_IMAGE_FAMILIES, **TEXT_TO_VIDEO_FAMILIES}
every_family = pytest.mark.parametrize("name", PIPELINES)


def family_of(tiny, **numbers):
    clips = {"num_frames": 5, "frame_rate": 25.0} if tiny.pipeline_class in TEXT_TO_VIDEO_FAMILIES else {}
    return FAMILIES[tiny.pipeline_class](tiny.size, **clips, **numbers)


def encode(family, pipeline, tiny, texts):
    options = family.prompt_options(pipeline, tiny.max_sequence_length)
    return family.encode(pipeline, texts, torch.device("cpu"), options)


def batch_of(texts, size):
    sizes = torch.full((len(texts), 2), size)
    return {"caption": texts, "original_size": sizes, "crop_top_left": torch.zeros_like(sizes)}


def steps(pipeline, monkeypatch, **call):
    """What the scheduler is given in every step of a call."""
    taken, step = [], pipeline.scheduler.step

    def spy(model_output, timestep, sample, *args, **options):
        scale = getattr(type(pipeline.scheduler), "scale_model_input", lambda scheduler, sample, timestep: sample)
        taken.append((model_output, timestep, scale(pipeline.scheduler, sample, timestep)))
        return step(model_output, timestep, sample, *args, **options)

    monkeypatch.setattr(pipeline.scheduler, "step", spy)
    pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
    return taken


@every_family
def test_denoiser_answers_in_training_what_its_pipeline_makes_of_it(name, monkeypatch):
    tiny = PIPELINES[name]
    pipeline, family = tiny.pipeline(), family_of(tiny, guidance_scale=2.0)
    guidance = {**family.guidance(1.0), **({"guidance_scale": 2.0} if not family.guided else {})}
    model = getattr(pipeline, family.denoiser)
    rows = encode(family, pipeline, tiny, PROMPTS)
    conditions = family.conditions(pipeline, rows, batch_of(PROMPTS, tiny.size))
    size = family.latent_size(pipeline.vae)
    for output, timestep, noisy in steps(pipeline, monkeypatch, prompt=[*PROMPTS], **tiny.call, **guidance):
        noisy, expected = (family.unpack(pipeline, latents, size) for latents in (noisy, output))
        with torch.no_grad():
            answer = family.denoise(pipeline, model, noisy, timestep.expand(len(PROMPTS)).float(), conditions)
        assert answer.shape == noisy.shape == (3, *noisy.shape[1:])
        torch.testing.assert_close(answer, expected)


class Called(Exception):
    """What a denoiser was told of time."""


@every_family
def test_the_window_slides_over_all_that_a_denoiser_is_told_of_time(name):
    tiny = PIPELINES[name]
    pipeline, family = tiny.pipeline(), family_of(tiny)
    pipeline.register_modules(**{family.denoiser: family.routed_class(**tiny.config)})
    model, levels = getattr(pipeline, family.denoiser), NoiseLevels(pipeline.scheduler)
    # The cleanest, where that is no training timestep of flow matching, and the noisiest.
    ends = (0.0, levels.timestep_range[1])
    conditions = {"encoder_hidden_states": torch.zeros(2, 3, 4)}  # of which places of text are made

    def denoiser(*args, **told):
        raise Called(told["t"] if "t" in told else told["timestep"])

    noisy = torch.zeros(2, latent_channels(pipeline.vae), *family.latent_size(pipeline.vae))
    with pytest.raises(Called) as call:
        family.denoise(pipeline, denoiser, noisy, torch.tensor(ends), conditions)
    (told,) = call.value.args
    in_training = ends if family.counts_timesteps else model.config.routing_timestep_range
    assert told.tolist() == pytest.approx(list(in_training), abs=1e-6)
    if family.counts_timesteps:
        assert levels.timestep_range == (0, levels.num_train_timesteps - 1)  # over which a run routes it


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state(*((True,) if state is AcceleratorState else ()))


@every_family
@pytest.mark.parametrize("cached", [False, True])
def test_validation_images_are_those_of_the_pipeline(name, cached, accelerator, tmp_path):
    tiny = PIPELINES[name]
    pipeline, family = tiny.pipeline(), family_of(tiny)
    scale = 3.0 if family.guided else 1.0
    sizes = {"resolution": tiny.size, "train_batch_size": len(PROMPTS), "output_dir": str(tmp_path)}
    texts = {"max_sequence_length": tiny.max_sequence_length, "cache_text_embeddings": cached}
    sampling = {"validation_guidance_scale": scale, "validation_num_inference_steps": 2}
    config = run_config(**sizes, **texts, **sampling)
    call = {**tiny.call, **family.guidance(scale)}
    if "negative_prompt" in call:
        call["negative_prompt"] = [""] * len(PROMPTS)
    call |= {"output_type": "pil", "return_dict": False}
    (expected,) = pipeline(prompt=[*PROMPTS], **call, generator=torch.Generator().manual_seed(0))
    if isinstance(expected[0], list):  # of frames
        expected = [make_image_grid(frames, rows=1, cols=5) for frames in expected]
    encode = build_text_encoder(config, family, pipeline, {"", *PROMPTS}, accelerator)
    images = sample_texts(config, family, pipeline, encode, PROMPTS, torch.Generator().manual_seed(0))
    assert len(images) == len(expected) == 3
    for one, other in zip(images, expected, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other)).max() <= 1  # grey values of 255
