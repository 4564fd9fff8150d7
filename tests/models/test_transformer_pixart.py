import json

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from tiny_models import PIXART, in_double, output, recorded_calls, window
from tiny_text_encoders import t5_encoder, t5_tokenizer, tiny_vae

from diffusers_dtr import DTRPixArtTransformer2DModel


@pytest.mark.parametrize(
    "timestep",
    [torch.tensor([0, 500, 978, 999]), torch.tensor([-3.5, 700.25, 978.05, 1500.0], dtype=torch.float64)],
)
@torch.no_grad()
def test_every_block_computes_the_formula(timestep):
    routed = PIXART.routed(routing_beta=0.6, routing_alpha=2.0).double()
    plain = PIXART.plain().double()
    calls = recorded_calls(routed, r"transformer_blocks\.\d+", in_double(PIXART.inputs(timestep)))
    mask = window(timestep, 16, alpha=2.0, beta=0.6)[:, None]
    assert len(calls) == 3
    for name, ((x,), kwargs, found) in calls.items():
        expected = plain.get_submodule(name)(mask * x, **kwargs) + (1 - mask) * x
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_weights_that_were_saved_by_older_diffusers_load_and_convert(tmp_path):
    plain = PIXART.plain()
    expected = output(plain, PIXART.inputs())
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # As in the repositories of PixArt-α.
    config |= {"_class_name": "Transformer2DModel", "double_self_attention": False, "num_vector_embeds": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = DTRPixArtTransformer2DModel.from_pretrained(tmp_path, routing_beta=1.0)
    torch.testing.assert_close(output(loaded, PIXART.inputs()), expected, rtol=1e-4, atol=1e-4)
    source = PixArtTransformer2DModel.from_pretrained(tmp_path)
    converted = DTRPixArtTransformer2DModel.from_transformer(source, routing_beta=1.0)
    assert torch.equal(output(converted, PIXART.inputs()), output(source, PIXART.inputs()))


def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        "a cat",
        num_inference_steps=3,
        height=8,
        width=8,
        guidance_scale=3.0,
        use_resolution_binning=False,
        clean_caption=False,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    return result.images


@pytest.mark.parametrize("pipeline_class", [PixArtAlphaPipeline, PixArtSigmaPipeline])
def test_it_works_in_diffusers_pipelines_also_after_saving(tmp_path, pipeline_class):
    def pipeline(transformer):
        scheduler = DPMSolverMultistepScheduler()
        return pipeline_class(
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder(),
            vae=tiny_vae(),
            transformer=transformer,
            scheduler=scheduler,
        )

    latents = sample(pipeline(PIXART.routed()))
    assert not torch.equal(latents, sample(pipeline(PIXART.plain())))
    pipeline(PIXART.routed()).save_pretrained(tmp_path)
    loaded = pipeline_class.from_pretrained(tmp_path)
    assert type(loaded.transformer) is DTRPixArtTransformer2DModel
    torch.testing.assert_close(sample(loaded), latents, rtol=1e-3, atol=1e-3)
