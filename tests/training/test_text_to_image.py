import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import HfApi
from run_config import run_config


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_models import PIXART, SD3, UNET_CONDITION
from tiny_text_encoders import pixart_alpha, stable_diffusion, stable_diffusion_3

from diffusers_dtr import DTRPipeline
from diffusers_dtr.training.families import TEXT_TO_IMAGE_FAMILIES, denoiser_family, frozen_dtype
from diffusers_dtr.training.families.parts import build_text_encoder, load_family_pipeline, sample_texts


PROMPTS = ["a one", "two", "three"]
PIPELINES = {
    "sd": lambda: stable_diffusion(UNET_CONDITION.routed()),
    "pixart": lambda: pixart_alpha(PIXART.routed()),
    "sd3": lambda: stable_diffusion_3(SD3.routed()),
}
every_family = pytest.mark.parametrize("name", PIPELINES)


@pytest.fixture
def accelerator(request):
    yield Accelerator(cpu=True, mixed_precision=getattr(request, "param", "no"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture
def config(tmp_path):
    source = {"pretrained_model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path)}
    sampling = {"validation_guidance_scale": 3.0, "validation_num_inference_steps": 3}
    return run_config(**source, **sampling, guidance_scale=2.0, resolution=8, train_batch_size=2)


def build(name, config, accelerator, prompts=PROMPTS):
    pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    family = TEXT_TO_IMAGE_FAMILIES[type(pipeline).__name__](config.data.resolution)
    return pipeline, family, build_text_encoder(config, family, pipeline, {"", *prompts}, accelerator)


def load(name, config, accelerator):
    """As the script does, in the precision of the run."""
    if not Path(config.model.pretrained_model_name_or_path).exists():
        PIPELINES[name]().save_pretrained(config.model.pretrained_model_name_or_path)
    base, family = PIPELINES[name](), denoiser_family(config, TEXT_TO_IMAGE_FAMILIES)
    dtype = frozen_dtype(accelerator)
    pipeline = load_family_pipeline(config, family, getattr(base, family.denoiser), base.vae, dtype)
    return pipeline, build_text_encoder(config, family, pipeline, PROMPTS, accelerator)


@every_family
def test_denoiser_is_told_in_training_what_its_pipeline_tells_it(name, config, accelerator):
    config = config.replace(max_sequence_length=None if name == "sd" else 12)
    pipeline, family, encode = build(name, config, accelerator)
    said = {}
    getattr(pipeline, family.denoiser).register_forward_pre_hook(
        lambda module, positional, keywords: said.update(keywords), with_kwargs=True
    )
    length = {} if name == "sd" else {"max_sequence_length": 12}
    options = {"guidance_scale": 1.0, "num_inference_steps": 2, "height": 8, "width": 8}
    pipeline(PROMPTS, **options, **family.sample_options, **length)
    conditions = family.conditions(pipeline, encode(PROMPTS), {})
    conditions.pop("added_cond_kwargs", None)
    assert conditions
    for argument, value in conditions.items():
        torch.testing.assert_close(value, said[argument])


@every_family
@pytest.mark.parametrize("cached", [False, True])
def test_validation_images_are_those_of_the_pipeline(name, cached, config, accelerator):
    config = config.replace(cache_text_embeddings=cached, train_batch_size=3)
    expected_pipeline = PIPELINES[name]()
    pipeline, family, encode = build(name, config, accelerator)
    images = sample_texts(config, family, pipeline, encode, PROMPTS, torch.Generator().manual_seed(0))
    expected_pipeline.set_progress_bar_config(disable=True)
    expected = expected_pipeline(
        PROMPTS,
        guidance_scale=3.0,
        num_inference_steps=3,
        height=8,
        width=8,
        generator=torch.Generator().manual_seed(0),
        **family.sample_options,
    ).images
    assert len(images) == 3
    for one, other in zip(images, expected, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other)).max() <= 1  # grey values of 255


@every_family
def test_validation_takes_batches_no_larger_than_those_of_training(name, config, accelerator):
    pipeline, family, encode = build(name, config, accelerator)
    sizes = []
    getattr(pipeline, family.denoiser).register_forward_pre_hook(
        lambda module, positional, keywords: sizes.append(len(keywords["encoder_hidden_states"])), with_kwargs=True
    )
    images = sample_texts(config, family, pipeline, encode, PROMPTS, torch.Generator())
    assert len(images) == 3
    assert set(sizes) == {2, 4}  # guided: twice


@every_family
def test_text_encoders_are_gone_once_their_embeddings_are_cached(name, config, accelerator):
    config = config.replace(cache_text_embeddings=True)
    pipeline, _, encode = build(name, config, accelerator)
    left = {part for part in pipeline.components if part.startswith("text_encoder")}
    assert all(getattr(pipeline, part) is None for part in left)
    assert all(len(embeddings) == 3 for embeddings in encode(PROMPTS).values())


def change_weights(pipeline, config):
    pipeline.text_encoder.get_input_embeddings().weight.data[0, 0] += 1
    return config


def change_tokens(pipeline, config):
    pipeline.tokenizer.pad_token = "a"
    return config


def change_length(pipeline, config):
    return config.replace(max_sequence_length=7)


@pytest.mark.parametrize("change", [change_weights, change_tokens, change_length])
def test_embeddings_of_another_encoder_or_length_are_not_taken_from_the_cache(change, config, accelerator):
    config = config.replace(cache_text_embeddings=True, max_sequence_length=12)
    for number_of_caches in (1, 2):
        pipeline = PIPELINES["pixart"]()
        if number_of_caches == 2:
            config = change(pipeline, config)
        family = TEXT_TO_IMAGE_FAMILIES[type(pipeline).__name__](config.data.resolution)
        encode = build_text_encoder(config, family, pipeline, {"", *PROMPTS}, accelerator)
        assert encode(PROMPTS)["prompt_embeds"].shape[1] == config.text.max_sequence_length
        assert len(list(Path(config.run.output_dir, "text_embeddings").iterdir())) == number_of_caches


@pytest.mark.parametrize("accelerator", ["bf16"], indirect=True)
def test_text_encoders_are_frozen_and_in_the_precision_of_the_run(config, accelerator):
    pipeline, encode = load("sd", config, accelerator)
    assert not any(parameter.requires_grad for parameter in pipeline.text_encoder.parameters())
    assert not pipeline.text_encoder.training
    assert pipeline.text_encoder.dtype == frozen_dtype(accelerator) == torch.bfloat16
    assert encode(["one"])["prompt_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize("accelerator", ["fp16", "bf16"], indirect=True)
@pytest.mark.parametrize("cached", [False, True])
def test_what_a_text_encoder_keeps_in_float32_stays_there(cached, config, accelerator):
    config = config.replace(cache_text_embeddings=cached, max_sequence_length=12)
    base = PIPELINES["pixart"]()
    with torch.no_grad():  # as in T5-XXL: what `wo` returns is beyond float16's 65504
        for block in base.text_encoder.encoder.block:
            block.layer[1].DenseReluDense.wo.weight[0] *= 3e7
    base.save_pretrained(config.model.pretrained_model_name_or_path)
    expected = base.encode_prompt("a one", False, device="cpu", max_sequence_length=12)[0]
    pipeline, encode = load("pixart", config, accelerator)
    error = (encode(["a one"])["prompt_embeds"].float() - expected).norm() / expected.norm()
    assert error < {"fp16": 2e-3, "bf16": 2e-2}[accelerator.mixed_precision]
    assert pipeline.transformer.dtype == torch.float32


def test_pixart_is_told_the_size_of_its_images_where_it_wants_to_know(config, accelerator):
    pipeline, family, encode = build("pixart", config, accelerator)
    wants = PIXART.routed(use_additional_conditions=True, attention_head_dim=12, cross_attention_dim=24)
    inputs = {"hidden_states": torch.ones(3, 4, 8, 8), "timestep": torch.tensor([5, 50, 500])}
    told = [type(family)(size).conditions(pipeline, encode(PROMPTS), {}) for size in (8, 512)]
    with torch.no_grad():
        one, other = (wants(**inputs, **conditions).sample for conditions in told)
    assert not torch.equal(one, other)
    assert told[1]["added_cond_kwargs"]["resolution"].tolist() == [[512, 512]] * 3
    assert told[1]["added_cond_kwargs"]["aspect_ratio"].tolist() == [[1]] * 3


@every_family
def test_pipeline_keeps_its_parts_but_for_denoiser_autoencoder_and_noise_schedule(name, config):
    base = PIPELINES[name]()
    base.save_pretrained(config.model.pretrained_model_name_or_path)
    if name != "sd3":
        config = config.replace(prediction_type="v_prediction")
    family = denoiser_family(config, TEXT_TO_IMAGE_FAMILIES)
    model, vae = getattr(base, family.denoiser), base.vae
    pipeline = load_family_pipeline(config, family, model, vae)
    assert type(pipeline) is type(base)
    assert getattr(pipeline, family.denoiser) is model
    assert pipeline.vae is vae
    assert type(pipeline.scheduler) is type(base.scheduler)
    assert name == "sd3" or pipeline.scheduler.config.prediction_type == "v_prediction"
    assert base.components.keys() == pipeline.components.keys()


def test_revision_decides_what_kind_a_pipeline_is(hub, config, tmp_path):
    HfApi().create_repo("owner/base")
    PIPELINES["sd"]().save_pretrained(tmp_path / "old")
    old = HfApi().upload_folder(repo_id="owner/base", folder_path=tmp_path / "old").oid
    PIPELINES["pixart"]().save_pretrained(tmp_path / "new")
    HfApi().upload_folder(repo_id="owner/base", folder_path=tmp_path / "new")
    config = config.replace(pretrained_model_name_or_path="owner/base", revision=old)
    assert type(denoiser_family(config, TEXT_TO_IMAGE_FAMILIES)) is TEXT_TO_IMAGE_FAMILIES["StableDiffusionPipeline"]


def test_pipeline_of_another_kind_is_refused(config):
    DTRPipeline(stable_diffusion(None).scheduler, unet=UNET_CONDITION.routed()).save_pretrained(
        config.model.pretrained_model_name_or_path
    )
    with pytest.raises(ValueError, match=r"must be a pipeline of StableDiffusionPipeline, .*, got DTRPipeline"):
        denoiser_family(config, TEXT_TO_IMAGE_FAMILIES)


@every_family
def test_resolution_that_the_pipeline_cannot_sample_is_refused(name, config):
    base = PIPELINES[name]()
    base.save_pretrained(config.model.pretrained_model_name_or_path)
    config = config.replace(resolution=15)
    family = denoiser_family(config, TEXT_TO_IMAGE_FAMILIES)
    with pytest.raises(ValueError, match=r"`--resolution` must be a multiple of \d+, got 15"):
        load_family_pipeline(config, family, getattr(base, family.denoiser), base.vae)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"max_sequence_length": 4}, "`--max_sequence_length` must be left out: the tokenizer of such a pipeline"),
        ({"learn_sigma": True}, "`--learn_sigma` must be left out: a StableDiffusionPipeline cannot sample"),
    ],
)
def test_flags_that_the_family_has_no_use_for_are_refused(flag, message, config):
    PIPELINES["sd"]().save_pretrained(config.model.pretrained_model_name_or_path)
    with pytest.raises(ValueError, match=message):
        denoiser_family(config.replace(**flag), TEXT_TO_IMAGE_FAMILIES)
