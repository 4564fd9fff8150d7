import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderRAE, Flux2Pipeline, LTXPipeline, VQModel
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


def tiny_vq() -> VQModel:
    torch.manual_seed(0)
    return VQModel(block_out_channels=(4,), norm_num_groups=2, num_vq_embeddings=8, scaling_factor=0.5).eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.manual_seed(1)) * 2 - 1


def test_latents_are_the_normalised_sample_of_the_posterior():
    vae = tiny_vae(scaling_factor=0.3, shift_factor=0.7)
    latents = encode_images(vae, images(), torch.Generator().manual_seed(5))
    sample = vae.encode(images()).latent_dist.sample(torch.Generator().manual_seed(5))
    torch.testing.assert_close(latents, (sample - 0.7) * 0.3)


def test_means_and_deviations_are_per_channel():
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    vae = tiny_vae(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    latents = encode_images(vae, images(), torch.Generator().manual_seed(5))
    sample = vae.encode(images()).latent_dist.sample(torch.Generator().manual_seed(5))
    expected = torch.stack([(sample[:, c] - mean[c]) * 0.5 / std[c] for c in range(4)], dim=1)
    torch.testing.assert_close(latents, expected)


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.18215},
        {"scaling_factor": 1.5, "shift_factor": -0.4},
        {"scaling_factor": 0.5, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
    ],
)
def test_decoding_undoes_the_normalisation(config):
    vae = tiny_vae(**config)
    raw = torch.randn(2, 4, 4, 4, generator=torch.manual_seed(2))
    with torch.no_grad():
        decoded = decode_latents(vae, LatentNormalization.from_vae(vae).normalize(raw))
        torch.testing.assert_close(decoded, vae.decode(raw).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_vae", [tiny_dc, tiny_taesd, tiny_vq])
def test_deterministic_autoencoders_have_no_posterior_to_sample(make_vae):
    vae = make_vae()
    mean, std = encode_moments(vae, images())
    assert std is None
    latents = encode_images(vae, images(), torch.Generator().manual_seed(5))
    torch.testing.assert_close(latents, mean * 0.5)
    assert latents.shape[-1] * vae_scale_factor(vae) == images().shape[-1]
    assert decode_latents(vae, latents).shape == images().shape


def test_one_generator_per_sample_makes_a_sample_independent_of_its_batch():
    vae = tiny_vae()
    together = encode_images(vae, images(), [torch.Generator().manual_seed(seed) for seed in (7, 8)])
    alone = encode_images(vae, images()[1:], [torch.Generator().manual_seed(8)])
    torch.testing.assert_close(together[1:], alone)


def test_latents_are_float32_and_images_in_the_precision_of_the_vae():
    vae = tiny_vae().to(torch.bfloat16)
    latents = encode_images(vae, images(), torch.Generator().manual_seed(5))
    assert latents.dtype == torch.float32
    assert decode_latents(vae, latents).dtype == torch.bfloat16


def overflowing_vae() -> AutoencoderKL:
    """Whose activations are beyond float16's 65504, as those of SDXL's."""
    vae = tiny_vae(scaling_factor=0.5, force_upcast=True)
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        conv.weight.data *= 1e5
    return vae


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vae_that_overflows_in_float16_computes_in_float32(dtype):
    vae, half = overflowing_vae(), overflowing_vae().to(dtype)
    before = half.state_dict()
    (mean, _), (expected, _) = encode_moments(half, images()), encode_moments(vae, images())
    assert (mean - expected).norm() / expected.norm() < 0.02
    decoded, image = decode_latents(half, mean), decode_latents(vae, mean)
    assert decoded.dtype == half.dtype == dtype
    assert (decoded.float() - image).norm() / image.norm() < 0.02
    assert all(map(torch.equal, half.state_dict().values(), before.values()))


def test_half_precision_latents_are_denormalised_in_float32():
    vae = tiny_vae(scaling_factor=0.3, shift_factor=5.0)
    latents = encode_images(vae, images(), torch.Generator().manual_seed(5)).bfloat16()
    assert torch.equal(decode_latents(vae, latents), decode_latents(vae, latents.float()))


def test_an_autoencoder_that_normalises_itself_is_refused():
    vae = AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
        encoder_input_size=28,
    )
    with pytest.raises(ValueError, match="AutoencoderRAE"):
        encode_images(vae, torch.rand(1, 3, 28, 28))


def test_encoding_keeps_no_graph():
    assert not encode_images(tiny_vae(), images(), torch.Generator().manual_seed(5)).requires_grad


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scaling_factor": None}, "`vae` must have `scaling_factor`"),
        ({"latents_mean": [0.0] * 4}, "go together"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1}, "both"),
    ],
)
def test_an_unclear_normalisation_is_an_error(config, message):
    vae = tiny_vae()
    vae.register_to_config(**config)
    with pytest.raises(ValueError, match=message):
        encode_images(vae, images())


def test_scale_factor_is_the_size_of_an_image_over_that_of_its_latents():
    vae = tiny_vae()
    assert vae_scale_factor(vae) == 8 // encode_moments(vae, images())[0].shape[-1] == 2


def test_a_vae_whose_scale_factor_is_unknown_is_an_error():
    vae = tiny_vae()
    vae.register_to_config(block_out_channels=None)
    with pytest.raises(ValueError, match="spatial_compression_ratio"):
        vae_scale_factor(vae)


def videos(frames: int = 5) -> torch.Tensor:
    return torch.rand(2, 3, frames, 8, 8, generator=torch.manual_seed(1)) * 2 - 1


def per_channel(sample: torch.Tensor) -> torch.Tensor:
    """Normalised one channel after the other."""
    return torch.stack([(sample[:, c] - MEAN[c]) / STD[c] for c in range(len(MEAN))], dim=1)


@pytest.mark.parametrize("make_vae", [tiny_wan_vae, tiny_ltx_vae])
def test_latents_of_videos_are_normalised_per_channel(make_vae):
    vae = make_vae()
    latents = encode_images(vae, videos(), torch.Generator().manual_seed(5))
    sample = vae.encode(videos()).latent_dist.sample(torch.Generator().manual_seed(5))
    assert latents.shape == (2, latent_channels(vae), 3, 8 // vae_scale_factor(vae), 8 // vae_scale_factor(vae))
    assert frames_per_latent(vae) == 2
    torch.testing.assert_close(latents, per_channel(sample))
    assert decode_latents(vae, latents).shape == videos().shape


def test_latents_of_ltx_are_those_of_its_pipeline():
    vae = tiny_ltx_vae(scaling_factor=0.7)
    sample = vae.encode(videos()).latent_dist.mean
    expected = LTXPipeline._normalize_latents(sample, vae.latents_mean, vae.latents_std, 0.7)
    torch.testing.assert_close(LatentNormalization.from_vae(vae).normalize(sample), expected)


@pytest.mark.parametrize("make_vae", [tiny_qwen_image_vae, tiny_wan_vae])
def test_an_image_is_one_frame_to_an_autoencoder_of_videos(make_vae):
    vae = make_vae()
    latents = encode_images(vae, images(), torch.Generator().manual_seed(5))
    sample = vae.encode(images().unsqueeze(2)).latent_dist.sample(torch.Generator().manual_seed(5))
    torch.testing.assert_close(latents, per_channel(sample).squeeze(2))
    assert latents.shape == (2, 4, 4, 4)
    torch.testing.assert_close(
        decode_latents(vae, latents), vae.decode(sample).sample.squeeze(2), rtol=1e-4, atol=1e-4
    )


def test_latents_of_flux_2_are_normalised_in_the_patches_of_its_pipeline():
    vae = tiny_flux_2_vae()
    latents = encode_images(vae, images(), torch.Generator().manual_seed(5))
    mean, std = encode_moments(vae, images())
    expected = Flux2Pipeline._patchify_latents(vae.encode(images()).latent_dist.mean)
    torch.testing.assert_close(mean, expected)
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(-1, 1, 1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(latents, (mean + std * noise - vae.bn.running_mean.view(-1, 1, 1)) / deviation)
    assert latents.shape[1] == latent_channels(vae) == 16
    assert latents.shape[-1] * vae_scale_factor(vae) == 8
    decoded = vae.decode(vae.encode(images()).latent_dist.mean).sample
    restored = decode_latents(vae, LatentNormalization.from_vae(vae).normalize(mean))
    torch.testing.assert_close(restored, decoded, rtol=1e-4, atol=1e-4)


def test_decoder_that_denoises_is_told_that_nothing_is_left_to_do():
    vae = tiny_ltx_vae(timestep_conditioning=True)
    latents = torch.randn(2, 4, 3, 2, 2, generator=torch.manual_seed(2))
    raw = LatentNormalization.from_vae(vae).denormalize(latents)
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(raw, torch.zeros(2)).sample)


@pytest.mark.parametrize("make_vae", [tiny_vae, tiny_dc])
def test_autoencoders_of_images_take_no_videos(make_vae):
    with pytest.raises(ValueError, match=r"`pixel_values` must have 4 dimensions for Autoencoder\w+, got \(2, 3, 5"):
        encode_images(make_vae(), videos())
    with pytest.raises(ValueError, match=r"`latents` must have 4 dimensions"):
        decode_latents(make_vae(), torch.zeros(2, 4, 1, 4, 4))
