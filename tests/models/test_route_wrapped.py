"""Routing models that something was wrapped around, and what is no model."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model
from tiny_models import FLUX, PIXART, SD3, UNET, output
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from diffusers_dtr import Family, RoutedTransformerMixin, route, unroute
from diffusers_dtr.models.routed_blocks import RoutedBlock


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Its precision is the process's, and neither other tests' nor for other tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_model_whose_blocks_are_wrapped_is_refused():
    model = FLUX.plain()
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "FluxTransformerBlock")
    with pytest.raises(TypeError, match="`CheckpointWrapper` wraps a block"):
        route(model)
    assert type(model) is FluxTransformer2DModel


@pytest.mark.parametrize("family", [FLUX, SD3, PIXART, UNET], ids=lambda family: family.routed_class.__name__)
def test_no_range_is_that_of_the_family(family):
    expected = route(family.plain()).routing.timestep_range
    assert route(family.plain(), routing_timestep_range=None).routing.timestep_range == expected
    assert family.routed(routing_timestep_range=None).routing.timestep_range == expected


@pytest.mark.parametrize(
    "wrapped",
    [
        None,
        FLUX.plain().transformer_blocks[0],
        get_peft_model(FLUX.plain(), LoraConfig(target_modules=["to_q"])),
    ],
    ids=["nothing", "block", "peft"],
)
def test_what_is_no_model_of_diffusers_is_not_told_to_be_declared(wrapped):
    with pytest.raises(TypeError, match=f"must be a model of diffusers, got a `{type(wrapped).__name__}`. Of a pipe"):
        route(wrapped)


def test_a_model_is_routed_by_the_declaration_that_was_made_last():
    class Paint(FluxTransformer2DModel):
        pass

    def declare(**family):
        class DTRPaint(RoutedTransformerMixin, Paint, family=Family(timestep_range=(0.0, 1.0), **family)):
            pass

        return DTRPaint

    declare()
    model = route(Paint(**FLUX.config), routing_beta=0.5)
    expected = output(model, FLUX.inputs())
    last = declare()
    assert type(route(model)) is last
    assert torch.equal(output(model, FLUX.inputs()), expected)
    declare(blocks=["transformer_blocks"])
    assert not isinstance(route(model).single_transformer_blocks[0], RoutedBlock)
    assert isinstance(model.transformer_blocks[0], RoutedBlock)


@pytest.mark.parametrize("family", [FLUX, UNET], ids=lambda family: family.routed_class.__name__)
def test_mixed_precision_is_put_on_and_taken_off(family):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    without = {"keep_fp32_wrapper": False}
    expected = output(route(family.plain(), routing_beta=0.5), family.inputs())
    prepared = accelerator.prepare(family.plain())
    with pytest.raises(TypeError, match=r"was replaced by `[^`]{,80}`, which is no hook"):
        route(prepared)
    routed = route(accelerator.unwrap_model(prepared, **without), routing_beta=0.5)
    assert torch.equal(output(routed, family.inputs()), expected)
    again = accelerator.unwrap_model(accelerator.prepare(routed), **without)
    assert torch.equal(output(again, family.inputs()), expected)
    plain = family.plain()
    assert torch.equal(output(unroute(again), family.inputs()), output(plain, family.inputs()))
