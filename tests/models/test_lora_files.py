"""LoRA files of which the routing does not fit."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from peft import LoraConfig
from tiny_models import FLUX, PIXART, output

from diffusers_dtr import load_routed_lora, mark_routed, route_adapter, save_routed_lora


@pytest.fixture
def lora_file(tmp_path):
    model = FLUX.plain()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    return save_routed_lora(route_adapter(model), tmp_path)


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({"": {"routing_beta": 7.0}}, r"`routing_beta` must be a number in \(0, 1\], got 7.0"),
        ({"": {"noise": 1}}, "has 'noise', which no routing has"),
        ({"unet": {"routing_beta": 0.5}}, "routed adapters for the `unet` of a pipeline, but `target` is a `FluxT"),
    ],
)
def test_a_routing_that_does_not_fit_is_found_before_anything_is_loaded(lora_file, routing, message):
    mark_routed(lora_file, routing)
    model = FLUX.plain()
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_routed_lora(model, lora_file)
    assert type(model) is FluxTransformer2DModel
    assert set(model.state_dict()) == names


def test_a_model_that_takes_no_adapters_stays_so_if_a_file_is_of_another_model(lora_file):
    model = PIXART.plain()
    with pytest.raises(ValueError, match="not found in the base model"):
        load_routed_lora(model, lora_file)
    assert type(model) is PixArtTransformer2DModel


def test_an_adapter_that_cannot_be_routed_as_its_file_says_is_taken_off_again(lora_file):
    mark_routed(lora_file, {"": {"routing_beta": 0.1}})  # of four channels none
    model, plain = FLUX.plain(), FLUX.plain()
    with pytest.raises(ValueError, match="routing_beta"):
        load_routed_lora(model, lora_file)
    assert type(model) is FluxTransformer2DModel
    assert not getattr(model, "peft_config", {})
    assert torch.equal(output(model, FLUX.inputs()), output(plain, FLUX.inputs()))


def test_the_file_that_diffusers_saves_of_a_routed_adapter_says_so(tmp_path):
    model = FLUX.plain()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    route_adapter(model, routing_beta=0.5).save_lora_adapter(tmp_path)
    other = FLUX.plain()
    load_routed_lora(other, tmp_path)
    assert torch.equal(output(other, FLUX.inputs()), output(model, FLUX.inputs()))
    with pytest.raises(ValueError, match="`safe_serialization` must be True"):
        model.save_lora_adapter(tmp_path, safe_serialization=False)
