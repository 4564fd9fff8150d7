"""The authors' weights and outputs, read into our model and written back."""

import pytest
import torch
from original_checkpoints import CLOSE, Reference, same
from peft import LoraConfig
from tiny_dit import CONFIG, output, routed_dit

from diffusers_dtr import DTRTransformer2DModel
from diffusers_dtr.conversion import convert_original_dit, original_dit_state_dict


ORIGINAL = {"norm_eps": 1e-6, "freq_shift": 0}


@pytest.fixture(params=["dtr_dit_tiny", "dtr_dit_unconditional"])
def reference(request):
    return Reference(request.param)


@pytest.fixture
def tiny():
    return Reference()


def test_outputs_are_the_authors_routed_and_unrouted(reference):
    routed, unrouted = reference.tensors["output_routed"], reference.tensors["output_unrouted"]
    for config, expected in (({}, routed), ({"routing_beta": 1.0}, unrouted), ({"routing_type": "none"}, unrouted)):
        torch.testing.assert_close(reference.outputs(reference.convert(**config)), expected, **CLOSE)


def test_the_architecture_is_read_off_the_shapes(reference):
    model, metadata = reference.convert(), reference.metadata
    config = model.config
    assert config.num_attention_heads * config.attention_head_dim == metadata["hidden_size"]
    names = ("num_layers", "patch_size", "sample_size", "in_channels", "num_embeds_ada_norm")
    theirs = ("depth", "patch_size", "input_size", "in_channels", "num_classes")
    assert [config[name] for name in names] == [metadata[name] for name in theirs]
    assert config.out_channels == 2 * config.in_channels
    assert config.class_dropout_prob == (0.1 if metadata["num_classes"] > 1 else 0.0)
    assert (config.norm_eps, config.freq_shift, model.training) == (1e-6, 0, False)
    count = sum(parameter.numel() for parameter in model.parameters()) + model.pos_embed.pos_embed.numel()
    assert count == metadata["parameters_with_pos_embed"]


def test_the_routing_is_read_from_the_masks(tiny):
    model = convert_original_dit(tiny.with_masks(), tiny.heads)
    config = model.config
    assert (config.routing_type, config.routing_alpha, config.routing_beta) == ("dtr", 4.0, tiny.routing_beta)
    assert config.routing_timestep_range == (0, 999)
    torch.testing.assert_close(tiny.outputs(model), tiny.tensors["output_routed"], **CLOSE)


@pytest.mark.parametrize(
    "given",
    [{"routing_beta": 0.7}, {"routing_alpha": 3.0}, {"routing_type": "none"}, {"routing_timestep_range": (0, 499)}],
)
def test_a_routing_that_the_masks_do_not_have_is_refused(tiny, given):
    with pytest.raises(ValueError, match=r"must be that of the checkpoint's masks, .*'routing_alpha': 4\.0") as error:
        convert_original_dit(tiny.with_masks(), tiny.heads, **given)
    assert repr(given) in str(error.value)


@pytest.mark.parametrize(
    ("masks", "found"),
    [({"num_channels": 48}, "48 channels for 3 blocks"), ({"blocks": (1, 2)}, "64 channels for 2 blocks")],
)
def test_masks_that_do_not_fit_the_model_are_refused(tiny, masks, found):
    with pytest.raises(ValueError, match=f"must have masks of 64 channels for 3 blocks, got {found}"):
        convert_original_dit(tiny.with_masks(**masks), tiny.heads)


def test_heads_are_those_of_the_published_model_of_that_size(tiny):
    with pytest.raises(ValueError, match="`num_attention_heads` must be given: 3 blocks of width 64 are of no"):
        convert_original_dit(tiny.state_dict)
    model = DTRTransformer2DModel.from_preset("DiT-S/8")
    assert convert_original_dit(original_dit_state_dict(model)).config.num_attention_heads == 6


def test_positions_that_averaging_has_moved_are_put_right(tiny):
    averaged = tiny.state_dict["pos_embed"]
    exact = averaged.clone()
    for _ in range(10_000):
        averaged.mul_(0.9999).add_(exact, alpha=1 - 0.9999)
    assert (averaged - exact).abs().max() > 1e-4
    assert torch.equal(tiny.convert().pos_embed.pos_embed, exact)


# ---- and back


def test_an_original_state_dict_comes_back_to_the_bit(reference):
    state_dict = reference.with_masks()
    assert same(original_dit_state_dict(convert_original_dit(state_dict, reference.heads)), state_dict)


@pytest.mark.parametrize(
    "config",
    [
        {"routing_beta": 0.6, "routing_alpha": 2.5, "routing_timestep_range": (0, 249)},
        {"routing_beta": 1.0},
        {"attention_bias": False, "out_channels": 4},
        {"class_dropout_prob": 0.0, "num_embeds_ada_norm": 6},
    ],
)
def test_a_model_comes_back_to_the_bit(config):
    model = routed_dit(**ORIGINAL, **config)
    dropped = model.config.class_dropout_prob
    back = convert_original_dit(original_dit_state_dict(model), 2, class_dropout_prob=dropped)
    for name in ("num_layers", "sample_size", "routing_alpha", "routing_beta", *CONFIG, *config):
        assert back.config[name] == model.config[name]
    assert same(back.state_dict(), model.state_dict())
    assert torch.equal(output(back), output(model))


@pytest.mark.parametrize("config", [{"routing_beta": 1.0}, {"routing_type": "none"}])
def test_an_unrouted_model_is_written_without_masks_in_its_precision(config):
    state_dict = original_dit_state_dict(routed_dit(**ORIGINAL, **config).to(torch.bfloat16))
    assert not any("routing" in key for key in state_dict)
    assert {value.dtype for value in state_dict.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_eps": 1e-5}, "`norm_eps`=1e-06 only, got a model with 1e-05. Use this model as"),
        ({"freq_shift": 1}, "`freq_shift`=0 only, got a model with 1"),
        ({"activation_fn": "gelu"}, "`activation_fn`='gelu-approximate' only, got a model with 'gelu'"),
        ({"norm_elementwise_affine": True}, "`norm_elementwise_affine`=False only, got a model with True"),
        ({"num_embeds_ada_norm": None}, "no model without classes"),
        ({"routing_type": "random"}, "only, got a model with 'random'"),
        ({"routing_timestep_range": (1, 999)}, r"only, got a model with 'dtr' and \(1, 999\)"),
        ({"routing_timestep_range": (0, 0.5)}, r"only, got a model with 'dtr' and \(0, 0.5\)"),
    ],
)
def test_what_the_original_cannot_express_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        original_dit_state_dict(routed_dit(**{**ORIGINAL, **config}))


def test_adapters_are_not_left_out_in_silence(tiny):
    model = tiny.convert()
    model.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"but it has `transformer_blocks\.0\.attn1\.to_q\.base_layer"):
        original_dit_state_dict(model)


def test_a_converted_model_is_saved_and_shares_nothing_with_its_source(tiny, tmp_path):
    model = tiny.convert()
    expected = tiny.outputs(model)
    for tensor in tiny.state_dict.values():
        tensor.zero_()
    assert torch.equal(tiny.outputs(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.outputs(DTRTransformer2DModel.from_pretrained(tmp_path)), expected)


def test_the_position_table_may_be_missing_if_the_size_is_given_and_half_precision_stays(tiny):
    tiny.state_dict = {key: value.half() for key, value in tiny.state_dict.items() if key != "pos_embed"}
    model = tiny.convert(sample_size=8)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    torch.testing.assert_close(tiny.outputs(model.float()), tiny.tensors["output_routed"], rtol=0.02, atol=0.02)


FC1 = "blocks.0.mlp.fc1.weight"
PATCHES = "x_embedder.proj.weight"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (PATCHES, None, r"`state_dict` must be that of an original DiT, but it has no `x_embedder\.proj\.weight`"),
        ("y_embedder.embedding_table.weight", None, r"has no `y_embedder\.embedding_table\.weight`"),
        ("blocks.1.mlp.fc2.bias", None, r"Missing key.* \"transformer_blocks\.1\.ff\.net\.2\.bias\""),
        ("blocks.1.extra.weight", (1,), r"that an original DiT does not have: `blocks\.1\.extra\.weight`"),
        ("blocks.99999999.attn.qkv.bias", (48,), "must have blocks 0 to 99999999, got 4 of them"),
        ("blocks.2.mlp.fc1.bias", (8,), r"size mismatch for transformer_blocks\.2\.ff\.net\.0\.proj\.bias"),
        ("blocks.1.attn.qkv.bias", (), r"size mismatch for transformer_blocks\.1\.attn1\.to_q\.bias"),
        (FC1, (128, 64), r"fc1\.weight` must have 4 x 64 rows .*, got 128"),
        (PATCHES, (64, 16), r"`x_embedder\.proj\.weight` must have 4 .* \(64, 16\)"),
        (PATCHES, (64, 4, 0, 0), r"must have 4 .*, got shape \(64, 4, 0, 0\)"),
        ("pos_embed", (1, 16, 64), r"`pos_embed` must be the fixed sine-cosine table .* shape \(1, 16, 64\)"),
    ],
)
def test_what_is_not_an_original_dit_is_refused(tiny, name, shape, message):
    if shape is None:
        del tiny.state_dict[name]
    else:
        tiny.state_dict[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        tiny.convert()


@pytest.mark.parametrize("heads", [0, 5])
def test_heads_must_divide_the_width(tiny, heads):
    with pytest.raises(ValueError, match=rf"`num_attention_heads` must divide the width 64, got {heads}\."):
        convert_original_dit(tiny.state_dict, heads)
