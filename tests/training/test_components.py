"""What of a pretrained pipeline a run starts from: real ones, saved by diffusers."""

import argparse
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from tiny_dit import plain_dit

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel, DTRUNet2DModel, NoiseLevels
from diffusers_dtr.training import load_noise_scheduler, load_vae, sample_size, sampling_scheduler
from diffusers_dtr.training.components import pretrained_component, pretrained_denoiser


TWO_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def flags(**given) -> argparse.Namespace:
    names = ["pretrained_model_name_or_path", "vae_name_or_path", "revision", "variant", "cache_dir"]
    names += ["noise_schedule", "num_train_timesteps", "prediction_type"]
    return argparse.Namespace(learn_sigma=given.pop("learn_sigma", False), **{name: given.get(name) for name in names})


def vae(**config) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, **config)


def saved(folder, scheduler, vae=None, **options):
    if vae is None:
        unet = UNet2DModel(8, block_out_channels=(4, 4), norm_num_groups=2, down_block_types=("DownBlock2D",) * 2,
                           up_block_types=("UpBlock2D",) * 2)  # fmt: skip
        DTRPipeline(scheduler, unet=unet).save_pretrained(folder, **options)
    else:
        DiTPipeline(plain_dit(), vae, scheduler).save_pretrained(folder, **options)
    return str(folder)


def test_autoencoder_is_the_given_one_or_that_of_the_pipeline_or_none(tmp_path):
    latent = saved(tmp_path / "latent", DDIMScheduler(), vae())
    vae().save_pretrained(tmp_path / "vae")
    of_pipeline = load_vae(flags(pretrained_model_name_or_path=latent))
    assert of_pipeline.config._name_or_path == latent
    assert not of_pipeline.training
    assert not any(parameter.requires_grad for parameter in of_pipeline.parameters())
    given = load_vae(flags(pretrained_model_name_or_path=latent, vae_name_or_path=str(tmp_path / "vae")))
    assert given.config._name_or_path == str(tmp_path / "vae")
    assert load_vae(flags()) is None
    pixels = saved(tmp_path / "pixels", DDIMScheduler())
    assert load_vae(flags(pretrained_model_name_or_path=pixels)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("force_upcast", [True, False])
def test_an_autoencoder_that_insists_on_float32_is_loaded_in_it(dtype, force_upcast, tmp_path):
    original = vae(force_upcast=force_upcast)
    original.save_pretrained(tmp_path)
    loaded = load_vae(flags(vae_name_or_path=str(tmp_path)), dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32 if force_upcast else dtype}
    if force_upcast:  # not rounded on the way
        assert all(map(torch.equal, loaded.state_dict().values(), original.state_dict().values()))


def test_variant_of_the_weights_is_loaded(tmp_path):
    folder = saved(tmp_path / "half", DDIMScheduler(), vae(), variant="fp16")
    assert load_vae(flags(pretrained_model_name_or_path=folder, variant="fp16")) is not None
    assert load_noise_scheduler(flags(pretrained_model_name_or_path=folder, variant="fp16")) is not None
    with pytest.raises(OSError, match="no file named"):
        load_vae(flags(pretrained_model_name_or_path=folder))


def test_revision_decides_which_parts_there_are(hub, tmp_path):
    HfApi().create_repo("owner/base")
    old = HfApi().upload_folder(repo_id="owner/base", folder_path=saved(tmp_path / "old", DDIMScheduler(), vae())).oid
    HfApi().upload_folder(repo_id="owner/base", folder_path=saved(tmp_path / "new", DDPMScheduler()))
    of_old = flags(pretrained_model_name_or_path="owner/base", revision=old)
    assert pretrained_component(of_old, "scheduler") == "DDIMScheduler"
    assert load_vae(of_old) is not None
    assert load_vae(flags(pretrained_model_name_or_path="owner/base")) is None


def test_all_that_is_downloaded_is_kept_in_the_folder_asked_for(hub, tmp_path):
    saved(tmp_path / "base", DDIMScheduler(), vae())
    for name, folder in (("owner/base", tmp_path / "base"), ("owner/vae", tmp_path / "base" / "vae")):
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    source = {"pretrained_model_name_or_path": "owner/base", "cache_dir": str(tmp_path / "cache")}
    load_vae(flags(**source))
    load_noise_scheduler(flags(**source))
    load_vae(flags(**source, vae_name_or_path="owner/vae"))
    kept = {path.name for path in (tmp_path / "cache").glob("models--*")}
    assert kept == {"models--owner--base", "models--owner--vae"}
    assert not list(Path(HF_HUB_CACHE).glob("models--*"))


def test_training_noises_as_the_pretrained_pipeline_was_trained(tmp_path):
    sampler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", num_train_timesteps=50)
    args = flags(pretrained_model_name_or_path=saved(tmp_path / "ddpm", sampler), prediction_type="v_prediction")
    scheduler = load_noise_scheduler(args)
    assert type(scheduler) is DDPMScheduler
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.num_train_timesteps == 50
    assert scheduler.config.prediction_type == "v_prediction"


def test_flow_matching_stays_flow_matching(tmp_path):
    folder = saved(tmp_path / "flow", FlowMatchEulerDiscreteScheduler(shift=3.0))
    scheduler = load_noise_scheduler(flags(pretrained_model_name_or_path=folder))
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    assert scheduler.config.shift == 3.0
    with pytest.raises(ValueError, match=r"`prediction_type` must be left out: .* flow matching"):
        load_noise_scheduler(flags(pretrained_model_name_or_path=folder, prediction_type="epsilon"))
    with pytest.raises(ValueError, match=r"`--learn_sigma` must be left out: .* flow matching"):
        load_noise_scheduler(flags(pretrained_model_name_or_path=folder, learn_sigma=True))
    result = sampling_scheduler(scheduler, DTRPipeline.from_pretrained(folder).unet, clip_sample=True)
    assert type(result) is FlowMatchEulerDiscreteScheduler
    assert result.config.shift == 3.0


def test_variance_exploding_sampler_is_of_the_same_noise_levels(tmp_path):
    folder = saved(tmp_path / "euler", EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    scheduler = load_noise_scheduler(flags(pretrained_model_name_or_path=folder))
    assert type(scheduler) is DDPMScheduler
    assert scheduler.config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon"),
    ],
    ids=["EDM", "continuous", "flow of noise"],
)
def test_noise_levels_that_training_would_not_have_are_refused(tmp_path, scheduler):
    folder = saved(tmp_path / "other", scheduler)
    with pytest.raises(
        ValueError, match=f"`pretrained_model_name_or_path` must be .*, got a {type(scheduler).__name__}"
    ):
        load_noise_scheduler(flags(pretrained_model_name_or_path=folder))


@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_flow_matching_is_trained_with_the_shift_that_its_solver_samples_with(tmp_path, solver):
    original = solver(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    folder = saved(tmp_path / "shifted", original)
    scheduler = load_noise_scheduler(flags(pretrained_model_name_or_path=folder))
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    torch.testing.assert_close(NoiseLevels(scheduler).timesteps, NoiseLevels(original).timesteps)
    assert scheduler.config.shift == 3.0


def test_transformer_under_the_name_that_diffusers_gave_it_first(tmp_path):
    folder = saved(tmp_path / "dit", DDIMScheduler(), vae())
    index = Path(folder) / "model_index.json"
    index.write_text(index.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    args = flags(pretrained_model_name_or_path=folder)
    assert pretrained_denoiser(args, {"unet": DTRUNet2DModel, "transformer": DTRTransformer2DModel}) == "transformer"
    with pytest.raises(ValueError, match=r"with a `unet` of UNet2DModel, plain or routed, got .* {'unet': None}"):
        pretrained_denoiser(args, {"unet": DTRUNet2DModel})


def test_latents_must_fill_the_images():
    assert sample_size(argparse.Namespace(resolution=9), None) == 9
    autoencoder = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, **TWO_BLOCKS)
    assert sample_size(argparse.Namespace(resolution=10), autoencoder) == 5
    with pytest.raises(ValueError, match=r"`--resolution` must be a multiple of 2, .*, got 9"):
        sample_size(argparse.Namespace(resolution=9), autoencoder)


def test_without_a_pipeline_the_flags_decide():
    scheduler = load_noise_scheduler(flags(noise_schedule="squaredcos_cap_v2"))
    assert type(scheduler) is DDPMScheduler
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert scheduler.config.num_train_timesteps == 1000
