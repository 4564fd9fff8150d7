import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from peft import LoraConfig
from test_unet_2d import assert_units_are_routed
from tiny_dit import with_random_weights
from tiny_models import TIMESTEPS, UNET_CONDITION, output
from tiny_text_encoders import stable_diffusion, stable_diffusion_xl

from diffusers_dtr import DTRUNet2DConditionModel


SIMPLE = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "resnet_out_scale_factor": 1.41,
    "class_embed_type": "timestep",
}
CONFIGS = {
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
    "attention without transformers": {key: value for key, value in SIMPLE.items() if key != "class_embed_type"},
}


def arguments(config, timestep=TIMESTEPS):
    inputs = UNET_CONDITION.inputs(timestep)
    if "addition_embed_type" in config:
        inputs["added_cond_kwargs"] = {"text_embeds": torch.ones(4, 6), "time_ids": torch.arange(24.0).reshape(4, 6)}
    return inputs


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_unit_computes_the_formula(config):
    calls, widths = assert_units_are_routed(UNET_CONDITION, config, arguments(config))
    assert {8, 16, 24, 32} <= widths
    assert sum(".resnets." in name for name in calls) == 8
    assert sum(".attentions." in name for name in calls) == 4


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_share_of_one_is_the_base_model_to_the_bit(config):
    plain = UNET_CONDITION.plain(**config)
    expected = output(plain, arguments(config))
    routed = DTRUNet2DConditionModel.from_unet(plain, routing_beta=1.0)
    assert torch.equal(output(routed, arguments(config)), expected)
    assert not torch.equal(output(DTRUNet2DConditionModel.from_unet(plain), arguments(config)), expected)


def test_transformers_that_diffusers_itself_cannot_call_are_named():
    with pytest.raises(TypeError, match="A U-Net with a `DualTransformer2DModel` cannot be routed"):
        UNET_CONDITION.routed(dual_cross_attention=True)


def test_the_residuals_of_a_controlnet_are_added_as_in_the_base_class():
    plain = UNET_CONDITION.plain()
    routed = DTRUNet2DConditionModel.from_unet(plain, routing_beta=1.0)
    controlnet = ControlNetModel.from_unet(routed, conditioning_embedding_out_channels=(4, 4))
    torch.nn.init.ones_(controlnet.controlnet_mid_block.weight)
    inputs = UNET_CONDITION.inputs()
    with torch.no_grad():
        down, mid = controlnet(**inputs, controlnet_cond=torch.ones(4, 3, 16, 16), return_dict=False)
    controlled = {**inputs, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert torch.equal(output(routed, controlled), output(plain, controlled))
    routed.set_routing_beta(0.8)
    assert not torch.equal(output(routed, controlled), output(routed, inputs))


def test_lora_scales_per_block_are_those_of_the_base_class():
    scales = {"down": 0.5, "mid": 2.0, "up": {"block_1": [0.25, 3.0]}}
    outputs = []
    plain = UNET_CONDITION.plain()
    for model in (plain, DTRUNet2DConditionModel.from_unet(plain, routing_beta=1.0)):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data.normal_(generator=generator)
        model.set_adapters("style", scales)
        outputs.append(output(model, UNET_CONDITION.inputs()))
    assert torch.equal(*outputs)


def sample(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipeline(
        "a cat", num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="latent", **arguments
    )
    return result.images


def ip_adapter_weights(unet, embedding_dim=6):
    """For four image tokens, under the names of published IP-Adapters, which count self-attention layers too."""
    generator = torch.Generator().manual_seed(0)
    widths = [m.to_k.weight.shape for name, m in unet.named_modules() if name.endswith("attn2")]
    layers = {
        f"{2 * i + 1}.{kind}.weight": torch.randn(width, generator=generator)
        for i, width in enumerate(widths)
        for kind in ("to_k_ip", "to_v_ip")
    }
    image_projection = {
        "proj.weight": torch.randn(4 * 12, embedding_dim, generator=generator),
        "proj.bias": torch.zeros(4 * 12),
        "norm.weight": torch.ones(12),
        "norm.bias": torch.zeros(12),
    }
    return {"image_proj": image_projection, "ip_adapter": layers}


def test_an_ip_adapter_does_what_it_does_in_the_base_class():
    plain = UNET_CONDITION.plain()
    found = {}
    for name, unet in (
        ("base", plain),
        ("share of one", DTRUNet2DConditionModel.from_unet(plain, routing_beta=1.0)),
        ("routed", DTRUNet2DConditionModel.from_unet(plain)),
    ):
        adapted = stable_diffusion(unet)
        found[name, "without"] = sample(adapted)
        adapted.load_ip_adapter(ip_adapter_weights(unet), None, None, image_encoder_folder=None)
        found[name, "with"] = sample(adapted, ip_adapter_image_embeds=[torch.ones(2, 1, 6)])
    assert torch.equal(found["share of one", "with"], found["base", "with"])
    assert not torch.equal(found["routed", "with"], found["routed", "without"])
    assert not torch.equal(found["routed", "with"], found["base", "with"])


@pytest.mark.parametrize(
    ("pipeline", "name"), [(stable_diffusion, "Stable Diffusion 1"), (stable_diffusion_xl, "Stable Diffusion XL")]
)
def test_it_works_in_the_pipelines_of_stable_diffusion_also_after_saving(pipeline, name, tmp_path):
    unet, plain = UNET_CONDITION.routed(**CONFIGS[name]), UNET_CONDITION.plain(**CONFIGS[name])
    latents, expected = sample(pipeline(unet)), sample(pipeline(plain))
    assert not torch.equal(latents, expected)
    assert torch.equal(sample(pipeline(DTRUNet2DConditionModel.from_unet(plain, routing_beta=1.0))), expected)
    pipeline(unet).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipeline(unet))
    assert type(loaded.unet) is DTRUNet2DConditionModel
    torch.testing.assert_close(sample(loaded), latents, rtol=1e-3, atol=1e-3)


def test_a_controlnet_steers_it_in_its_pipeline_as_it_does_the_base_class():
    plain = UNET_CONDITION.plain()
    controlnet = with_random_weights(ControlNetModel.from_unet(plain, conditioning_embedding_out_channels=(4,)))

    def steered(unet, scale):
        components = {**stable_diffusion(unet).components, "controlnet": controlnet}
        pipeline = StableDiffusionControlNetPipeline(**components, requires_safety_checker=False)
        return sample(pipeline, image=torch.ones(1, 3, 8, 8), controlnet_conditioning_scale=scale)

    routed = DTRUNet2DConditionModel.from_unet(plain)
    assert not torch.equal(steered(routed, scale=1.0), steered(routed, scale=0.0))
    assert not torch.equal(steered(routed, scale=1.0), steered(plain, scale=1.0))
    routed.set_routing_beta(1.0)
    assert torch.equal(steered(routed, scale=1.0), steered(plain, scale=1.0))
