"""Every family's denoiser is told and asked in training what its own pipeline tells and asks it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from diffusers.utils import make_image_grid
from huggingface_hub import HfApi
from run_config import run_config


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_models import PIXART, SD3, UNET_CONDITION
from tiny_pipelines import PIPELINES, TinyPipeline
from tiny_text_encoders import pixart_alpha, stable_diffusion, stable_diffusion_3

from diffusers_dtr import DTRPipeline
from diffusers_dtr.latents import latent_channels
from diffusers_dtr.noise_levels import NoiseLevels
from diffusers_dtr.training import TextPipeline, load_text_encoding
from diffusers_dtr.training.data import precompute_text_embeddings
from diffusers_dtr.training.data.captions import Captions
from diffusers_dtr.training.data.text_embeddings import load_text_embeddings
from diffusers_dtr.training.families import TEXT_TO_IMAGE_FAMILIES, TEXT_TO_VIDEO_FAMILIES, denoiser_family
from diffusers_dtr.training.pipelines import text_encoding


def parts_of(build, denoiser: str, **others):
    """All components of a pipeline but its denoiser."""
    return lambda: {name: part for name, part in build(None).components.items() if name != denoiser} | others


PROMPTS = ["a one", "two", "number three"]
FAMILIES = {**TEXT_TO_IMAGE_FAMILIES, **TEXT_TO_VIDEO_FAMILIES}
SMALL = {
    "sd": TinyPipeline(
        *("StableDiffusionPipeline", "UNet2DConditionModel", UNET_CONDITION.config),
        parts_of(stable_diffusion, "unet", requires_safety_checker=False),
        size=8,
        max_sequence_length=None,
    ),
    "pixart": TinyPipeline(
        *("PixArtAlphaPipeline", "PixArtTransformer2DModel", PIXART.config, parts_of(pixart_alpha, "transformer")),
        size=8,
        options={"use_resolution_binning": False},
    ),
    "sd3": TinyPipeline(
        *("StableDiffusion3Pipeline", "SD3Transformer2DModel", SD3.config),
        parts_of(stable_diffusion_3, "transformer"),
        size=8,
    ),
}
ALL = {
    "sd": TinyPipeline(
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        UNET_CONDITION.config,
        parts_of(stable_diffusion, "unet", requires_safety_checker=False),
        size=8,
        max_sequence_length=None,
    ),
    "pixart": TinyPipeline(
        "PixArtAlphaPipeline",
        "PixArtTransformer2DModel",
        PIXART.config,
        parts_of(pixart_alpha, "transformer"),
        size=8,
        options={"use_resolution_binning": False},
    ),
    "sd3": TinyPipeline(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        SD3.config,
        parts_of(stable_diffusion_3, "transformer"),
        size=8,
    ),
}
ALL = {**PIPELINES, **SMALL}
every_family = pytest.mark.parametrize("name", ALL)


@pytest.fixture
def accelerator(request):
    yield Accelerator(cpu=True, mixed_precision=getattr(request, "param", "no"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture
def config(tmp_path):
    source = {"pretrained_model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "run")}
    sampling = {"validation_guidance_scale": 3.0, "validation_num_inference_steps": 2}
    prompts = {"validation_prompts": PROMPTS, "num_validation_images": len(PROMPTS)}
    return run_config(**source, **sampling, **prompts, guidance_scale=2.0, resolution=8, train_batch_size=2)


def load(name, config, accelerator, base=None):
    """A tiny pipeline, and what a script makes of it."""
    base = base or ALL[name].pipeline()
    base.save_pretrained(config.model.pretrained_model_name_or_path)
    data = SimpleNamespace(
        vae=base.vae,
        images=SimpleNamespace(captions=None),
        dataset=SimpleNamespace(captions=SimpleNamespace(all=lambda: PROMPTS)),
        held_out=None,
    )
    if name in ALL and ALL[name].pipeline_class in TEXT_TO_VIDEO_FAMILIES:
        family = family_of(ALL[name])
    else:
        family = denoiser_family(config, TEXT_TO_IMAGE_FAMILIES)
    return base, TextPipeline(config, family, getattr(base, family.denoiser), data, accelerator)


def family_of(tiny, **numbers):
    clips = {"num_frames": 5, "frame_rate": 25.0} if tiny.pipeline_class in TEXT_TO_VIDEO_FAMILIES else {}
    return FAMILIES[tiny.pipeline_class](tiny.size, **clips, **numbers)


def encode(family, pipeline, tiny, texts):
    options = family.prompt_options(pipeline, tiny.max_sequence_length)
    return family.encode(pipeline, texts, torch.device("cpu"), options)


def batch_of(texts, *size):
    sizes = torch.tensor([size] * len(texts))
    return {"caption": texts, "original_size": sizes, "crop_top_left": 0 * sizes, "target_size": sizes}


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


OF_IMAGES = [name for name, tiny in ALL.items() if tiny.pipeline_class in TEXT_TO_IMAGE_FAMILIES]


@pytest.mark.parametrize(
    ("name", "stretched"), [*((name, 1) for name in ALL), *((name, 2) for name in OF_IMAGES)], ids=str
)
def test_denoiser_answers_in_training_what_its_pipeline_makes_of_it(name, stretched, monkeypatch):
    tiny, call = ALL[name], dict(ALL[name].call)
    if "image" in call:
        call["image"] = call["image"].repeat(1, 1, 1, stretched)
    else:
        call["width"] = tiny.size * stretched
    pipeline, family = tiny.pipeline(), family_of(tiny, guidance_scale=2.0)
    guidance = {**family.guidance(1.0), **({"guidance_scale": 2.0} if not family.guided else {})}
    model = getattr(pipeline, family.denoiser)
    rows = encode(family, pipeline, tiny, PROMPTS)
    conditions = family.conditions(pipeline, rows, batch_of(PROMPTS, tiny.size, tiny.size * stretched))
    size = (*family.latent_size(pipeline.vae)[:-1], family.latent_size(pipeline.vae)[-1] * stretched)
    for output, timestep, noisy in steps(pipeline, monkeypatch, prompt=[*PROMPTS], **call, **guidance):
        noisy, expected = (family.unpack(pipeline, latents, size) for latents in (noisy, output))
        with torch.no_grad():
            answer = family.denoise(pipeline, model, noisy, timestep.expand(len(PROMPTS)).float(), conditions)
        answer = answer[:, : noisy.shape[1]]  # without the variance that PixArt's predicts too
        assert answer.shape == noisy.shape == (3, *noisy.shape[1:])
        torch.testing.assert_close(answer, expected)


class Called(Exception):
    """What a denoiser was told of time."""


@every_family
def test_the_window_slides_over_all_that_a_denoiser_is_told_of_time(name):
    tiny = ALL[name]
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


@pytest.mark.parametrize(("name", "cached"), [*((name, True) for name in ALL), ("sd", False), ("qwen_image", False)])
def test_validation_images_are_those_of_the_pipeline(name, cached, config, accelerator):
    tiny, family = ALL[name], family_of(ALL[name])
    scale = 3.0 if family.guided else 1.0
    texts = {"max_sequence_length": tiny.max_sequence_length, "cache_text_embeddings": cached}
    sizes = {"resolution": tiny.size, "train_batch_size": len(PROMPTS), "guidance_scale": 3.5}
    config = config.replace(**sizes, **texts, validation_guidance_scale=scale)
    pipeline, trained = load(name, config, accelerator)
    call = {**tiny.call, **family.guidance(scale)}
    if "negative_prompt" in call:
        call["negative_prompt"] = [""] * len(PROMPTS)
    call |= {"output_type": "pil", "return_dict": False}
    generators = [torch.Generator().manual_seed(row) for row in range(len(PROMPTS))]
    expected = pipeline(prompt=[*PROMPTS], **call, generator=generators)[0]
    if isinstance(expected[0], list):  # of frames
        expected = [make_image_grid(frames, rows=1, cols=5) for frames in expected]
    images = trained.sample(range(len(PROMPTS)))
    assert len(images) == len(expected) == 3
    for one, other in zip(images, expected, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other)).max() <= 1  # grey values of 255


def test_validation_takes_batches_no_larger_than_those_of_training(config, accelerator):
    base, trained = load("sd", config, accelerator)
    sizes = []
    base.unet.register_forward_pre_hook(
        lambda module, positional, keywords: sizes.append(len(keywords["encoder_hidden_states"])), with_kwargs=True
    )
    assert len(trained.sample(range(3))) == 3
    assert set(sizes) == {2, 4}  # guided: twice


# ---- text encoders


def test_text_encoders_are_gone_once_their_embeddings_are_cached(config, accelerator):
    _, trained = load("sd3", config.replace(cache_text_embeddings=True), accelerator)
    encoders = [part for name, part in trained.pipeline.components.items() if name.startswith("text_encoder")]
    assert encoders == [None] * 3
    assert all(len(embeddings) == 3 for embeddings in trained.encode(PROMPTS).values())


@pytest.mark.parametrize("name", OF_IMAGES)
def test_texts_are_encoded_ahead_of_training_as_in_training(name, config, accelerator):
    tiny = ALL[name]
    sizes = {"resolution": tiny.size, "max_sequence_length": tiny.max_sequence_length}
    config = config.replace(**sizes, validation_guidance_scale=1.0)
    _, trained = load(name, config, accelerator)
    ahead = load_text_encoding(config, trained.family)
    device = torch.device("cpu")
    in_training = text_encoding(trained.family, trained.pipeline, tiny.max_sequence_length, device)
    assert ahead.describe(PROMPTS) == in_training.describe(PROMPTS)
    assert ahead.describe(PROMPTS) != ahead.describe(PROMPTS[:2])
    folder, captions = config.run.output_dir, Dataset.from_dict({"image": PROMPTS, "text": PROMPTS})
    captions.save_to_disk(f"{folder}/images")
    Path(folder, "latents.json").touch()  # they have been made
    precompute_text_embeddings(config, ahead, shard_size=3)
    read = load_text_embeddings(folder, in_training, Captions(captions, "text"), device)
    assert len({id(rows) for rows, _ in read.places.values()}) == 2
    for texts in ([""], PROMPTS, ["two", "", "two"]):
        torch.testing.assert_close(read(texts), trained.encode(texts))


def test_embeddings_of_another_length_are_not_taken_from_the_cache(config, accelerator):
    for number_of_caches, length in ((1, 12), (2, 7)):
        config = config.replace(cache_text_embeddings=True, max_sequence_length=length)
        _, trained = load("pixart", config, accelerator)
        assert trained.encode(PROMPTS)["prompt_embeds"].shape[1] == length
        assert len(list(Path(config.run.output_dir, "text_embeddings").iterdir())) == number_of_caches


@pytest.mark.parametrize("accelerator", ["bf16"], indirect=True)
def test_text_encoders_are_frozen_and_in_the_precision_of_the_run(config, accelerator):
    _, trained = load("sd", config, accelerator)
    encoder = trained.pipeline.text_encoder
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.training
    assert encoder.dtype == trained.encode(["one"])["prompt_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize("accelerator", ["fp16", "bf16"], indirect=True)
@pytest.mark.parametrize("cached", [False, True])
def test_what_a_text_encoder_keeps_in_float32_stays_there(cached, config, accelerator):
    config = config.replace(cache_text_embeddings=cached, max_sequence_length=12)
    base = ALL["pixart"].pipeline()
    with torch.no_grad():  # as in T5-XXL: what `wo` returns is beyond float16's 65504
        for block in base.text_encoder.encoder.block:
            block.layer[1].DenseReluDense.wo.weight[0] *= 3e7
    expected = base.encode_prompt("a one", False, device="cpu", max_sequence_length=12)[0]
    _, trained = load("pixart", config, accelerator, base)
    error = (trained.encode(["a one"])["prompt_embeds"].float() - expected).norm() / expected.norm()
    assert error < {"fp16": 2e-3, "bf16": 2e-2}[accelerator.mixed_precision]
    assert trained.pipeline.transformer.dtype == torch.float32


# ---- pipelines


def test_pixart_is_told_the_size_of_its_images_where_it_wants_to_know(config, accelerator):
    wants = PIXART.routed(use_additional_conditions=True, attention_head_dim=12, cross_attention_dim=24)
    inputs = {"hidden_states": torch.ones(3, 4, 8, 8), "timestep": torch.tensor([5, 50, 500])}
    _, trained = load("pixart", config, accelerator)
    told = [trained.conditions(batch_of(PROMPTS, *size)) for size in ((8, 8), (512, 256))]
    with torch.no_grad():
        one, other = (wants(**inputs, **conditions).sample for conditions in told)
    assert not torch.equal(one, other)
    assert told[1]["added_cond_kwargs"]["resolution"].tolist() == [[512, 256]] * 3
    assert told[1]["added_cond_kwargs"]["aspect_ratio"].tolist() == [[2]] * 3


@pytest.mark.parametrize("name", SMALL)
def test_pipeline_keeps_its_parts_but_for_denoiser_autoencoder_and_noise_schedule(name, config, accelerator):
    if name != "sd3":
        config = config.replace(prediction_type="v_prediction")
    base, trained = load(name, config, accelerator)
    pipeline = trained.pipeline
    assert type(pipeline) is type(base)
    assert getattr(pipeline, trained.denoiser) is getattr(base, trained.denoiser)
    assert pipeline.vae is base.vae
    assert type(pipeline.scheduler) is type(base.scheduler)
    assert name == "sd3" or pipeline.scheduler.config.prediction_type == "v_prediction"
    assert base.components.keys() == pipeline.components.keys()


def test_revision_decides_what_kind_a_pipeline_is(hub, config, tmp_path):
    HfApi().create_repo("owner/base")
    commits = []
    for name in ("sd", "pixart"):
        ALL[name].pipeline().save_pretrained(tmp_path / name)
        commits.append(HfApi().upload_folder(repo_id="owner/base", folder_path=tmp_path / name).oid)
    config = config.replace(pretrained_model_name_or_path="owner/base", revision=commits[0])
    assert type(denoiser_family(config, TEXT_TO_IMAGE_FAMILIES)) is TEXT_TO_IMAGE_FAMILIES["StableDiffusionPipeline"]


def test_pipeline_of_another_kind_is_refused(config):
    DTRPipeline(stable_diffusion(None).scheduler, unet=UNET_CONDITION.routed()).save_pretrained(
        config.model.pretrained_model_name_or_path
    )
    with pytest.raises(ValueError, match=r"must be a pipeline of StableDiffusionPipeline, .*, got DTRPipeline"):
        denoiser_family(config, TEXT_TO_IMAGE_FAMILIES)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            {"max_sequence_length": 4},
            "`--max_sequence_length` must be left out: the tokenizer of a StableD",
        ),
        ({"learn_sigma": True}, "`--learn_sigma` must be left out: a StableDiffusionPipeline cannot sample"),
        ({"resolution": 15}, r"`--resolution` must be a multiple of \d+, got 15"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused(flag, message, config, accelerator):
    with pytest.raises(ValueError, match=message):
        load("sd", config.replace(**flag), accelerator)
