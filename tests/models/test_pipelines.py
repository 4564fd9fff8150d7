"""Routed denoisers in diffusers' pipelines, with what pipelines and denoisers take beside them."""

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    FirstBlockCacheConfig,
    StableDiffusionControlNetPipeline,
)
from peft import LoraConfig
from test_unets import CONDITION_CONFIGS
from text_to_image_sampling import images
from tiny_dit import with_random_weights
from tiny_models import DIT, FLUX, PIXART, SD3, UNET, UNET_CONDITION, output
from tiny_pipelines import PIPELINES
from tiny_text_encoders import pixart_alpha, stable_diffusion, stable_diffusion_3, stable_diffusion_xl, tiny_vae

from diffusers_dtr import DTRUNet2DConditionModel, route


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Equal to the bit."""


def dit(transformer):
    return DiTPipeline(transformer, tiny_vae(), DDIMScheduler())


def ddpm(unet):
    return DDPMPipeline(unet, DDPMScheduler())


# By family: its pipeline, and config values of the denoiser.
EVERYWHERE = [
    (UNET, ddpm, {}),
    (UNET_CONDITION, stable_diffusion, {}),
    (UNET_CONDITION, stable_diffusion_xl, CONDITION_CONFIGS["Stable Diffusion XL"]),
    (PIXART, pixart_alpha, {}),
    (SD3, stable_diffusion_3, {}),
    (DIT, dit, {"num_embeds_ada_norm": 1000}),
]


@pytest.mark.parametrize(
    ("family", "pipeline", "config"), EVERYWHERE, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_pipeline_samples_as_it_does_with_the_plain_model_and_differently_where_it_is_routed(
    family, pipeline, config, tmp_path
):
    plain = family.plain(**config)
    expected, routed = images(pipeline(plain)), family.conversion(plain, routing_beta=0.5)
    assert torch.equal(images(pipeline(family.conversion(plain, routing_beta=1.0))), expected)
    found = images(pipeline(routed))
    assert not torch.equal(found, expected)
    pipeline(routed).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(getattr(loaded, "unet", None) or loaded.transformer) is family.routed_class
    torch.testing.assert_close(images(loaded), found, rtol=1e-3, atol=1e-3)


def test_pipelines_load_in_a_process_that_knows_none_of_their_classes(fresh_process, tmp_path):
    names = ("flux", "qwen_image", "wan", "z_image")
    for name in names:
        pipeline = PIPELINES[name].pipeline()
        # Assigned, because a pipeline records the class of a component then.
        pipeline.transformer = route(pipeline.transformer, routing_beta=0.5)
        pipeline.save_pretrained(tmp_path / name)
    found = fresh_process(
        f"""
        import json
        import diffusers_dtr
        from diffusers import DiffusionPipeline
        folders = {[str(tmp_path / name) for name in names]}
        models = [DiffusionPipeline.from_pretrained(folder).transformer for folder in folders]
        print(json.dumps([[type(model).__name__, model.routing.beta] for model in models]))
        """
    )
    assert found == [[f"DTR{PIPELINES[name].denoiser_class}", 0.5] for name in names]


# Residuals of a ControlNet, and layers that are skipped.
STEERED = [
    (FLUX, {f"controlnet_{kind}block_samples": [torch.ones(4, 6, 16)] for kind in ("", "single_")}),
    (SD3, {"skip_layers": [1], "block_controlnet_hidden_states": [torch.ones(4, 16, 16)]}),
]


@pytest.mark.parametrize(("family", "steering"), STEERED, ids=["FLUX", "SD3"])
def test_residuals_of_a_controlnet_are_added_as_in_the_base_class(family, steering):
    plain, inputs = family.plain(), family.inputs()
    routed = family.conversion(plain, routing_beta=1.0)
    assert torch.equal(output(routed, {**inputs, **steering}), output(plain, {**inputs, **steering}))
    routed.set_routing_beta(0.8)
    assert not torch.equal(output(routed, {**inputs, **steering}), output(routed, inputs))


def test_a_controlnet_steers_a_unet_in_its_pipeline_as_it_does_the_base_class():
    plain = UNET_CONDITION.plain()
    controlnet = with_random_weights(ControlNetModel.from_unet(plain, conditioning_embedding_out_channels=(4,)))

    def steered(unet, scale):
        components = {**stable_diffusion(unet).components, "controlnet": controlnet}
        pipeline = StableDiffusionControlNetPipeline(**components, requires_safety_checker=False)
        return images(pipeline, image=torch.ones(1, 3, 8, 8), controlnet_conditioning_scale=scale)

    routed = DTRUNet2DConditionModel.from_unet(plain)
    assert not torch.equal(steered(routed, scale=1.0), steered(routed, scale=0.0))
    assert not torch.equal(steered(routed, scale=1.0), steered(plain, scale=1.0))
    routed.set_routing_beta(1.0)
    assert torch.equal(steered(routed, scale=1.0), steered(plain, scale=1.0))


def test_caching_of_blocks_skips_them_as_in_the_base_class():
    model, calls = FLUX.routed(), []
    model.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    model.single_transformer_blocks[-1].norm.register_forward_hook(lambda *_: calls.append(1))
    with model.cache_context("cond"):
        first, second = (output(model, FLUX.inputs()) for _ in range(2))
    assert torch.equal(first, output(FLUX.routed(), FLUX.inputs()))
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


def test_lora_scales_per_block_are_those_of_the_base_class():
    scales = {"down": 0.5, "mid": 2.0, "up": {"block_1": [0.25, 3.0]}}
    outputs = []
    plain = UNET_CONDITION.plain()
    for model in (plain, DTRUNet2DConditionModel.from_unet(plain, routing_beta=1.0)):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
        model.set_adapters("style", scales)
        outputs.append(output(model, UNET_CONDITION.inputs()))
    assert torch.equal(*outputs)


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
        found[name, "without"] = images(adapted)
        adapted.load_ip_adapter(ip_adapter_weights(unet), None, None, image_encoder_folder=None)
        found[name, "with"] = images(adapted, ip_adapter_image_embeds=[torch.ones(2, 1, 6)])
    assert torch.equal(found["share of one", "with"], found["base", "with"])
    assert not torch.equal(found["routed", "with"], found["routed", "without"])
    assert not torch.equal(found["routed", "with"], found["base", "with"])
