"""Routed U-Nets: every unit computes the formula, whatever blocks the config asks for."""

import re

import pytest
import torch
from diffusers import Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from tiny_models import TIMESTEPS, UNET, UNET_CONDITION, in_double, output, recorded_calls, window


UNITS = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions)\.\d+"
SAMPLERS = r".*(samplers\.\d+|resnet_down|resnet_up|skip_conv)"

PLAIN_DOWN, PLAIN_UP = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
CONFIGS = {
    "DDPM": {},
    "ADM": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "num_class_embeds": 5,
    },
    "ADM with a norm in the middle": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "resampling by ResNet blocks with attention": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "no attention": {"down_block_types": PLAIN_DOWN, "up_block_types": PLAIN_UP, "add_attention": False},
    "no middle": {"down_block_types": PLAIN_DOWN, "up_block_types": PLAIN_UP, "mid_block_type": None},
    "class timesteps": {"class_embed_type": "timestep"},
    "class embeddings": {"class_embed_type": "identity"},
    "skip convolutions, Fourier features, scaled": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "time_embedding_type": "fourier",
        "mid_block_scale_factor": 1.41,
        "block_out_channels": (32, 64),
    },
    "two layers per block": {"layers_per_block": 2},
}
CONDITION_CONFIGS = {
    "Stable Diffusion 1": {},
    "Stable Diffusion 2": {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True},
    "Stable Diffusion XL": {
        "use_linear_projection": True,
        "attention_head_dim": (2, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 30,
    },
    "attention without transformers": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "resnet_out_scale_factor": 1.41,
    },
}
EVERY = [(UNET, name, config) for name, config in CONFIGS.items()]
EVERY += [(UNET_CONDITION, name, config) for name, config in CONDITION_CONFIGS.items()]
every_config = pytest.mark.parametrize(("family", "name", "config"), EVERY, ids=[name for _, name, _ in EVERY])


def arguments(family, config):
    # Fourier features are made of log σ: 0 is none.
    inputs = family.inputs(TIMESTEPS + (config.get("time_embedding_type") == "fourier"))
    if "addition_embed_type" in config:
        inputs["added_cond_kwargs"] = {"text_embeds": torch.ones(4, 6), "time_ids": torch.arange(24.0).reshape(4, 6)}
    labels = {"timestep": torch.tensor([3, 1, 4, 1]), "identity": torch.ones(4, 32)}
    inputs["class_labels"] = labels.get(config.get("class_embed_type"))
    if "num_class_embeds" in config:
        inputs["class_labels"] = torch.arange(4)
    return inputs


def expected_unit(plain, x, args, kwargs, mask):
    """y = shortcut(x) + F(m ⊙ x), from what the plain unit makes of m ⊙ x, which is shortcut(m ⊙ x) + F(m ⊙ x)."""
    mask = mask.reshape(*mask.shape, 1, 1)
    y = plain(mask * x, *args, **kwargs)
    if isinstance(plain, ResnetBlock2D):
        shortcut = plain.conv_shortcut or torch.nn.Identity()
        return y + (shortcut(x) - shortcut(mask * x)) / plain.output_scale_factor
    if isinstance(plain, Transformer2DModel):
        return y[0] + (1 - mask) * x
    return y + (1 - mask) * x / plain.rescale_output_factor


@every_config
@torch.no_grad()
def test_every_unit_computes_the_formula(family, name, config):
    """In float64, and all that is between them is as in the plain model."""
    if name == "class timesteps":
        pytest.skip("diffusers cannot embed class timesteps in float64")
    routed = family.routed(**config, routing_beta=0.6, routing_alpha=2.0).double()
    plain, inputs = family.plain(**config).double(), in_double(arguments(family, config))
    calls = recorded_calls(routed, f"{UNITS}|{SAMPLERS}", inputs)
    widths = set()
    for name, ((x, *args), kwargs, found) in calls.items():
        if re.fullmatch(UNITS, name):
            mask = window(inputs["timestep"], x.shape[1], alpha=2.0, beta=0.6)
            expected = expected_unit(plain.get_submodule(name), x, args, kwargs, mask)
            found = found[0] if isinstance(found, tuple) else found
            widths.add(x.shape[1])
        else:
            expected = plain.get_submodule(name)(x, *args, **kwargs)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text)
    # A decoder sees what the encoder hands over beside its own input.
    first, last = config.get("block_out_channels", (8, 16))
    assert {first, last, first + last} <= widths <= set(routed.routed_widths)
    assert sum(".resnets." in name for name in calls) >= 6


@every_config
def test_a_share_of_one_is_the_base_model_to_the_bit(family, name, config):
    plain, inputs = family.plain(**config), arguments(family, config)
    expected = output(plain, inputs)
    assert torch.equal(output(family.conversion(plain, routing_beta=1.0), inputs), expected)
    assert not torch.equal(output(family.conversion(plain), inputs), expected)


K_BLOCKS = {"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KUpBlock2D",) * 2}
UNKNOWN = [
    (UNET, {**K_BLOCKS, "block_out_channels": (32, 64), "norm_num_groups": 32}, "ResnetBlockCondNorm2D"),
    (UNET_CONDITION, {"dual_cross_attention": True}, "DualTransformer2DModel"),
]


@pytest.mark.parametrize(("family", "config", "unit"), UNKNOWN, ids=["K-diffusion", "dual attention"])
def test_units_that_cannot_be_routed_are_named(family, config, unit):
    with pytest.raises(TypeError, match=f"A U-Net with a `{unit}` cannot be routed"):
        family.routed(**config)


def test_a_window_without_channels_is_refused_before_a_layer_is_built(monkeypatch):
    monkeypatch.setattr(UNET.routed_class.plain_class, "__init__", None)
    with pytest.raises(ValueError, match=r"`routing_beta`=0.1 leaves none of 8 channels active"):
        UNET.routed(routing_beta=0.1)
