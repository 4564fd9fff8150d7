import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, FluxPipeline
from test_transformer_sd3 import assert_image_streams_are_routed
from tiny_models import FLUX, output
from tiny_text_encoders import clip_text_model, clip_tokenizer, t5_encoder, t5_tokenizer, tiny_vae

from diffusers_dtr import DTRFluxTransformer2DModel


@pytest.mark.parametrize(
    "timestep", [torch.tensor([0, 500, 978, 999]), torch.tensor([8.9, 700.25, 978.05, 1000.0], dtype=torch.float64)]
)
def test_every_block_computes_the_formula(timestep):
    assert len(assert_image_streams_are_routed(FLUX, timestep)) == 4


def test_residuals_of_a_controlnet_are_added_as_in_the_base_class():
    plain = FLUX.plain()
    routed = DTRFluxTransformer2DModel.from_transformer(plain, routing_beta=1.0)
    inputs = FLUX.inputs()
    residual = [torch.ones(4, 6, 16)]
    controlled = {**inputs, "controlnet_block_samples": residual, "controlnet_single_block_samples": residual}
    assert torch.equal(output(routed, controlled), output(plain, controlled))
    routed.set_routing_beta(0.8)
    assert not torch.equal(output(routed, controlled), output(routed, inputs))


def test_caching_of_blocks_skips_them_as_in_the_base_class():
    model, calls = FLUX.routed(), []
    model.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    model.single_transformer_blocks[-1].norm.register_forward_hook(lambda *_: calls.append(1))
    with model.cache_context("cond"):
        first, second = (output(model, FLUX.inputs()) for _ in range(2))
    assert torch.equal(first, output(FLUX.routed(), FLUX.inputs()))
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


def pipeline(transformer):
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(latent_channels=1),
        text_encoder=clip_text_model(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        "a cat",
        num_inference_steps=3,
        height=8,
        width=8,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    return result.images


def test_it_works_in_the_pipeline_also_after_saving(tmp_path):
    routed, timesteps = FLUX.routed(), []
    routed.register_forward_pre_hook(
        lambda _, args, kwargs: timesteps.append(kwargs["timestep"][0].item()), with_kwargs=True
    )
    latents = sample(pipeline(routed))
    assert timesteps[0] == 1.0
    assert not torch.equal(latents, sample(pipeline(FLUX.plain())))
    pipeline(routed).save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is DTRFluxTransformer2DModel
    torch.testing.assert_close(sample(loaded), latents, rtol=1e-3, atol=1e-3)
