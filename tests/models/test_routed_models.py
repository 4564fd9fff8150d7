"""What every routed class must do, checked for all of them alike."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from inspect import Parameter, signature
from threading import Barrier

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from tiny_models import (
    DIT,
    FAMILIES,
    PIXART,
    SCOPED_FAMILIES,
    SD3,
    TIMESTEPS,
    UNET,
    every_family,
    every_scoped_family,
    of_families,
    output,
    recorded_calls,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import diffusers_dtr
from diffusers_dtr.models.scope import token_mask


ROUTING_KEYS = ["routing_alpha", "routing_beta", "routing_type", "routing_seed", "routing_timestep_range"]
OTHER_TIMESTEPS = torch.tensor([999, 250, 3, 700])
REAL_TIMESTEPS = torch.tensor([-3.5, 700.25, 978.05, 1500.0], dtype=torch.float64)
FIRST_ROUTED = r"transformer_blocks\.0|mid_block\.resnets\.0"


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# What is computed.


@every_family
@pytest.mark.parametrize("routing_type", ["dtr", "random"])
def test_a_share_of_one_is_the_base_model_to_the_bit(family, routing_type):
    plain = family.plain()
    expected = output(plain, family.inputs())
    routed = family.conversion(plain, routing_type=routing_type)
    assert not torch.equal(output(routed, family.inputs()), expected)
    routed.set_routing_beta(1.0)
    assert torch.equal(output(routed, family.inputs()), expected)
    assert torch.equal(output(family.conversion(plain, routing_beta=1.0), family.inputs()), expected)
    assert torch.equal(output(family.conversion(plain, routing_type="none"), family.inputs()), expected)


@every_family
@pytest.mark.parametrize("timestep", [TIMESTEPS, REAL_TIMESTEPS])
def test_a_mixed_batch_equals_single_samples(family, timestep):
    model, batch = family.routed(), family.inputs(timestep)
    singles = [
        {name: v[i : i + 1] if torch.is_tensor(v) and len(v) == 4 else v for name, v in batch.items()}
        for i in range(4)
    ]
    expected = torch.cat([output(model, single) for single in singles])
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-4, atol=1e-4)


@every_family
def test_the_mask_leaves_the_dtype_alone(family):
    model = family.routed().to(torch.bfloat16)
    inputs = family.inputs()
    for name, value in inputs.items():
        if torch.is_tensor(value) and value.is_floating_point() and name != "timestep":
            inputs[name] = value.bfloat16()
    found = output(model, inputs)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


@every_family
def test_a_missing_timestep_is_named(family):
    with pytest.raises(ValueError, match="`timestep` must be given"):
        family.routed()(**{**family.inputs(), "timestep": None})


# Config and conversion.


@every_scoped_family
def test_the_signature_is_that_of_the_base_class_and_the_routing(family):
    ours = list(signature(family.routed_class).parameters.values())
    theirs = list(signature(family.routed_class.plain_class).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert [(p.name, p.kind) for p in ours[len(theirs) :]] == [(key, Parameter.KEYWORD_ONLY) for key in ROUTING_KEYS]
    assert signature(family.routed_class.forward) == signature(family.routed_class.plain_class.forward)


@every_family
def test_conversion_copies_weights_and_keeps_dtype_and_mode(family):
    """Also from a config with a value that today's classes do not know, which loading keeps."""
    plain = family.plain().to(torch.bfloat16).train()
    plain.register_to_config(value_of_older_diffusers=1)
    config = dict(plain.config)
    before = {name: value.clone() for name, value in (*plain.named_parameters(), *plain.named_buffers())}
    routed = family.conversion(plain, routing_beta=0.5, routing_seed=3)
    assert (routed.config.routing_beta, routed.config.routing_seed) == (0.5, 3)
    assert (routed.dtype, routed.training) == (torch.bfloat16, True)
    with torch.no_grad():
        for tensor in (*routed.parameters(), *routed.buffers()):
            tensor.zero_()
    after = dict((*plain.named_parameters(), *plain.named_buffers()))
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert dict(plain.config) == config


@every_family
def test_conversion_refuses_other_classes(family):
    other = (SD3 if family is PIXART else PIXART).plain()
    message = f"must be a `{family.routed_class.plain_class.__name__}`, got a `{type(other).__name__}`"
    with pytest.raises(TypeError, match=message):
        family.conversion(other)


@every_scoped_family
def test_a_bad_routing_is_refused_before_a_layer_is_built(family, monkeypatch):
    monkeypatch.setattr(family.routed_class.plain_class, "__init__", None)
    with pytest.raises(ValueError, match=r"`routing_beta` must be a number in \(0, 1\], got 2"):
        family.routed(routing_beta=2)


# Saving and loading.


@every_family
def test_a_checkpoint_of_the_base_class_loads_with_a_routing(family, tmp_path):
    plain = family.plain()
    plain.save_pretrained(tmp_path)
    routed = family.routed_class.from_pretrained(tmp_path, routing_beta=0.5)
    assert routed.config.routing_beta == 0.5
    routed.set_routing_beta(1.0)
    assert_close(output(routed, family.inputs()), output(plain, family.inputs()))


@of_families((DIT, PIXART))
def test_weights_that_were_saved_by_older_diffusers_load_and_convert(family, tmp_path):
    plain = family.plain()
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # As in the repositories of DiT and PixArt-α.
    config |= {"_class_name": "Transformer2DModel", "double_self_attention": False, "num_vector_embeds": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = family.routed_class.from_pretrained(tmp_path, routing_beta=1.0)
    assert_close(output(loaded, family.inputs()), output(plain, family.inputs()))
    source = family.routed_class.plain_class.from_pretrained(tmp_path)
    converted = family.conversion(source, routing_beta=1.0)
    assert torch.equal(output(converted, family.inputs()), output(source, family.inputs()))


@every_scoped_family
def test_the_state_dict_is_that_of_the_base_class(family):
    assert family.routed().state_dict().keys() == family.plain().state_dict().keys()


@every_family
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_routed_by_itself(family, duplicate):
    model = family.routed()
    # Also with gradient checkpointing on, except that diffusers' own function for it cannot be pickled.
    if family in SCOPED_FAMILIES:
        model.enable_gradient_checkpointing()
    expected = output(model, family.inputs())
    twin = duplicate(model)
    assert torch.equal(output(twin, family.inputs()), expected)
    twin.set_routing_beta(0.5)
    assert not torch.equal(output(twin, family.inputs()), expected)
    assert torch.equal(output(model, family.inputs()), expected)


# State that is never stale.


def loss(model, arguments):
    return model(**arguments).sample.square().mean()


def warm_up_losses(model, called, family):
    """Of two forward calls, at other timesteps and another share of active channels."""
    for share, timesteps in ((0.9, TIMESTEPS), (0.5, OTHER_TIMESTEPS)):
        model.set_routing_beta(share)
        yield loss(called, family.inputs(timesteps))


def gradients(model, losses):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(sum(losses), parameters, allow_unused=True)


def assert_same_gradients(found, expected):
    assert any(gradient is not None and gradient.any() for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.parametrize("function", [None, partial(checkpoint, use_reentrant=False, preserve_rng_state=False)])
def test_checkpointing_gives_the_same_gradients_also_for_two_forwards_before_one_backward(family, function):
    model = family.routed()
    expected = gradients(model, warm_up_losses(model, model, family))
    model.enable_gradient_checkpointing(function)
    runs = []
    block = next(m for name, m in model.named_modules() if name in ("transformer_blocks.0", "mid_block.resnets.1"))
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    assert_same_gradients(gradients(model, warm_up_losses(model, model, family)), expected)
    assert len(runs) == 4


@every_family
def test_an_ema_copy_called_between_forward_and_backward_changes_nothing(family):
    model = family.routed()
    ema = EMAModel(model.parameters(), model_cls=family.routed_class, model_config=model.config)
    expected = gradients(model, [loss(model, family.inputs())])
    twin = copy.deepcopy(model)
    ema.copy_to(twin.parameters())
    model.enable_gradient_checkpointing()
    value = loss(model, family.inputs())
    output(twin, family.inputs(OTHER_TIMESTEPS))
    assert_same_gradients(gradients(model, [value]), expected)


@every_family
def test_two_threads_may_be_inside_one_model_at_once(family):
    model = family.routed()
    batches = family.inputs(), family.inputs(OTHER_TIMESTEPS)
    expected = [output(model, batch) for batch in batches]
    inside = Barrier(2, timeout=60)
    layer = next(module for name, module in model.named_modules() if name.endswith("to_q"))
    layer.register_forward_pre_hook(lambda *_: (inside.wait(), None)[1])
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(partial(output, model), batches))
    assert all(map(torch.equal, found, expected))


@every_scoped_family
def test_a_block_outside_its_models_call_is_an_error_also_after_a_failed_call(family):
    model = family.routed()
    ((name, (args, kwargs, _)),) = recorded_calls(model, FIRST_ROUTED, family.inputs()).items()
    block = model.get_submodule(name)
    with pytest.raises(RuntimeError, match="A routed block ran outside its model's forward call"):
        block(*args, **kwargs)
    handle = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output(model, family.inputs())
    handle.remove()
    with pytest.raises(RuntimeError, match="A routed block ran outside its model's forward call"):
        block(*args, **kwargs)


@every_family
def test_a_model_called_within_another_ones_call_changes_nothing(family):
    model, other = family.routed(), family.routed(routing_beta=0.5)
    expected = output(model, family.inputs())
    layer = next(module for name, module in model.named_modules() if name.endswith("to_q"))
    layer.register_forward_pre_hook(lambda *_: (output(other, family.inputs(OTHER_TIMESTEPS)), None)[1])
    assert torch.equal(output(model, family.inputs()), expected)


@every_scoped_family
def test_masks_come_to_the_device_of_the_block(family):
    model, devices = family.routed(), []
    name = next(iter(recorded_calls(model, FIRST_ROUTED, family.inputs())))
    model.get_submodule(name).register_forward_pre_hook(
        lambda *_: devices.append(token_mask(torch.empty(4, 6, 16, device="meta")).device.type)
    )
    output(model, family.inputs())
    assert devices == ["meta"]


@every_scoped_family
def test_recomputation_that_does_not_know_the_masks_is_an_error(family):
    model = family.routed()
    ((name, _),) = recorded_calls(model, FIRST_ROUTED, family.inputs()).items()
    model.set_submodule(name, checkpoint_wrapper(model.get_submodule(name)))
    with pytest.raises(RuntimeError, match="use the model's `enable_gradient_checkpointing`"):
        loss(model, family.inputs()).backward()


# torch.compile.


@every_family
@pytest.mark.parametrize(
    ("routing_type", "shares"), [("dtr", (None,)), ("dtr", (1.0, 0.9, 0.3)), ("random", (1.0, 0.9, 0.3))]
)
def test_one_graph_serves_all_timesteps_and_a_warm_up_of_the_share(family, routing_type, shares):
    model = family.routed(routing_type=routing_type)
    torch._dynamo.reset()
    # The graph is what is tested here, not what a backend makes of it.
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.set_routing_beta(shares[0])
    output(compiled, family.inputs())
    for share in shares:
        model.set_routing_beta(share)
        with torch.compiler.set_stance("fail_on_recompile"):
            found = output(compiled, family.inputs(OTHER_TIMESTEPS))
        torch.testing.assert_close(found, output(model, family.inputs(OTHER_TIMESTEPS)), rtol=1e-4, atol=1e-5)


@every_scoped_family
def test_compiled_blocks_follow_the_timestep(family):
    model = family.routed()
    expected = [output(model, family.inputs(t)) for t in (TIMESTEPS, OTHER_TIMESTEPS)]
    if not model._repeated_blocks:
        pytest.skip(f"{family.routed_class.__name__} names no repeated blocks, as its base class")
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    found = [output(model, family.inputs(t)) for t in (TIMESTEPS, OTHER_TIMESTEPS)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_gives_the_same_gradients(family, checkpointing):
    model = family.routed()
    expected = gradients(model, warm_up_losses(model, model, family))
    if checkpointing:
        model.enable_gradient_checkpointing()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(model, warm_up_losses(model, compiled, family)), expected)


# What the base classes can do.


@every_family
def test_attention_processors_can_be_set(family):
    model = family.routed()
    expected = output(model, family.inputs())
    if hasattr(model, "attn_processors"):
        processors = {name: type(processor)() for name, processor in model.attn_processors.items()}
        model.set_attn_processor(dict(processors))
        assert model.attn_processors == processors
        assert_close(output(model, family.inputs()), expected)


@every_family
def test_layerwise_casting_is_that_of_the_base_class(family):
    plain = family.plain()
    models = [plain, *(family.conversion(plain, routing_beta=beta) for beta in (1.0, 0.5))]
    for model in models:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    unrouted, share_of_one, routed = (output(model, family.inputs()) for model in models)
    assert torch.equal(share_of_one, unrouted)
    assert routed.isfinite().all()
    assert not torch.equal(routed, unrouted)


@every_family
@pytest.mark.parametrize(
    "offload", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading_changes_nothing(family, offload):
    model = family.routed()
    expected = output(model, family.inputs())
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **offload)
    assert torch.equal(output(model, family.inputs()), expected)


@of_families(tuple(family for family in FAMILIES if family is not UNET))  # which diffusers does not spread
def test_a_model_larger_than_its_memory_is_loaded_spread_over_devices(family, tmp_path):
    """It has room for four fifths, and the rest stays on disk."""
    model = family.routed()
    model.save_pretrained(tmp_path / "saved")
    size = sum(parameter.nbytes for parameter in model.parameters())
    memory = {"device_map": "balanced", "max_memory": {"cpu": size * 4 // 5}, "offload_folder": tmp_path / "offload"}
    spread = family.routed_class.from_pretrained(tmp_path / "saved", **memory)
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    assert_close(output(spread, family.inputs()), output(model, family.inputs()))


@every_family
def test_lora_fine_tuning_trains_saves_and_loads_the_adapter_alone(family, tmp_path):
    model = family.routed()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.enable_gradient_checkpointing()
    before = output(model, family.inputs())
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, family.inputs()).backward()
        optimizer.step()
    after = output(model, family.inputs())
    assert not torch.equal(after, before)
    model.save_lora_adapter(tmp_path)
    loaded = family.routed()
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert_close(output(loaded, family.inputs()), after)
    loaded.disable_adapters()
    assert torch.equal(output(loaded, family.inputs()), before)


def test_first_compiled_call_of_a_process_is_not_compiled_again(fresh_process):
    """No routed model has run before it, in which the scope would have left traces."""
    found = fresh_process(
        """
        import torch
        from diffusers_dtr import DTRPixArtTransformer2DModel

        model = DTRPixArtTransformer2DModel(2, 8, num_layers=1, sample_size=8, cross_attention_dim=16)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        inputs = {"encoder_hidden_states": torch.randn(1, 5, 16), "added_cond_kwargs": {}}
        call = lambda t: compiled(torch.ones(1, 4, 8, 8), timestep=torch.tensor([t]), **inputs).sample
        with torch.no_grad():
            call(3)
            with torch.compiler.set_stance("fail_on_recompile"):
                print(list(call(500).shape))
        """
    )
    assert found == [1, 8, 8, 8]


@pytest.mark.parametrize(
    "name", ["UNet2DModel", "UNet2DConditionModel", "FluxTransformer2DModel", "WanTransformer3DModel"]
)
def test_an_argument_that_there_is_not_is_refused_as_diffusers_does(name):
    with pytest.raises(TypeError, match=rf"DTR{name}.__init__\(\) got an unexpected keyword argument 'in_channel'"):
        getattr(diffusers_dtr, f"DTR{name}")(in_channel=1)
