import accelerate
import pytest

from diffusers_dtr import DIT_PRESETS, DTRTransformer2DModel


# Depth, width and heads of arXiv 2212.09748, Table 1 (S: DTR's and the DiT code's).
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def original_parameter_count(depth, width, patch_size, in_channels=4, out_channels=8, classes=1000, size=32):
    """Of the original code, which counts its fixed table of positions."""

    def linear(fan_in, fan_out):
        return (fan_in + 1) * fan_out

    attention_and_mlp = linear(width, 3 * width) + linear(width, width) + 2 * 4 * width**2 + 5 * width
    block = attention_and_mlp + linear(width, 6 * width)
    embedders = linear(256, width) + linear(width, width) + (classes + 1) * width
    patches = linear(patch_size**2 * in_channels, width) + linear(width, patch_size**2 * out_channels)
    return depth * block + embedders + patches + linear(width, 2 * width) + (size // patch_size) ** 2 * width


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters()) + model.pos_embed.pos_embed.numel()


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_a_preset_has_the_size_of_the_original(size, patch_size):
    with accelerate.init_empty_weights():
        model = DTRTransformer2DModel.from_preset(f"DiT-{size}/{patch_size}")
    depth, width, heads = SIZES[size]
    assert len(model.transformer_blocks) == depth
    assert model.inner_dim == width
    assert model.transformer_blocks[0].attn1.heads == heads
    assert parameter_count(model) == original_parameter_count(depth, width, patch_size)


@pytest.mark.parametrize(("preset", "count"), [("DiT-S/4", 32_945_024), ("DiT-XL/2", 675_129_632)])
def test_the_published_parameter_counts_are_met(preset, count):
    with accelerate.init_empty_weights():
        model = DTRTransformer2DModel.from_preset(preset)
    assert parameter_count(model) == count


def test_a_preset_follows_the_original_where_diffusers_differs():
    config = DTRTransformer2DModel.from_preset("DiT-S/8", num_layers=1).config
    assert (config.norm_eps, config.freq_shift, config.class_dropout_prob) == (1e-6, 0, 0.1)
    assert (config.routing_alpha, config.routing_beta, config.routing_type) == (4.0, 0.8, "dtr")


def test_values_of_a_preset_can_be_replaced():
    changes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_embeds_ada_norm": 10, "num_layers": 1}
    before = dict(DIT_PRESETS["DiT-S/2"])
    config = DTRTransformer2DModel.from_preset("DiT-S/2", **changes).config
    assert {name: config[name] for name in changes} == changes
    assert before == DIT_PRESETS["DiT-S/2"]


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"`preset` must be one of DiT-S/2, .*DiT-XL/8, got 'DiT-XL/3'\."):
        DTRTransformer2DModel.from_preset("DiT-XL/3")
