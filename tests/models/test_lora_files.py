"""LoRA files of which the routing does not fit, and files that diffusers writes."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, PixArtTransformer2DModel
from peft import LoraConfig
from tiny_models import FLUX, PIXART, output

from diffusers_dtr import load_routed_lora, mark_routed, route_adapter, save_routed_lora
from diffusers_dtr.models.lora_header import file_routing
from diffusers_dtr.run_record import LORA_FILE


@pytest.fixture
def lora_file(tmp_path):
    return save_routed_lora(route_adapter(adapted(FLUX.plain())), tmp_path)


def adapted(model, name="default"):
    config = LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)
    model.add_adapter(config, adapter_name=name)
    return model


def flux_pipeline(model):
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), **parts, transformer=model)


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


@pytest.mark.parametrize("has_other", [False, True])
@pytest.mark.parametrize("of_pipeline", [False, True])
def test_an_adapter_that_cannot_be_routed_is_taken_off_again(tmp_path, of_pipeline, has_other):
    """Of rank 4, a share of 0.1 leaves no channel, which the ranks alone tell."""
    saved, model = adapted(FLUX.plain()), FLUX.plain()
    if has_other:
        route_adapter(adapted(model, "other"), "other")
    before, expected = type(model), output(model, FLUX.inputs())
    names = set(model.state_dict())
    target = flux_pipeline(model) if of_pipeline else model
    if of_pipeline:
        flux_pipeline(saved).save_lora_weights(tmp_path, adapted_layers(saved))
    else:
        saved.save_lora_adapter(tmp_path)
    mark_routed(tmp_path / LORA_FILE, {"transformer" if of_pipeline else "": {"routing_beta": 0.1}})
    with pytest.raises(ValueError, match="leaves none of 4 channels active"):
        load_routed_lora(target, tmp_path, "new")
    assert (type(model), set(model.state_dict())) == (before, names)
    assert set(getattr(model, "peft_config", ())) == ({"other"} if has_other else set())
    assert torch.equal(output(model, FLUX.inputs()), expected)


def adapted_layers(model):
    return {name.replace(".default", ""): value for name, value in model.state_dict().items() if "lora_" in name}


def test_an_adapter_that_has_the_name_already_stays(lora_file):
    model = route_adapter(adapted(FLUX.plain()))
    expected = output(model, FLUX.inputs())
    with pytest.raises(ValueError, match="already in use"):
        load_routed_lora(model, lora_file)
    assert torch.equal(output(model, FLUX.inputs()), expected)


@pytest.mark.parametrize("make", [FLUX.plain, FLUX.routed], ids=["plain", "routed"])
def test_what_a_model_saves_itself_says_how_it_is_routed(tmp_path, make):
    model = route_adapter(adapted(make()), routing_beta=0.25)
    model.save_lora_adapter(tmp_path, weight_name="style.safetensors")
    assert file_routing(tmp_path / "style.safetensors")[""]["routing_beta"] == 0.25
    loaded = make()
    load_routed_lora(loaded, tmp_path / "style.safetensors")
    assert torch.equal(output(loaded, FLUX.inputs()), output(model, FLUX.inputs()))


def test_a_pickle_cannot_say_how_an_adapter_is_routed(tmp_path):
    with pytest.raises(ValueError, match="safe_serialization"):
        route_adapter(adapted(FLUX.plain())).save_lora_adapter(tmp_path, safe_serialization=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [["default"], None, "style"])
def test_an_adapter_to_be_saved_must_be_there(tmp_path, name):
    with pytest.raises(ValueError, match=r"`adapter_name` must be .*\(default\)"):
        save_routed_lora(route_adapter(adapted(FLUX.plain())), tmp_path, name)


def test_an_adapter_is_loaded_under_a_name(lora_file):
    with pytest.raises(ValueError, match=r"`adapter_name` must be a name, got \['default'\]"):
        load_routed_lora(FLUX.plain(), lora_file, ["default"])


def test_a_file_that_is_not_safetensors_is_named(tmp_path):
    (tmp_path / "lora.bin").write_bytes(b"\x80\x02" * 8)
    with pytest.raises(ValueError, match=r"lora\.bin must be safetensors .*`safe_serialization`"):
        load_routed_lora(FLUX.plain(), tmp_path / "lora.bin")
