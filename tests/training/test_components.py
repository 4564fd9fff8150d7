"""What of a pretrained pipeline a run starts from: real ones, saved by diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DDPMScheduler
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from pretrained_pipelines import saved
from run_config import run_config

from diffusers_dtr import DTRLumina2Transformer2DModel as DTRLumina2
from diffusers_dtr import (
    DTRPixArtTransformer2DModel,
    DTRSD3Transformer2DModel,
    DTRTransformer2DModel,
    DTRUNet2DConditionModel,
    DTRUNet2DModel,
)
from diffusers_dtr.training import load_noise_scheduler, load_vae, resolve_resolution
from diffusers_dtr.training.components import denoiser_routing, sample_size
from diffusers_dtr.training.config import ModelConfig
from diffusers_dtr.training.pretrained import pretrained_component, pretrained_denoiser, pretrained_options


TWO_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def vae(**config) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, **config)


def test_autoencoder_is_the_given_one_or_that_of_the_pipeline_or_none(tmp_path):
    blocks = {f"{part}_block_out_channels": (4, 4) for part in ("encoder", "decoder")}
    tiny = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    tiny.save_pretrained(tmp_path / "vae")
    latent = saved(tmp_path / "latent", DDIMScheduler(), vae())
    of_pipeline = load_vae(ModelConfig(pretrained_model_name_or_path=latent))
    assert type(of_pipeline) is AutoencoderKL
    assert not of_pipeline.training
    assert not any(parameter.requires_grad for parameter in of_pipeline.parameters())
    given = load_vae(ModelConfig(pretrained_model_name_or_path=latent, vae_name_or_path=str(tmp_path / "vae")))
    assert type(given) is AutoencoderTiny
    assert all(torch.equal(tensor, tiny.state_dict()[name]) for name, tensor in given.state_dict().items())
    assert load_vae(ModelConfig()) is None
    pixels = saved(tmp_path / "pixels", DDIMScheduler())
    assert load_vae(ModelConfig(pretrained_model_name_or_path=pixels)) is None


@pytest.mark.parametrize("force_upcast", [True, False])
def test_an_autoencoder_that_insists_on_float32_is_loaded_in_it(force_upcast, tmp_path):
    original = vae(force_upcast=force_upcast)
    original.save_pretrained(tmp_path)
    loaded = load_vae(ModelConfig(vae_name_or_path=str(tmp_path)), torch.float16)
    dtypes = {parameter.dtype for parameter in loaded.parameters()}
    assert dtypes == {torch.float32 if force_upcast else torch.float16}
    if force_upcast:  # not rounded on the way
        assert all(map(torch.equal, loaded.state_dict().values(), original.state_dict().values()))


def test_variant_of_the_weights_is_loaded(tmp_path):
    folder = saved(tmp_path / "half", DDIMScheduler(), vae(), variant="fp16")
    assert load_vae(ModelConfig(pretrained_model_name_or_path=folder, variant="fp16")) is not None
    assert load_noise_scheduler(run_config(pretrained_model_name_or_path=folder, variant="fp16")) is not None
    with pytest.raises(OSError, match="no file named"):
        load_vae(ModelConfig(pretrained_model_name_or_path=folder))


def test_revision_decides_which_parts_there_are(hub, tmp_path):
    HfApi().create_repo("owner/base")
    old = HfApi().upload_folder(repo_id="owner/base", folder_path=saved(tmp_path / "old", DDIMScheduler(), vae())).oid
    HfApi().upload_folder(repo_id="owner/base", folder_path=saved(tmp_path / "new", DDPMScheduler()))
    of_old = ModelConfig(pretrained_model_name_or_path="owner/base", revision=old)
    assert pretrained_component(of_old, "scheduler") == "DDIMScheduler"
    assert load_vae(of_old) is not None
    assert load_vae(ModelConfig(pretrained_model_name_or_path="owner/base")) is None


def test_all_that_is_downloaded_is_kept_in_the_folder_asked_for(hub, tmp_path):
    saved(tmp_path / "base", DDIMScheduler(), vae())
    for name, folder in (("owner/base", tmp_path / "base"), ("owner/vae", tmp_path / "base" / "vae")):
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    source = {"pretrained_model_name_or_path": "owner/base", "cache_dir": str(tmp_path / "cache")}
    load_vae(ModelConfig(**source))
    load_noise_scheduler(run_config(**source))
    load_vae(ModelConfig(**source, vae_name_or_path="owner/vae"))
    kept = {path.name for path in (tmp_path / "cache").glob("models--*")}
    assert kept == {"models--owner--base", "models--owner--vae"}
    assert not list(Path(HF_HUB_CACHE).glob("models--*"))


def test_transformer_under_the_name_that_diffusers_gave_it_first(tmp_path):
    folder = saved(tmp_path / "dit", DDIMScheduler(), vae())
    index = Path(folder) / "model_index.json"
    index.write_text(index.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    config = ModelConfig(pretrained_model_name_or_path=folder)
    assert pretrained_denoiser(config, {"unet": DTRUNet2DModel, "transformer": DTRTransformer2DModel}) == "transformer"
    with pytest.raises(ValueError, match=r"with a `unet` of UNet2DModel, plain or routed, got .* {'unet': None}"):
        pretrained_denoiser(config, {"unet": DTRUNet2DModel})


def resolved(resolution, autoencoder, model_class, config):
    """The resolution, and the size of what is learned."""
    config = resolve_resolution(run_config(resolution=resolution), autoencoder, model_class, config)
    return config.data.resolution, sample_size(config, autoencoder)


def test_resolution_is_a_multiple_of_what_autoencoder_and_denoiser_work_on():
    two_levels = {"block_out_channels": (4, 4)}
    assert resolved(10, None, DTRUNet2DModel, two_levels) == (10, 10)
    assert resolved(7, None, DTRUNet2DConditionModel, {}) == (7, 7)  # which takes sizes that it cannot halve
    autoencoder = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, **TWO_BLOCKS)
    assert resolved(12, autoencoder, DTRUNet2DModel, two_levels) == (12, 6)
    with pytest.raises(ValueError, match=r"of 4, got 10: .* blocks of 2 latents, which span 2 pixels"):
        resolved(10, autoencoder, DTRUNet2DModel, two_levels)


@pytest.mark.parametrize(
    ("model_class", "config", "resolution", "message"),
    [
        (DTRUNet2DModel, {}, 28, "a multiple of 8"),  # four levels by default
        (DTRTransformer2DModel, {"patch_size": 4}, 10, "a multiple of 4"),
        (DTRPixArtTransformer2DModel, {}, 9, "a multiple of 2"),
        (DTRSD3Transformer2DModel, {"pos_embed_max_size": 4}, 10, "at most 8"),
    ],
)
def test_resolution_that_the_denoiser_cannot_have_is_refused(model_class, config, resolution, message):
    with pytest.raises(ValueError, match=f"`--resolution` must be {message}, got {resolution}"):
        resolved(resolution, None, model_class, config)


@pytest.mark.parametrize(("size", "resolution"), [(16, 16), ((24, 24), 24), (None, 32)])
def test_resolution_is_that_of_the_denoiser_unless_given(size, resolution):
    assert resolved(None, None, DTRUNet2DModel, {"sample_size": size}) == (resolution, resolution)
    autoencoder = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, **TWO_BLOCKS)
    if size is not None:
        assert resolved(None, autoencoder, DTRUNet2DModel, {"sample_size": size}) == (2 * resolution, resolution)


@pytest.mark.parametrize("size", [[8, 16], None])
def test_denoiser_of_latents_without_one_side_needs_a_resolution(size):
    with pytest.raises(ValueError, match=r"`--resolution` must be given: the denoiser's `sample_size` is"):
        resolved(None, vae(), DTRUNet2DModel, {"sample_size": size})


ROUTED_OVER_A_PART = {"routing_timestep_range": [200, 800]}


def routing(given, config=None, num_timesteps=1000, model_class=DTRUNet2DModel, **options):
    options |= {f"routing_{name}": value for name, value in given.items()}
    scheduler = DDPMScheduler(num_train_timesteps=num_timesteps)
    return denoiser_routing(run_config(**options), scheduler, model_class, config or {})


def test_routing_of_a_new_model_covers_the_schedule_unless_said_otherwise():
    assert routing({}, num_timesteps=50) == {"routing_timestep_range": (0, 49)}
    assert routing({}, ROUTED_OVER_A_PART) == {}
    given = {"timestep_range": [100.0, 900.0], "alpha": 2.0, "beta": 0.5, "type": "random", "seed": 3}
    assert routing(given, ROUTED_OVER_A_PART) == {f"routing_{name}": value for name, value in given.items()}


def test_routing_of_a_pretrained_model_is_kept_unless_said_otherwise(tmp_path):
    source = {"pretrained_model_name_or_path": saved(tmp_path, DDIMScheduler())}
    assert routing({}, ROUTED_OVER_A_PART, **source) == {}
    assert routing({}, {"routing_timestep_range": None}, **source) == {}
    assert routing({"beta": 0.5}, ROUTED_OVER_A_PART, **source) == {"routing_beta": 0.5}
    assert routing({"timestep_range": [0, 9]}, ROUTED_OVER_A_PART, **source) == {"routing_timestep_range": [0, 9]}
    plain = {"sample_size": 8}
    assert routing({}, plain, **source) == {"routing_timestep_range": (0, 999)}


@pytest.mark.parametrize("whole", [[0, 999], None])
def test_routing_over_all_of_a_schedule_follows_it_to_another_number_of_timesteps(tmp_path, whole):
    source = {"pretrained_model_name_or_path": saved(tmp_path, DDIMScheduler())}
    over_all = {"routing_timestep_range": whole}
    assert routing({}, over_all, num_timesteps=500, **source) == {"routing_timestep_range": (0, 499)}
    with pytest.raises(ValueError, match=r"`--routing_timestep_range` must be given: .* over \[200, 800\] of 1000"):
        routing({}, ROUTED_OVER_A_PART, num_timesteps=500, **source)


@pytest.mark.parametrize(
    ("model_class", "right"),
    [(DTRTransformer2DModel, [0, 9]), (DTRSD3Transformer2DModel, [0, 9]), (DTRLumina2, [0.9, 0.0])],
)
def test_a_range_runs_as_the_timesteps_of_the_family_do(model_class, right):
    assert routing({"timestep_range": right}, model_class=model_class) == {"routing_timestep_range": right}
    with pytest.raises(ValueError, match="must go from the cleanest to the noisiest timestep"):
        routing({"timestep_range": right[::-1]}, model_class=model_class)


def test_variant_that_a_folder_has_no_weights_of_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors").touch()
    assert pretrained_options(ModelConfig(str(tmp_path), variant="fp16"))["variant"] == "fp16"
    with pytest.raises(ValueError, match=r"`--variant` must be one that .* has weights of, .* got 'bf16'"):
        pretrained_options(ModelConfig(str(tmp_path), variant="bf16"))
