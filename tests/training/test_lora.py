import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_models import PIXART, SD3, UNET_CONDITION, output
from tiny_text_encoders import pixart_alpha, stable_diffusion, stable_diffusion_3

from diffusers_dtr.training.config import LoraConfig, RoutingConfig
from diffusers_dtr.training.families import TEXT_TO_IMAGE_FAMILIES
from diffusers_dtr.training.lora import add_lora, has_lora, load_adapter, save_adapter, save_lora


FAMILIES = [
    pytest.param(UNET_CONDITION, stable_diffusion, id="sd"),
    pytest.param(PIXART, pixart_alpha, id="pixart"),
    pytest.param(SD3, stable_diffusion_3, id="sd3"),
]
every_family = pytest.mark.parametrize(("family", "build_pipeline"), FAMILIES)


def with_lora(model, layers=("to_q", "to_v"), **given):
    add_lora(model, LoraConfig(**{"rank": 2} | given), RoutingConfig(), layers)
    return model


@torch.no_grad()
def disturb(model):
    """As if the adapters had been trained."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@every_family
def test_adapters_begin_at_doing_nothing_and_alone_are_trained(family, build_pipeline):
    model, inputs = family.routed(), family.inputs()
    before = output(model, inputs)
    assert not has_lora(model)
    with_lora(model, TEXT_TO_IMAGE_FAMILIES[type(build_pipeline(model)).__name__].lora_layers)
    assert has_lora(model)
    assert torch.equal(output(model, inputs), before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not torch.equal(output(disturb(model), inputs), before)


def test_adapters_are_in_full_precision_on_frozen_weights_that_are_not():
    model = with_lora(UNET_CONDITION.routed().to(torch.bfloat16))
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@every_family
def test_saved_adapters_are_loaded_by_users_of_the_pipeline(family, build_pipeline, tmp_path):
    """With the scale that they were trained at, which is not the default."""
    model = disturb(with_lora(family.routed(), lora_alpha=6))
    expected = output(model, family.inputs())
    name = "unet" if family is UNET_CONDITION else "transformer"
    save_lora(build_pipeline(model), name, tmp_path)
    pipeline = build_pipeline(family.routed())
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(tmp_path)
    else:
        weights = "pytorch_lora_weights.safetensors"
        pipeline.transformer.load_lora_adapter(tmp_path, weight_name=weights, prefix=None)
    torch.testing.assert_close(output(getattr(pipeline, name), family.inputs()), expected, rtol=0, atol=1e-5)


def test_settings_are_saved_in_an_order_that_does_not_change(tmp_path):
    """That of a set is another in every process."""
    layers = [f"transformer_blocks.0.attn.{name}" for name in ("to_v", "to_k", "to_q", "to_out.0", "add_q_proj")]
    save_lora(stable_diffusion_3(with_lora(SD3.routed(), layers)), "transformer", tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["transformer.target_modules"] == sorted(layers)


def test_adapters_are_restored_to_the_bit(tmp_path):
    model = disturb(with_lora(SD3.routed()))
    save_adapter(model, tmp_path)
    restored = with_lora(SD3.routed())
    load_adapter(restored, tmp_path)
    assert torch.equal(output(restored, SD3.inputs()), output(model, SD3.inputs()))
    assert all("lora_" in name for name in load_file(tmp_path / "pytorch_lora_weights.safetensors"))


@pytest.mark.parametrize("given", [{"rank": 3}, {"lora_layers": ["to_q"]}])
def test_adapters_of_another_shape_are_not_restored(given, tmp_path):
    save_adapter(with_lora(SD3.routed()), tmp_path)
    with pytest.raises(ValueError, match="`rank` and `lora_layers` must be what they were"):
        load_adapter(with_lora(SD3.routed(), **given), tmp_path)


def test_flags_decide_which_layers_are_adapted_and_how_strongly():
    model = with_lora(UNET_CONDITION.routed(), lora_layers=["to_k"], lora_alpha=8)
    assert all("to_k" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert model.peft_config["default"].lora_alpha == 8
    assert with_lora(UNET_CONDITION.routed(), rank=3).peft_config["default"].lora_alpha == 3


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["not_a_layer"], r"`--lora_layers` must be names of the denoiser's layers .*, got \['not_a_layer'\]"),
        (["to_q", "q"], r"`--lora_layers` must be names of the denoiser's layers .*, got \['q'\]"),
        (["norm1"], "`--lora_layers` must be layers that take adapters: .*norm"),
    ],
)
def test_layers_that_cannot_be_adapted_are_an_error(layers, message):
    with pytest.raises(ValueError, match=re.compile(message, re.IGNORECASE)):
        with_lora(UNET_CONDITION.routed(), lora_layers=layers)
