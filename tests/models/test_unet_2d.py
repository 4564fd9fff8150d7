import re

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from tiny_models import TIMESTEPS, UNET, in_double, output, recorded_calls, window

from diffusers_dtr import DTRUNet2DModel


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


def arguments(config, timestep=TIMESTEPS):
    labels = {"timestep": torch.tensor([3, 1, 4, 1]), "identity": torch.ones(4, 32)}
    class_labels = labels.get(config.get("class_embed_type"))
    if "num_class_embeds" in config:
        class_labels = torch.arange(len(timestep))
    # Fourier features are made of log σ: 0 is none.
    return {**UNET.inputs(timestep + (config.get("time_embedding_type") == "fourier")), "class_labels": class_labels}


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


@torch.no_grad()
def assert_units_are_routed(family, config, inputs):
    """Compare every unit of the routed model in float64 with the formula, and all that is between them with itself."""
    routed = family.routed(**config, routing_beta=0.6, routing_alpha=2.0).double()
    plain = family.plain(**config).double()
    calls = recorded_calls(routed, f"{UNITS}|{SAMPLERS}", in_double(inputs))
    masked = set()
    for name, ((x, *args), kwargs, found) in calls.items():
        if re.fullmatch(UNITS, name):
            mask = window(inputs["timestep"], x.shape[1], alpha=2.0, beta=0.6)
            expected = expected_unit(plain.get_submodule(name), x, args, kwargs, mask)
            found = found[0] if isinstance(found, tuple) else found
            masked.add(x.shape[1])
        else:
            expected = plain.get_submodule(name)(x, *args, **kwargs)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text)
    return calls, masked


# diffusers cannot embed class timesteps in float64.
@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"class timesteps"}))
def test_every_unit_computes_the_formula(name):
    config = CONFIGS[name]
    calls, widths = assert_units_are_routed(UNET, config, arguments(config))
    first, last = config.get("block_out_channels", (8, 16))
    assert {first, last, first + last} <= widths
    assert sum(".resnets." in name for name in calls) >= 6


def test_every_unit_is_called_with_its_whole_concatenated_input():
    calls = recorded_calls(UNET.routed(), UNITS, UNET.inputs())
    widths = [calls[f"up_blocks.{block}.resnets.{layer}"][0][0].shape[1] for block in (0, 1) for layer in (0, 1)]
    assert widths == [32, 24, 24, 16]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_share_of_one_is_the_base_model_to_the_bit(config):
    plain = UNET.plain(**config)
    expected = output(plain, arguments(config))
    assert torch.equal(output(DTRUNet2DModel.from_unet(plain, routing_beta=1.0), arguments(config)), expected)
    assert not torch.equal(output(DTRUNet2DModel.from_unet(plain), arguments(config)), expected)


@pytest.mark.parametrize("t", [978, torch.tensor(978), torch.tensor([978])])
def test_a_scalar_timestep_counts_for_the_whole_batch(t):
    model, inputs = UNET.routed(), UNET.inputs(torch.full((4,), 978))
    assert torch.equal(output(model, {**inputs, "timestep": t}), output(model, inputs))


def test_blocks_that_cannot_be_routed_are_named():
    blocks = {"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KUpBlock2D",) * 2}
    with pytest.raises(TypeError, match="A U-Net with a `ResnetBlockCondNorm2D` cannot be routed"):
        UNET.routed(**blocks, block_out_channels=(32, 64), norm_num_groups=32)


def test_a_window_without_channels_is_refused_before_a_layer_is_built(monkeypatch):
    monkeypatch.setattr(UNET.routed_class.plain_class, "__init__", None)
    with pytest.raises(ValueError, match=r"`routing_beta`=0.1 leaves none of 8 channels active"):
        UNET.routed(routing_beta=0.1)


@pytest.mark.parametrize(
    ("pipeline_class", "scheduler"), [(DDPMPipeline, DDPMScheduler()), (DDIMPipeline, DDIMScheduler())]
)
def test_it_works_in_diffusers_pipelines_also_after_saving(tmp_path, pipeline_class, scheduler):
    def sample(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipeline(generator=generator, num_inference_steps=3, output_type="np").images
        return torch.from_numpy(images)

    pipeline = pipeline_class(UNET.routed(), scheduler)
    images = sample(pipeline)
    assert not torch.equal(images, sample(pipeline_class(UNET.plain(), scheduler)))
    pipeline.save_pretrained(tmp_path)
    loaded = pipeline_class.from_pretrained(tmp_path)
    assert type(loaded.unet) is DTRUNet2DModel
    torch.testing.assert_close(sample(loaded), images, rtol=1e-3, atol=1e-4)
