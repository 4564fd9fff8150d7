import pytest
import torch
from diffusers import AutoencoderRAE, Flux2Pipeline, LTXPipeline, VQModel
from tiny_autoencoders import (
    MEAN,
    STD,
    tiny_dc,
    tiny_flux_2_vae,
    tiny_ltx_vae,
    tiny_qwen_image_vae,
    tiny_taesd,
    tiny_vae,
    tiny_wan_vae,
)

from diffusers_dtr.latents import (
    LatentNormalization,
    decode_latents,
    encode_images,
    encode_moments,
    frames_per_latent,
    latent_channels,
    vae_scale_factor,
)


IMAGES, VIDEOS = (
    torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1 for shape in ((8, 8), (5, 8, 8))
)


def tiny_vq():
    torch.manual_seed(0)
    return VQModel(block_out_channels=(4,), norm_num_groups=2, num_vq_embeddings=8, scaling_factor=0.5).eval()


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def posterior_sample(vae, pixel_values):
    with torch.no_grad():
        return vae.encode(pixel_values).latent_dist.sample(seeded())


def assert_decodes(vae, latents, expected):
    torch.testing.assert_close(decode_latents(vae, latents), expected, rtol=1e-4, atol=1e-4)


# What the config says, and what shift and scale that is of each of four channels.
@pytest.mark.parametrize(
    ("config", "shift", "scale"),
    [
        ({"scaling_factor": 0.18215}, [0.0] * 4, [0.18215] * 4),
        ({"scaling_factor": 0.3, "shift_factor": 0.7}, [0.7] * 4, [0.3] * 4),
        ({"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD}, MEAN, [0.5 / std for std in STD]),
    ],
)
@torch.no_grad()
def test_latents_are_the_normalised_sample_of_the_posterior_and_decoding_undoes_that(config, shift, scale):
    vae = tiny_vae(**config)
    sample, latents = posterior_sample(vae, IMAGES), encode_images(vae, IMAGES, seeded())
    expected = torch.stack([(sample[:, c] - shift[c]) * scale[c] for c in range(4)], dim=1)
    torch.testing.assert_close(latents, expected)
    assert_decodes(vae, latents, vae.decode(sample).sample)
    assert latents.shape[1:] == (latent_channels(vae), 8 // vae_scale_factor(vae), 4) == (4, 4, 4)


@pytest.mark.parametrize("make_vae", [tiny_dc, tiny_taesd, tiny_vq])
def test_deterministic_autoencoders_have_no_posterior_to_sample(make_vae):
    vae = make_vae()
    mean, std = encode_moments(vae, IMAGES)
    assert std is None
    latents = encode_images(vae, IMAGES, seeded())
    torch.testing.assert_close(latents, mean * 0.5)
    assert latents.shape[-1] * vae_scale_factor(vae) == IMAGES.shape[-1]
    assert decode_latents(vae, latents).shape == IMAGES.shape


def test_one_generator_per_sample_makes_a_sample_independent_of_its_batch_and_keeps_no_graph():
    vae = tiny_vae()
    together = encode_images(vae, IMAGES, [seeded(7), seeded(8)])
    torch.testing.assert_close(together[1:], encode_images(vae, IMAGES[1:], [seeded(8)]))
    assert not together.requires_grad


def test_latents_are_float32_and_images_in_the_precision_of_the_vae():
    vae = tiny_vae(scaling_factor=0.3, shift_factor=5.0).to(torch.bfloat16)
    latents = encode_images(vae, IMAGES, seeded())
    assert latents.dtype == torch.float32
    half = latents.bfloat16()  # is denormalised in float32
    assert torch.equal(decode_latents(vae, half), decode_latents(vae, half.float()))
    assert decode_latents(vae, half).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vae_that_overflows_in_float16_computes_in_float32(dtype):
    vae, half = (tiny_vae(scaling_factor=0.5, force_upcast=True) for _ in range(2))
    for one in (vae, half):
        for conv in (one.encoder.conv_in, one.decoder.conv_in):
            conv.weight.data *= 1e5  # activations are then beyond float16's 65504, as those of SDXL's
    before = half.to(dtype).state_dict()
    (mean, _), (expected, _) = encode_moments(half, IMAGES), encode_moments(vae, IMAGES)
    assert (mean - expected).norm() / expected.norm() < 0.02
    decoded, image = decode_latents(half, mean), decode_latents(vae, mean)
    assert decoded.dtype == half.dtype == dtype
    assert (decoded.float() - image).norm() / image.norm() < 0.02
    assert all(map(torch.equal, half.state_dict().values(), before.values()))


@pytest.mark.parametrize(
    ("config", "use", "message"),
    [
        ({"scaling_factor": None}, LatentNormalization.from_vae, "`vae` must have `scaling_factor`"),
        ({"latents_mean": MEAN}, LatentNormalization.from_vae, "go together"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1}, LatentNormalization.from_vae, "both"),
        ({"block_out_channels": None}, vae_scale_factor, "spatial_compression_ratio"),
        ({}, frames_per_latent, "`vae` must say how many frames a latent spans, got AutoencoderKL"),
    ],
)
def test_an_autoencoder_that_leaves_something_open_is_an_error(config, use, message):
    vae = tiny_vae()
    vae.register_to_config(**config)
    with pytest.raises(ValueError, match=message):
        use(vae)


def test_an_autoencoder_that_normalises_itself_is_refused():
    sizes = {"encoder_hidden_size": 64, "decoder_hidden_size": 8, "decoder_intermediate_size": 8}
    layers = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    with pytest.raises(ValueError, match="AutoencoderRAE"):
        encode_images(AutoencoderRAE(**sizes, **layers, encoder_input_size=28), torch.rand(1, 3, 28, 28))


def per_channel(sample):
    """Normalised one channel after the other."""
    return torch.stack([(sample[:, c] - MEAN[c]) / STD[c] for c in range(len(MEAN))], dim=1)


@pytest.mark.parametrize("make_vae", [tiny_wan_vae, tiny_ltx_vae])
def test_latents_of_videos_are_normalised_per_channel(make_vae):
    vae = make_vae()
    latents, side = encode_images(vae, VIDEOS, seeded()), 8 // vae_scale_factor(vae)
    assert latents.shape == (2, latent_channels(vae), 3, side, side)
    assert frames_per_latent(vae) == 2
    torch.testing.assert_close(latents, per_channel(posterior_sample(vae, VIDEOS)))
    assert decode_latents(vae, latents).shape == VIDEOS.shape


@pytest.mark.parametrize("make_vae", [tiny_qwen_image_vae, tiny_wan_vae])
@torch.no_grad()
def test_an_image_is_one_frame_to_an_autoencoder_of_videos(make_vae):
    vae = make_vae()
    latents, sample = encode_images(vae, IMAGES, seeded()), posterior_sample(vae, IMAGES.unsqueeze(2))
    torch.testing.assert_close(latents, per_channel(sample).squeeze(2))
    assert latents.shape == (2, 4, 4, 4)
    assert_decodes(vae, latents, vae.decode(sample).sample.squeeze(2))


@torch.no_grad()
def test_latents_of_ltx_are_those_of_its_pipeline_whose_decoder_may_denoise():
    vae = tiny_ltx_vae(scaling_factor=0.7, timestep_conditioning=True)
    sample = vae.encode(VIDEOS).latent_dist.mean
    expected = LTXPipeline._normalize_latents(sample, vae.latents_mean, vae.latents_std, 0.7)
    torch.testing.assert_close(LatentNormalization.from_vae(vae).normalize(sample), expected)
    # Nothing is left for it to do.
    assert_decodes(vae, expected, vae.decode(sample, torch.zeros(2)).sample)


@torch.no_grad()
def test_latents_of_flux_2_are_normalised_in_the_patches_of_its_pipeline():
    vae = tiny_flux_2_vae()
    latents, (mean, std), raw = encode_images(vae, IMAGES, seeded()), encode_moments(vae, IMAGES), vae.encode(IMAGES)
    torch.testing.assert_close(mean, Flux2Pipeline._patchify_latents(raw.latent_dist.mean))
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(-1, 1, 1)
    noise = torch.randn(mean.shape, generator=seeded())
    torch.testing.assert_close(latents, (mean + std * noise - vae.bn.running_mean.view(-1, 1, 1)) / deviation)
    assert latents.shape[1:] == (latent_channels(vae), 8 // vae_scale_factor(vae), 2) == (16, 2, 2)
    normalised = LatentNormalization.from_vae(vae).normalize(mean)
    assert_decodes(vae, normalised, vae.decode(raw.latent_dist.mean).sample)


@pytest.mark.parametrize("make_vae", [tiny_vae, tiny_dc])
def test_autoencoders_of_images_take_no_videos(make_vae):
    with pytest.raises(ValueError, match=r"`pixel_values` must have 4 dimensions for Autoencoder\w+, got \(2, 3, 5"):
        encode_images(make_vae(), VIDEOS)
    with pytest.raises(ValueError, match=r"`latents` must have 4 dimensions"):
        decode_latents(make_vae(), torch.zeros(2, 4, 1, 4, 4))
