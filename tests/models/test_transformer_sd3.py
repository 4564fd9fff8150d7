import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tiny_models import SD3, in_double, output, recorded_calls, window
from tiny_text_encoders import clip_text_model_with_projection, clip_tokenizer, t5_encoder, t5_tokenizer, tiny_vae

from diffusers_dtr import DTRSD3Transformer2DModel


@torch.no_grad()
def assert_image_streams_are_routed(family, timestep):
    """Compare every block in float64 with the formula on its image stream, its text stream seeing the masked image."""
    routed = family.routed(routing_beta=0.6, routing_alpha=2.0).double()
    plain = family.plain().double()
    calls = recorded_calls(routed, r"(single_)?transformer_blocks\.\d+", in_double(family.inputs(timestep)))
    mask = window(timestep, 16, alpha=2.0, beta=0.6)[:, None]
    for name, (args, kwargs, (text, image)) in calls.items():
        assert not args
        x = kwargs.pop("hidden_states")
        expected_text, expected_image = plain.get_submodule(name)(hidden_states=mask * x, **kwargs)
        torch.testing.assert_close(image, expected_image + (1 - mask) * x, rtol=1e-10, atol=1e-10)
        if expected_text is None:
            assert text is None
        else:
            torch.testing.assert_close(text, expected_text, rtol=1e-10, atol=1e-10)
    return calls


@pytest.mark.parametrize(
    "timestep", [torch.tensor([0, 500, 978, 999]), torch.tensor([8.9, 700.25, 978.05, 1000.0], dtype=torch.float64)]
)
def test_every_block_computes_the_formula(timestep):
    assert len(assert_image_streams_are_routed(SD3, timestep)) == 3


def test_the_highest_timestep_is_the_end_of_the_range():
    model, inputs = SD3.routed(), SD3.inputs(torch.full((2,), 1000.0))
    highest = recorded_calls(model, r"transformer_blocks\.0", inputs)["transformer_blocks.0"]
    model = SD3.routed(routing_timestep_range=(0, 1000))
    exact = recorded_calls(model, r"transformer_blocks\.0", inputs)["transformer_blocks.0"]
    assert torch.equal(highest[2][1], exact[2][1])


def test_residuals_of_a_controlnet_and_skipped_layers_are_as_in_the_base_class():
    plain = SD3.plain()
    routed = DTRSD3Transformer2DModel.from_transformer(plain, routing_beta=1.0)
    inputs = SD3.inputs()
    steered = {**inputs, "skip_layers": [1], "block_controlnet_hidden_states": [torch.ones(4, 16, 16)]}
    assert torch.equal(output(routed, steered), output(plain, steered))
    routed.set_routing_beta(0.8)
    assert not torch.equal(output(routed, steered), output(routed, inputs))


def pipeline(transformer):
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=clip_text_model_with_projection(6),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_model_with_projection(6),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
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
    routed, timesteps = SD3.routed(), []
    routed.register_forward_pre_hook(
        lambda _, args, kwargs: timesteps.append(kwargs["timestep"][0].item()), with_kwargs=True
    )
    latents = sample(pipeline(routed))
    assert timesteps[0] == 1000.0
    assert not torch.equal(latents, sample(pipeline(SD3.plain())))
    pipeline(routed).save_pretrained(tmp_path)
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is DTRSD3Transformer2DModel
    torch.testing.assert_close(sample(loaded), latents, rtol=1e-3, atol=1e-3)
