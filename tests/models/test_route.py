"""Routing a model in place, whatever was done to it before, and taking it back."""

import copy

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.state import AcceleratorState, GradientState
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig, get_peft_model
from tiny_models import DIT, FLUX, PIXART, SD3, UNET, every_scoped_family, of_families, output
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import diffusers_dtr
from diffusers_dtr import Family, RoutedTransformerMixin, route, route_adapter, unroute, unroute_adapter
from diffusers_dtr.models.routed_blocks import RoutedBlock


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


# In place, and back.


@every_scoped_family
def test_route_gives_the_model_its_routed_class_without_copying_a_weight(family):
    model = family.plain()
    weights = {name: value.data_ptr() for name, value in model.state_dict().items()}
    expected = output(family.conversion(model, routing_beta=0.5), family.inputs())
    assert route(model, routing_beta=0.5) is model
    assert type(model) is family.routed_class
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == weights
    assert torch.equal(output(model, family.inputs()), expected)


@every_scoped_family
def test_unroute_undoes_route(family):
    model = family.plain().train()
    expected = output(model.eval(), family.inputs())
    config, modules, state = dict(model.config), classes(model), set(vars(model))
    assert unroute(route(model, routing_beta=0.5)) is model
    assert (dict(model.config), classes(model), set(vars(model))) == (config, modules, state)
    assert torch.equal(output(model, family.inputs()), expected)


@every_scoped_family
def test_a_model_made_routed_can_be_unrouted(family):
    model = family.routed()
    plain = family.plain()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(output(unroute(model), family.inputs()), output(plain, family.inputs()))
    assert type(model) is family.routed_class.plain_class
    assert model.config.keys() == plain.config.keys()


def test_a_routed_model_is_routed_anew():
    model = route(FLUX.plain(), routing_beta=0.5, routing_alpha=2.0)
    route(model, routing_beta=0.7)
    assert (model.config.routing_beta, model.config.routing_alpha) == (0.7, 2.0)
    assert torch.equal(
        output(model, FLUX.inputs()),
        output(route(FLUX.plain(), routing_beta=0.7, routing_alpha=2.0), FLUX.inputs()),
    )


def test_a_class_conditional_transformer_of_diffusers_is_routed_in_place_too():
    model = DIT.plain()
    expected = output(model, DIT.inputs())
    assert type(route(model, routing_beta=0.5)) is diffusers_dtr.DTRDiTTransformer2DModel
    assert not torch.equal(output(model, DIT.inputs()), expected)
    assert torch.equal(output(unroute(model), DIT.inputs()), expected)


# Whatever was done to it.


def adapted(model):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    return model


def checkpointed(model):
    model.enable_gradient_checkpointing()
    return model


def compiled_in_place(model):
    torch._dynamo.reset()
    model.compile(backend="eager")
    return model


def compiled_blocks(model):
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager")
    return model


def group_offloaded(model):
    where = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    model.enable_group_offload(**where, offload_type="block_level", num_blocks_per_group=1)
    return model


def offloaded(model):
    return cpu_offload(model, torch.device("cpu"))


def cast(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


WAYS = [adapted, cast, checkpointed, compiled_in_place, compiled_blocks, group_offloaded, offloaded, quantised]


@pytest.mark.parametrize("prepare", WAYS)
def test_route_is_right_whatever_was_done_before(prepare):
    before, after = prepare(FLUX.plain()), prepare(FLUX.plain())
    expected = output(after, FLUX.inputs())
    route(before, routing_beta=0.5)
    routed_first = prepare(route(FLUX.plain(), routing_beta=0.5))
    found = output(before, FLUX.inputs())
    torch.testing.assert_close(found, output(routed_first, FLUX.inputs()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, expected, rtol=1e-2)
    torch.testing.assert_close(output(unroute(before), FLUX.inputs()), expected, rtol=1e-4, atol=1e-5)


def test_a_model_spread_over_a_disk_is_routed_in_place(tmp_path):
    plain = FLUX.plain()
    expected = output(route(copy.deepcopy(plain), routing_beta=0.5), FLUX.inputs())
    device_map = {name: "cpu" for name, _ in plain.named_children()}
    del device_map["transformer_blocks"]
    device_map |= {"transformer_blocks.0": "disk", "transformer_blocks.1": "cpu"}
    model = dispatch_model(plain, device_map, main_device="cpu", offload_dir=tmp_path)
    assert model.transformer_blocks[0].norm1.linear.weight.is_meta
    torch.testing.assert_close(output(route(model, routing_beta=0.5), FLUX.inputs()), expected)


def test_a_model_without_weights_is_routed():
    with torch.device("meta"):
        model = FluxTransformer2DModel(**FLUX.config)
    route(model, routing_beta=0.5)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(FLUX.plain().state_dict())
    assert torch.equal(output(model, FLUX.inputs()), output(route(FLUX.plain(), routing_beta=0.5), FLUX.inputs()))


@every_scoped_family
def test_checkpointing_that_was_on_before_gives_the_gradients_of_each_call(family):
    def gradients(model):
        losses = []
        for share in (0.9, 0.5):
            model.set_routing_beta(share)
            losses.append(model(**family.inputs()).sample.square().mean())
        return torch.autograd.grad(sum(losses), list(model.parameters()), allow_unused=True)

    expected = gradients(route(family.plain()))
    found = gradients(route(checkpointed(family.plain())))
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


every_change = pytest.mark.parametrize("change", [route, unroute, route_adapter, unroute_adapter])


@every_change
def test_what_torch_compile_wraps_is_refused(change):
    with pytest.raises(TypeError, match="before compiling it"):
        change(torch.compile(route_adapter(adapted(route(FLUX.plain())))))


@every_change
@pytest.mark.parametrize(
    "model",
    [None, nn.DataParallel(nn.Linear(2, 2)), get_peft_model(FLUX.plain(), LoraConfig(target_modules=["to_q"]))],
)
def test_what_is_no_model_of_diffusers_is_refused(change, model):
    with pytest.raises(TypeError, match=f"must be a model of diffusers, got a `{type(model).__name__}`. Of a pipe"):
        change(model)


# What cannot be.


@pytest.mark.parametrize(
    ("routing", "error", "message"),
    [
        ({"routing_gamma": 1}, TypeError, "Routing has no `routing_gamma`; it has `routing_alpha`"),
        ({"routing_beta": 2}, ValueError, r"must be a number in \(0, 1\], got 2"),
        ({"routing_beta": 0.01}, ValueError, "leaves none of 16 channels active"),
        ({"routing_timestep_range": (1, 1)}, ValueError, "two different finite timesteps"),
    ],
)
def test_a_bad_routing_changes_nothing(routing, error, message):
    model = FLUX.plain()
    config, modules, state = dict(model.config), classes(model), set(vars(model))
    with pytest.raises(error, match=message):
        route(model, **routing)
    assert (dict(model.config), classes(model), set(vars(model))) == (config, modules, state)


def test_a_transformer_with_other_weights_than_diffusers_is_named():
    with pytest.raises(TypeError, match="has other weights than a `DiTTransformer2DModel`"):
        unroute(DIT.routed())
    with pytest.raises(TypeError, match="`from_transformer`"):
        route(DIT.routed())


def test_a_model_in_which_no_block_is_found_is_refused():
    model = FLUX.plain()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        # As sharding does.
        block.__class__ = type(f"Sharded{type(block).__name__}", (type(block),), {})
    with pytest.raises(ValueError, match="No blocks of the `FluxTransformer2DModel` were found to route"):
        route(model)
    assert type(model) is FluxTransformer2DModel


def test_unrouting_a_plain_model_changes_nothing():
    model = UNET.plain()
    assert unroute(model) is model


# What is wrapped.


def test_a_model_whose_blocks_are_wrapped_is_refused():
    model = FLUX.plain()
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "FluxTransformerBlock")
    with pytest.raises(TypeError, match="`CheckpointWrapper` wraps a block"):
        route(model)
    assert type(model) is FluxTransformer2DModel


@of_families((FLUX, SD3, PIXART, UNET))
def test_no_range_is_that_of_the_family(family):
    expected = route(family.plain()).routing.timestep_range
    assert route(family.plain(), routing_timestep_range=None).routing.timestep_range == expected
    assert family.routed(routing_timestep_range=None).routing.timestep_range == expected


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


@pytest.fixture
def fresh_accelerate():
    """Its precision is the process's, and neither other tests' nor for other tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@of_families((FLUX, UNET))
def test_mixed_precision_is_put_on_and_taken_off(family, fresh_accelerate):
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


# What is derived.


def test_an_argument_that_the_plain_class_gains_is_taken_over(tmp_path):
    class Grown(SD3Transformer2DModel):
        @register_to_config
        def __init__(self, num_attention_heads: int = 2, attention_head_dim: int = 8, novelty: str = "none"):
            super().__init__(8, 2, 4, 1, attention_head_dim, num_attention_heads, 12, 16, 12, 4, 8)
            self.novelty = novelty

    class DTRGrown(RoutedTransformerMixin, Grown, family=Family(blocks=["transformer_blocks"])):
        pass

    model = DTRGrown(2, novelty="some", routing_beta=0.5)
    assert (model.novelty, model.config.novelty, model.config.routing_beta) == ("some", "some", 0.5)
    assert DTRGrown(novelty="some").config.attention_head_dim == 8
    model.save_pretrained(tmp_path)
    assert DTRGrown.from_pretrained(tmp_path).novelty == "some"
    assert type(unroute(model)) is Grown


def test_routed_classes_are_made_when_they_are_asked_for(fresh_process):
    found = fresh_process(
        """
        import json
        import diffusers_dtr
        name = "DTRWanTransformer3DModel"
        before = name in vars(diffusers_dtr)
        made = getattr(diffusers_dtr, name)
        again = diffusers_dtr.DTRWanTransformer3DModel
        print(json.dumps([before, made.__module__, made is again, name in dir(diffusers_dtr)]))
        """
    )
    assert found == [False, "diffusers_dtr", True, True]


def test_an_unknown_name_is_no_attribute_of_the_library():
    assert not hasattr(diffusers_dtr, "DTRNothing")
