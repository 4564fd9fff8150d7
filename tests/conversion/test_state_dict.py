from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from tiny_dit import CONFIG, output, routed_dit

from diffusers_dtr import DTRTransformer2DModel
from diffusers_dtr.conversion import convert_original_dit, original_dit_state_dict
from diffusers_dtr.conversion.masks import mask_table


FIXTURES = Path(__file__).parents[1] / "fixtures"
REFERENCES = ["dtr_dit_tiny", "dtr_dit_unconditional"]
# float32 against float32, computed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Reference:
    """A checkpoint under the authors' names, with inputs and the outputs of the authors' implementation."""

    def __init__(self, name):
        with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
            self.metadata = file.metadata()
        prefix = "checkpoint."
        self.state_dict = {
            key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)
        }
        self.tensors = tensors
        self.routing_beta = float(self.metadata["beta"])

    def convert(self, **config):
        config = {"routing_beta": self.routing_beta, **config}
        return convert_original_dit(self.state_dict, int(self.metadata["num_heads"]), **config)

    def add_masks(self, num_channels=None, blocks=None):
        """What the authors' code saves beside the weights."""
        num_channels = num_channels or int(self.metadata["hidden_size"])
        for block in range(int(self.metadata["depth"])) if blocks is None else blocks:
            table = mask_table(1000, num_channels, 4.0, self.routing_beta)
            self.state_dict[f"blocks.{block}.routing._unit_mapping"] = table

    def outputs(self, model):
        names = {"hidden_states": "sample", "timestep": "timestep", "class_labels": "class_labels"}
        with torch.no_grad():
            return model(**{argument: self.tensors[name] for argument, name in names.items()}).sample


@pytest.fixture(params=REFERENCES)
def reference(request):
    return Reference(request.param)


@pytest.fixture
def tiny():
    return Reference("dtr_dit_tiny")


def test_outputs_are_the_authors_routed_and_unrouted(reference):
    model = reference.convert()
    torch.testing.assert_close(reference.outputs(model), reference.tensors["output_routed"], **CLOSE)
    for unrouted in (reference.convert(routing_beta=1.0), reference.convert(routing_type="none")):
        torch.testing.assert_close(reference.outputs(unrouted), reference.tensors["output_unrouted"], **CLOSE)


def test_the_architecture_is_read_off_the_shapes(reference):
    model, metadata = reference.convert(), reference.metadata
    config = model.config
    conditional = int(metadata["num_classes"]) > 1
    assert config.num_layers == int(metadata["depth"])
    assert config.num_attention_heads * config.attention_head_dim == int(metadata["hidden_size"])
    assert config.patch_size == int(metadata["patch_size"])
    assert config.sample_size == int(metadata["input_size"])
    assert config.in_channels == int(metadata["in_channels"])
    assert config.out_channels == 2 * config.in_channels
    assert config.num_embeds_ada_norm == int(metadata["num_classes"])
    assert config.class_dropout_prob == (0.1 if conditional else 0.0)
    assert (config.norm_eps, config.freq_shift, model.training) == (1e-6, 0, False)
    count = sum(parameter.numel() for parameter in model.parameters()) + model.pos_embed.pos_embed.numel()
    assert count == int(metadata["parameters_with_pos_embed"])


def test_the_routing_is_read_from_the_masks(tiny):
    tiny.add_masks()
    model = convert_original_dit(tiny.state_dict, int(tiny.metadata["num_heads"]))
    config = model.config
    assert (config.routing_type, config.routing_alpha, config.routing_beta) == ("dtr", 4.0, tiny.routing_beta)
    assert config.routing_timestep_range == (0, 999)
    torch.testing.assert_close(tiny.outputs(model), tiny.tensors["output_routed"], **CLOSE)
    assert not any("mask" in key or "mapping" in key for key in model.state_dict())


@pytest.mark.parametrize(
    "given",
    [{"routing_beta": 0.7}, {"routing_alpha": 3.0}, {"routing_type": "none"}, {"routing_timestep_range": (0, 499)}],
)
def test_a_routing_that_the_masks_do_not_have_is_refused(tiny, given):
    tiny.add_masks()
    with pytest.raises(ValueError, match=r"must be that of the checkpoint's masks, .*'routing_alpha': 4\.0") as error:
        tiny.convert(**given)
    assert repr(given) in str(error.value)


def test_masks_that_do_not_fit_the_model_are_refused(tiny):
    tiny.add_masks(num_channels=48)
    with pytest.raises(ValueError, match="must have masks of 64 channels for 3 blocks, got 48 channels for 3 blocks"):
        tiny.convert()
    del tiny.state_dict["blocks.0.routing._unit_mapping"]
    tiny.add_masks(blocks=(1, 2))
    with pytest.raises(ValueError, match="for 3 blocks, got 64 channels for 2 blocks"):
        tiny.convert()


def test_heads_are_those_of_the_published_model_of_that_size(tiny):
    with pytest.raises(
        ValueError, match="`num_attention_heads` must be given: 3 blocks of width 64 are of no published"
    ):
        convert_original_dit(tiny.state_dict)
    model = DTRTransformer2DModel.from_preset("DiT-S/8")
    assert convert_original_dit(original_dit_state_dict(model)).config.num_attention_heads == 6


def test_positions_that_averaging_has_moved_are_put_right(tiny):
    exact = tiny.state_dict["pos_embed"].clone()
    averaged = tiny.state_dict["pos_embed"]
    for _ in range(10_000):
        averaged.mul_(0.9999).add_(exact, alpha=1 - 0.9999)
    assert (averaged - exact).abs().max() > 1e-4
    assert torch.equal(tiny.convert().pos_embed.pos_embed, exact)


# ---- and back


def test_an_original_state_dict_comes_back_to_the_bit(reference):
    reference.add_masks()
    back = original_dit_state_dict(reference.convert())
    assert back.keys() == reference.state_dict.keys()
    assert all(torch.equal(value, reference.state_dict[key]) for key, value in back.items())
    assert all(value.dtype == reference.state_dict[key].dtype for key, value in back.items())


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
    model = routed_dit(norm_eps=1e-6, freq_shift=0, **config)
    dropped = model.config.class_dropout_prob
    back = convert_original_dit(original_dit_state_dict(model), 2, class_dropout_prob=dropped)
    for name in ("num_layers", "sample_size", "routing_alpha", "routing_beta", *CONFIG, *config):
        assert back.config[name] == model.config[name]
    weights = model.state_dict()
    assert back.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in back.state_dict().items())
    assert torch.equal(output(back), output(model))


def test_an_unrouted_model_is_written_without_masks_in_its_precision():
    for config in ({"routing_beta": 1.0}, {"routing_type": "none"}):
        state_dict = original_dit_state_dict(routed_dit(norm_eps=1e-6, freq_shift=0, **config).to(torch.bfloat16))
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
    model = routed_dit(**{"norm_eps": 1e-6, "freq_shift": 0, **config})
    with pytest.raises(ValueError, match=message):
        original_dit_state_dict(model)


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


def rename(state_dict):
    state_dict["blocks.1.extra.weight"] = state_dict.pop("blocks.1.attn.proj.weight")


def swap_positions(state_dict):
    state_dict["pos_embed"] = state_dict["pos_embed"].flip(1)


def drop(key):
    return lambda state_dict: state_dict.pop(key)


def reshape(key, *shape):
    return lambda state_dict: state_dict.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (dict.clear, r"`state_dict` must be that of an original DiT, but it has no `x_embedder\.proj\.weight`"),
        (drop("y_embedder.embedding_table.weight"), r"has no `y_embedder\.embedding_table\.weight`"),
        (drop("blocks.1.mlp.fc2.bias"), r"Missing key.* \"transformer_blocks\.1\.ff\.net\.2\.bias\""),
        (rename, r"that an original DiT does not have: `blocks\.1\.extra\.weight`"),
        (reshape("blocks.2.mlp.fc1.bias", 8), r"size mismatch for transformer_blocks\.2\.ff\.net\.0\.proj\.bias"),
        (reshape("blocks.1.attn.qkv.bias"), r"size mismatch for transformer_blocks\.1\.attn1\.to_q\.bias"),
        (reshape("blocks.0.mlp.fc1.weight", 128, 64), r"fc1\.weight` must have 4 x 64 rows .*, got 128"),
        (reshape("x_embedder.proj.weight", 64, 16), r"`x_embedder\.proj\.weight` must have 4 .* \(64, 16\)"),
        (reshape("x_embedder.proj.weight", 64, 4, 0, 0), r"must have 4 .*, got shape \(64, 4, 0, 0\)"),
        (reshape("final_layer.linear.weight"), r"`final_layer\.linear\.weight` must have 2 .*, got shape \(\)"),
        (reshape("pos_embed", 1, 0, 64), r"`pos_embed` must have 3 .*, got shape \(1, 0, 64\)"),
        (swap_positions, r"`pos_embed` must be the fixed sine-cosine table .* shape \(1, 16, 64\).* other values"),
    ],
)
def test_what_is_not_an_original_dit_is_refused(tiny, damage, message):
    damage(tiny.state_dict)
    with pytest.raises(ValueError, match=message):
        tiny.convert()


@pytest.mark.parametrize("heads", [0, 5])
def test_heads_must_divide_the_width(tiny, heads):
    with pytest.raises(ValueError, match=rf"`num_attention_heads` must divide the width 64, got {heads}\."):
        convert_original_dit(tiny.state_dict, heads)
