"""Routed LoRA: the rank channels follow the timestep, and the model itself is as it was."""

import copy
import logging
import pickle
import re
from functools import partial

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from tiny_denoisers import build, inputs, run
from tiny_models import DIT, FLUX, PIXART, SD3, UNET_CONDITION, of_families, output
from torch import nn

from diffusers_dtr import DTRFluxTransformer2DModel, load_routed_lora, route, route_adapter, unroute, unroute_adapter
from diffusers_dtr.lora_files import save_routed_lora
from diffusers_dtr.models.adapters import adapter_routing
from diffusers_dtr.models.lora_header import file_routing
from diffusers_dtr.routing import routing_mask
from diffusers_dtr.run_record import LORA_FILE


every_family = of_families((FLUX, SD3, UNET_CONDITION))


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Equal to the bit."""


def adapted(family, model=None, name="default", rank=4, seed=0):
    model = family.plain() if model is None else model
    torch.manual_seed(seed)
    layers = ["to_q", "to_v", "conv1"] if family is UNET_CONDITION else ["to_q", "to_v"]
    config = LoraConfig(r=rank, target_modules=layers, init_lora_weights=False)
    if family is PIXART:  # which is no PeftAdapterMixin
        return inject_adapter_in_model(config, model, name)
    model.add_adapter(config, adapter_name=name)
    return model


@every_family
def test_a_share_of_one_is_the_plain_adapter_to_the_bit_and_a_half_is_not(family):
    model = adapted(family)
    expected = output(model, family.inputs())
    route_adapter(model, routing_beta=1.0)
    assert torch.equal(output(model, family.inputs()), expected)
    route_adapter(model, routing_beta=0.5)
    assert not torch.allclose(output(model, family.inputs()), expected)
    assert torch.equal(output(unroute_adapter(model), family.inputs()), expected)


@every_family
def test_the_model_itself_is_untouched_at_every_share(family):
    plain = family.plain()
    model = route_adapter(adapted(family, copy.deepcopy(plain)), routing_beta=0.25)
    model.disable_adapters()
    assert torch.equal(output(model, family.inputs()), output(plain, family.inputs()))


def test_an_adapter_adds_the_window_of_its_rank_channels():
    model = adapted(PIXART)
    layer = model.transformer_blocks[0].attn1.to_q
    route_adapter(model, routing_beta=0.5, routing_alpha=1.0)
    calls = []
    layer.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    timesteps = torch.tensor([0, 333, 999, 700])
    output(model, PIXART.inputs(timesteps))
    ((x, found),) = calls
    mask = routing_mask(timesteps, 4, alpha=1.0, beta=0.5)[:, None]
    with torch.no_grad():
        inner = nn.functional.linear(x, layer.lora_A["default"].weight) * mask
        added = nn.functional.linear(inner, layer.lora_B["default"].weight) * layer.scaling["default"]
        expected = layer.base_layer(x) + added
    torch.testing.assert_close(found, expected)


@every_family
def test_routing_and_unrouting_leave_no_trace(family):
    model = adapted(family)
    before = {name: type(module) for name, module in model.named_modules()}, set(vars(model))
    names = {(type(module).__name__, type(module).__module__) for module in model.modules()}
    route_adapter(model)
    assert {(type(module).__name__, type(module).__module__) for module in model.modules()} == names
    unroute_adapter(model)
    assert ({name: type(module) for name, module in model.named_modules()}, set(vars(model))) == before


def test_model_and_adapter_are_routed_in_any_order():
    results = []
    for first, second in ((route, route_adapter), (route_adapter, route)):
        model = second(first(adapted(FLUX)))
        assert type(model) is DTRFluxTransformer2DModel
        results.append(output(model, FLUX.inputs()))
    assert torch.equal(*results)
    unroute(model)
    assert torch.equal(output(model, FLUX.inputs()), output(route_adapter(adapted(FLUX)), FLUX.inputs()))
    unroute_adapter(model)
    assert type(model) is FluxTransformer2DModel
    assert torch.equal(output(model, FLUX.inputs()), output(adapted(FLUX), FLUX.inputs()))


def test_one_of_two_adapters_is_routed():
    model = adapted(FLUX, adapted(FLUX), name="second", rank=2, seed=1)
    model.set_adapters(["default", "second"])
    expected = output(model, FLUX.inputs())
    route_adapter(model, "second")
    assert not torch.equal(output(model, FLUX.inputs()), expected)
    model.set_adapters(["default"])
    assert torch.equal(output(model, FLUX.inputs()), output(adapted(FLUX), FLUX.inputs()))


def test_the_transformer_of_this_library_takes_routed_adapters_too():
    model = adapted(DIT, DIT.routed())
    expected = output(model, DIT.inputs())
    assert not torch.equal(output(route_adapter(model), DIT.inputs()), expected)
    assert torch.equal(output(unroute_adapter(model), DIT.inputs()), expected)


@every_family
def test_checkpointing_recomputes_each_call_with_its_own_windows(family):
    def gradients(model):
        timesteps = torch.tensor([0, 500, 978, 999]), torch.tensor([999, 1, 5, 9])
        losses = [model(**family.inputs(t)).sample.square().mean() for t in timesteps]
        parameters = [parameter for name, parameter in model.named_parameters() if "lora" in name]
        return torch.autograd.grad(sum(losses), parameters, allow_unused=True)

    expected = gradients(route_adapter(adapted(family)))
    before, after = adapted(family), route_adapter(adapted(family))
    before.enable_gradient_checkpointing()
    route_adapter(before)
    after.enable_gradient_checkpointing()
    for model in (before, after):
        for found, wanted in zip(gradients(model), expected, strict=True):
            if wanted is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_routed_as_well(duplicate):
    model = route_adapter(adapted(FLUX))
    assert torch.equal(output(duplicate(model), FLUX.inputs()), output(model, FLUX.inputs()))


def test_a_routed_adapter_compiles_to_one_graph():
    model = route_adapter(adapted(FLUX))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output(compiled, FLUX.inputs())
    with torch.compiler.set_stance("fail_on_recompile"):
        found = output(compiled, FLUX.inputs(torch.tensor([5, 6, 7, 999])))
    torch.testing.assert_close(found, output(model, FLUX.inputs(torch.tensor([5, 6, 7, 999]))), rtol=1e-4, atol=1e-5)


# What cannot be.


def test_fusing_is_refused_and_says_why():
    model = route_adapter(adapted(FLUX))
    expected = output(model, FLUX.inputs())
    with pytest.raises(ValueError, match="routed: its weights differ between timesteps and cannot be fused"):
        model.fuse_lora()
    assert torch.equal(output(model, FLUX.inputs()), expected)
    unroute_adapter(model).fuse_lora()
    with pytest.raises(ValueError, match="is fused into the weights"):
        route_adapter(model)


@pytest.mark.parametrize("name", ["style", ["default"], None])
@pytest.mark.parametrize("change", [route_adapter, unroute_adapter])
def test_an_adapter_that_is_not_there_is_named(change, name):
    message = r"must be a LoRA adapter of the model \(default\), got " + re.escape(repr(name))
    with pytest.raises(ValueError, match=message):
        change(adapted(FLUX), name)


def test_a_rank_without_an_active_channel_is_refused():
    model = adapted(FLUX, rank=1)
    with pytest.raises(ValueError, match="leaves none of 1 channels active"):
        route_adapter(model, routing_beta=0.5)
    assert type(model) is FluxTransformer2DModel


@pytest.mark.parametrize(
    ("model_class", "layer"),
    [("ZImageTransformer2DModel", "cap_embedder.1"), ("HiDreamImageTransformer2DModel", "experts.0.w1")],
)
def test_layers_whose_rows_are_not_told_apart_by_samples_are_refused(model_class, layer):
    model = build(model_class)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", layer]))
    with pytest.raises(ValueError, match=rf"{layer}` .* leave it out of its `target_modules`"):
        route_adapter(model)
    assert type(model) is getattr(diffusers, model_class)


def test_only_an_adapter_that_is_a_product_of_two_projections_is_routed():
    model = FLUX.plain()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], use_dora=True))
    with pytest.raises(ValueError, match=r"must be plain LoRA, got .*Dora.* of `transformer_blocks.0.attn.to_q`"):
        route_adapter(model)
    assert type(model) is FluxTransformer2DModel


def test_an_adapter_of_an_embedding_is_refused_and_not_left_as_it_is():
    model = adapted(DIT, DIT.routed())
    name = "emb.class_embedder.embedding_table"
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", name]), "labels")
    with pytest.raises(ValueError, match=r"must be plain LoRA, got Embedding of `.*embedding_table`"):
        route_adapter(model, "labels")


def test_an_adapter_that_takes_the_name_of_a_deleted_one_is_a_plain_one(tmp_path):
    model = route_adapter(adapted(FLUX))
    model.delete_adapters("default")
    with pytest.raises(ValueError, match="LoRA adapter of the model"):
        route_adapter(model)
    adapted(FLUX, model)
    assert adapter_routing(model) is None
    assert file_routing(save_routed_lora(model, tmp_path)) == {}
    assert adapter_routing(route_adapter(model))["routing_beta"] == 0.5


def test_embedded_timesteps_of_frames_are_routed_by_themselves():
    name = "AnyFlowTransformer3DModel"
    model = build(name)
    layers = r".*time_embedder\.linear_1"
    inject_adapter_in_model(LoraConfig(r=8, target_modules=layers, init_lora_weights=False), model)
    arguments = inputs(name)
    assert arguments["timestep"].ndim == 2
    expected = run(model, arguments)
    assert not torch.allclose(run(route_adapter(model), arguments), expected)


# By class: timesteps of a sample, a layer of the image stream, and those of others.
STREAMS = [
    ("WanTransformer3DModel", (18,), "attn1.to_q", ["attn2.to_k", "text_embedder.linear_1"]),
    ("SkyReelsV2Transformer3DModel", (3,), "attn2.to_q", ["attn2.to_v"]),
    ("LTX2VideoTransformer3DModel", (12,), "video_to_audio_attn.to_k", ["audio_ff.net.2", "prompt_adaln.linear"]),
    ("SanaWMLTX2RefinerTransformer3DModel", (12,), "ff.net.2", ["attn2.to_k", "caption_projection.linear_1"]),
    ("SanaWMTransformer3DModel", (1, 3), "cross_attn.q_linear", ["cross_attn.kv_linear", "y_proj.fc1"]),
    ("SanaVideoTransformer3DModel", (12,), "patch_embedding", ["attn2.to_k"]),
    ("CosmosTransformer3DModel", (1, 2, 1, 1), "attn1.to_k", ["attn2.to_k"]),
]


@pytest.mark.parametrize("captions", [5, 36])
@pytest.mark.parametrize(("name", "shape", "image", "others"), STREAMS)
def test_tokens_of_the_image_have_their_own_windows_and_others_that_of_the_noisiest(
    name, shape, image, others, captions
):
    """However long captions are: 36 is a multiple of all numbers of timesteps."""
    model = build(name)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=[image, *others], init_lora_weights=False), model)
    route_adapter(model, routing_beta=0.5, routing_alpha=1.0)
    low, high = adapter_routing(model)["routing_timestep_range"]
    timestep = low + (high - low) * torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    arguments = {**inputs(name), "timestep": timestep}
    if "audio_hidden_states" in arguments:
        arguments["audio_timestep"] = torch.tensor([300.0, 700.0])
    for key, text in inputs(name).items():
        if "encoder" in key:
            axis = -1 if "mask" in key else -2
            arguments[key] = torch.cat([text.narrow(axis, 0, 1)] * captions, dim=axis)
    seen = {}
    for layer, module in model.named_modules():
        if layer.endswith("lora_A.default"):
            module.register_forward_hook(lambda _, args, out, layer=layer: (seen.setdefault(layer, out != 0), None)[1])
    run(model, arguments)
    window = partial(routing_mask, num_channels=4, alpha=1.0, beta=0.5, timestep_range=(low, high))
    windows, noisiest = window(timestep.flatten()).unflatten(0, (2, -1)), window(timestep.flatten(1).amax(1))
    assert any(f"{image}.lora_A" in layer for layer in seen)
    for layer, found in seen.items():
        found = found.movedim(1, -1) if found.ndim == 5 and image == "patch_embedding" in layer else found
        found = found.reshape(2, -1, 4)
        if f"{image}.lora_A" in layer:
            expected = windows.repeat_interleave(found.shape[1] // windows.shape[1], dim=1)
        else:
            expected = noisiest[:, None].expand_as(found)
        assert torch.equal(found, expected), layer


# Files.


def test_a_file_says_how_it_is_routed(tmp_path):
    model = route_adapter(adapted(FLUX), routing_beta=0.5, routing_alpha=2.0)
    expected = output(model, FLUX.inputs())
    path = save_routed_lora(model, tmp_path)
    assert file_routing(path)[""]["routing_alpha"] == 2.0
    loaded = FLUX.plain()
    load_routed_lora(loaded, tmp_path)
    torch.testing.assert_close(output(loaded, FLUX.inputs()), expected)
    assert adapter_routing(loaded) == adapter_routing(model)


def test_an_ordinary_file_is_loaded_as_it_is(tmp_path):
    model = adapted(FLUX)
    save_routed_lora(model, tmp_path)
    loaded = FLUX.plain()
    load_routed_lora(loaded, tmp_path)
    torch.testing.assert_close(output(loaded, FLUX.inputs()), output(model, FLUX.inputs()))
    assert adapter_routing(loaded) is None


def test_loading_without_routing_is_a_warning(tmp_path, caplog):
    model = route_adapter(adapted(FLUX))
    save_routed_lora(model, tmp_path)
    loaded = FLUX.plain()
    with caplog.at_level(logging.WARNING):
        loaded.load_lora_adapter(tmp_path, weight_name=LORA_FILE, prefix=None)
    assert "this_lora_is_routed_load_it_with_diffusers_dtr.load_routed_lora" in caplog.text
    torch.testing.assert_close(output(loaded, FLUX.inputs()), output(unroute_adapter(model), FLUX.inputs()))
