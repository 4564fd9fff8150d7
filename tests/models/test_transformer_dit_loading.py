"""Where a routed DiT's weights come from and go to: checkpoints, plain models, adapters, pipelines."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from tiny_dit import inputs, output, plain_dit, routed_dit

from diffusers_dtr import DTRTransformer2DModel


LOADING = [{}, {"low_cpu_mem_usage": False}, {"torch_dtype": torch.bfloat16}]
SAVING = [{}, {"variant": "fp16"}, {"max_shard_size": "20KB"}, {"max_shard_size": "20KB", "variant": "fp16"}]


def inputs_of(dtype):
    return {**inputs(), "hidden_states": inputs()["hidden_states"].to(dtype)}


def save(model, folder, saving):
    """Returns what loading needs to be told."""
    model.save_pretrained(folder, **saving)
    assert len(list(folder.glob("*.safetensors"))) > 1 or "max_shard_size" not in saving
    return {"variant": saving["variant"]} if "variant" in saving else {}


# Its own checkpoints.


@pytest.mark.parametrize("loading", [*LOADING, {"device_map": {"": "cpu"}}, {"device_map": "auto"}])
@pytest.mark.parametrize("saving", SAVING)
def test_a_saved_model_comes_back(tmp_path, saving, loading):
    model = routed_dit(routing_type="random", routing_seed=4, routing_timestep_range=(0, 1000.0), freq_shift=0)
    loaded = DTRTransformer2DModel.from_pretrained(tmp_path, **save(model, tmp_path, saving), **loading)
    # As everywhere in diffusers, the dtype asked for is that of the parameters and not of the fixed position table.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(loading.get("torch_dtype", torch.float32))
    assert loaded.dtype == model.dtype
    assert torch.equal(output(loaded, **inputs_of(loaded.dtype)), output(model, **inputs_of(loaded.dtype)))
    assert not loaded.training
    assert loaded.config.routing_timestep_range == [0, 1000.0]
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "DTRTransformer2DModel"


def test_config_values_can_be_replaced_while_loading(tmp_path):
    routed_dit().save_pretrained(tmp_path)
    loaded = DTRTransformer2DModel.from_pretrained(tmp_path, routing_beta=0.5)
    assert torch.equal(output(loaded), output(routed_dit(routing_beta=0.5)))


def test_loading_draws_no_initial_weights(tmp_path):
    routed_dit().save_pretrained(tmp_path / "ours")
    plain_dit().save_pretrained(tmp_path / "plain")
    state = torch.get_rng_state()
    DTRTransformer2DModel.from_pretrained(tmp_path / "ours")
    DTRTransformer2DModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(torch.get_rng_state(), state)


# diffusers' checkpoints, which repeat the embedders in every block.


@pytest.mark.parametrize("loading", LOADING)
@pytest.mark.parametrize("saving", SAVING)
def test_an_unrouted_model_with_the_weights_of_a_plain_one_equals_it_to_the_bit(tmp_path, saving, loading):
    loading = {**loading, **save(plain_dit(), tmp_path, saving)}
    model = DTRTransformer2DModel.from_pretrained(tmp_path, routing_beta=1.0, **loading)
    plain = DiTTransformer2DModel.from_pretrained(tmp_path, **loading)
    assert type(model) is DTRTransformer2DModel
    assert model.dtype == plain.dtype
    assert torch.equal(output(model, **inputs_of(plain.dtype)), output(plain, **inputs_of(plain.dtype)))
    assert not model.training


@pytest.mark.parametrize(
    "config", [{"norm_elementwise_affine": True}, {"attention_bias": False}, {"out_channels": None}]
)
def test_every_kind_of_plain_model_is_understood(config):
    plain = plain_dit(**config)
    assert torch.equal(output(DTRTransformer2DModel.from_transformer(plain, routing_type="none")), output(plain))


def test_a_plain_checkpoint_is_routed_by_default_and_as_told(tmp_path):
    plain_dit().save_pretrained(tmp_path)
    assert DTRTransformer2DModel.from_pretrained(tmp_path).config.routing_beta == 0.8
    loaded, info = DTRTransformer2DModel.from_pretrained(
        tmp_path, routing_beta=0.5, routing_alpha=2.0, output_loading_info=True
    )
    assert (loaded.config.routing_beta, loaded.config.routing_alpha) == (0.5, 2.0)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    loaded.save_pretrained(tmp_path / "ours")
    assert torch.equal(output(DTRTransformer2DModel.from_pretrained(tmp_path / "ours")), output(loaded))


def test_a_subfolder_is_found(tmp_path):
    plain_dit().save_pretrained(tmp_path / "transformer")
    loaded = DTRTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer", routing_beta=1.0)
    assert torch.equal(output(loaded), output(plain_dit()))


def test_embedders_that_were_trained_apart_are_refused(tmp_path):
    plain = plain_dit()
    with torch.no_grad():
        plain.transformer_blocks[2].norm1.emb.timestep_embedder.linear_2.bias[0] += 1e-6
    plain.save_pretrained(tmp_path)
    message = r"block 2 differs from that of block 0 in `timestep_embedder\.linear_2\.bias`"
    with pytest.raises(ValueError, match=message):
        DTRTransformer2DModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        DTRTransformer2DModel.from_transformer(plain)


@pytest.mark.parametrize("name", ["device_map", "quantization_config"])
def test_what_needs_our_layout_is_refused_for_theirs(tmp_path, name):
    plain_dit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"`{name}` does not work for a checkpoint of `DiTTransformer2DModel`"):
        DTRTransformer2DModel.from_pretrained(tmp_path, **{name: "auto"})


# A model in memory.


def test_a_routed_model_can_be_routed_anew():
    model = DTRTransformer2DModel.from_transformer(routed_dit(freq_shift=0), routing_beta=0.5)
    assert torch.equal(output(model), output(routed_dit(freq_shift=0, routing_beta=0.5)))


def test_a_misspelt_config_value_is_refused():
    with pytest.raises(TypeError, match="'routing_bta'"):
        DTRTransformer2DModel.from_transformer(plain_dit(), routing_bta=0.5)


# Adapters and memory savers of diffusers.


# diffusers' own pipeline.
