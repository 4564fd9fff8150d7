"""What diffusers and torch do to a model, done to routed ones."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from peft import LoraConfig
from safetensors.torch import save_file
from tiny_denoisers import build, inputs, run
from tiny_models import FLUX, PIXART, UNET_CONDITION, of_families, output

from diffusers_dtr import DTRFluxTransformer2DModel, DTRQwenImageTransformer2DModel, route, route_adapter
from diffusers_dtr.models.adapters import adapter_routing
from diffusers_dtr.run_record import LORA_FILE


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Equal to the bit."""


@of_families((FLUX, PIXART, UNET_CONDITION))  # whose plain classes have fused projections that work
def test_fused_projections_are_routed_as_the_single_ones(family):
    model = family.routed(routing_beta=0.5)
    expected = output(model, family.inputs())
    model.fuse_qkv_projections()
    assert any("to_qkv" in name or "to_kv" in name for name, _ in model.named_modules())
    torch.testing.assert_close(output(model, family.inputs()), expected, rtol=1e-3, atol=1e-4)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(output(model, family.inputs()), expected, rtol=1e-3, atol=1e-4)


def test_a_single_file_of_weights_loads_as_a_routed_model(tmp_path):
    name = "QwenImageTransformer2DModel"
    plain = build(name)
    plain.save_pretrained(tmp_path / "config" / "transformer")
    save_file({key: value.contiguous() for key, value in plain.state_dict().items()}, tmp_path / "one.safetensors")
    where = {"config": str(tmp_path / "config"), "subfolder": "transformer"}
    found = DTRQwenImageTransformer2DModel.from_single_file(
        str(tmp_path / "one.safetensors"), **where, routing_beta=0.5
    )
    expected = QwenImageTransformer2DModel.from_single_file(str(tmp_path / "one.safetensors"), **where)
    assert type(found) is DTRQwenImageTransformer2DModel
    assert found.config.routing_beta == 0.5
    assert torch.equal(run(found, inputs(name)), run(route(expected, routing_beta=0.5), inputs(name)))


# LoRA that is swapped while a model runs.


def lora(folder, seed, rank=4):
    torch.manual_seed(seed)
    model = FLUX.plain()
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q"], init_lora_weights=False))
    model.save_lora_adapter(folder, weight_name=LORA_FILE)
    return {"weight_name": LORA_FILE, "prefix": None, "adapter_name": "default"}


@pytest.mark.parametrize("rank", [4, 2])
def test_an_adapter_of_a_routed_model_is_swapped(tmp_path, rank):
    first, second = lora(tmp_path / "first", 0), lora(tmp_path / "second", 1, rank)
    model, expected = FLUX.routed(), FLUX.routed()
    model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(tmp_path / "first", **first)
    model.load_lora_adapter(tmp_path / "second", hotswap=True, **second)
    expected.load_lora_adapter(tmp_path / "second", **second)
    assert type(model) is DTRFluxTransformer2DModel
    torch.testing.assert_close(output(model, FLUX.inputs()), output(expected, FLUX.inputs()))


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("is_routed", [False, True])
def test_a_routed_adapter_is_not_swapped_in_silence(tmp_path, is_prepared, is_routed):
    first, second = lora(tmp_path / "first", 0), lora(tmp_path / "second", 1)
    model = FLUX.routed() if is_routed else FLUX.plain()
    model.load_lora_adapter(tmp_path / "first", **first)
    route_adapter(model)
    expected = output(model, FLUX.inputs())
    if is_prepared:
        model.enable_lora_hotswap(target_rank=8, check_compiled="ignore")
        second["adapter_name"] = "second"
    with pytest.raises(ValueError, match=r"routed \(default\) cannot be hot-swapped: `unroute_adapter` them first"):
        model.load_lora_adapter(tmp_path / "second", hotswap=not is_prepared, **second)
    assert adapter_routing(model) is not None
    assert torch.equal(output(model, FLUX.inputs()), expected)


def test_an_adapter_that_was_padded_for_swapping_is_not_routed(tmp_path):
    model, first = FLUX.plain(), lora(tmp_path, 0)
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(tmp_path, **first)
    with pytest.raises(ValueError, match="was padded by `enable_lora_hotswap`: load it without"):
        route_adapter(model)
    assert type(model) is FluxTransformer2DModel
