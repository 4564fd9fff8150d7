"""Text-to-image results on the Hub: pipelines and adapters, each with a card that says how to load it."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from text_to_image_runs import FAMILIES, make_captioned_images, train

from diffusers_dtr import DTRUNet2DConditionModel


PUSH = ["--push_to_hub", "--hub_model_id", "owner/pictures", "--validation_prompts", "number one"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_captioned_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return FAMILIES["sd"].save_plain(tmp_path_factory.mktemp("pipelines") / "sd")


def hub_files(hub) -> set[str]:
    return set(hub.repos["models", "owner/pictures"].branches["main"].files)


def test_pipeline_is_shared_without_caches_and_loads_as_diffusers_own(hub, plain, images, tmp_path):
    flags = ["--cache_text_embeddings", "--cache_latents", "--center_crop"]
    run = train("sd", images, tmp_path / "run", plain, *PUSH, *flags)
    assert not [path for path in hub_files(hub) if "embeddings" in path or "latents" in path]
    pipeline = StableDiffusionPipeline.from_pretrained("owner/pictures")
    local = DTRUNet2DConditionModel.from_pretrained(run, subfolder="unet")
    assert all(torch.equal(pipeline.unet.state_dict()[name], value) for name, value in local.state_dict().items())
    card = ModelCard.load(run / "README.md")
    assert card.data.pipeline_tag == "text-to-image"
    assert 'StableDiffusionPipeline.from_pretrained("owner/pictures")' in card.text


def test_adapters_are_shared_with_a_card(hub, plain, images, tmp_path):
    run = train("sd", images, tmp_path / "run", plain, *PUSH, "--rank", 2)
    assert "pytorch_lora_weights.safetensors" in hub_files(hub)
    assert "model_index.json" not in hub_files(hub)
    card = ModelCard.load(run / "README.md")
    assert "lora" in card.data.tags
    assert "DTRUNet2DConditionModel" in card.text
    assert str(plain) not in card.text
    base = StableDiffusionPipeline.from_pretrained(plain)
    base.unet = DTRUNet2DConditionModel.from_unet(base.unet)
    base.load_lora_weights("owner/pictures")
    assert base.unet.peft_config
