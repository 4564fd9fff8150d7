"""Unconditional training of U-Nets and transformers, from scratch and from diffusers' own pipelines."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.autoencoders import AutoencoderKL
from training_runs import (
    EXAMPLES,
    MODEL,
    arguments,
    assert_equal_weights,
    assert_same_configs,
    load_script,
    make_images,
    record,
    run_main,
    same_weights,
)

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel, DTRUNet2DModel, training


pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = EXAMPLES / "unconditional" / "train_unconditional.py"
UNET = {
    "in_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "dropout": 0.1,
}
SOURCES = {"unet": ("--unet_config", UNET), "transformer": ("--transformer_config", MODEL)}
# Everything that has a state, or draws at random.
EVERYTHING = [
    *("--max_train_steps", 6, "--checkpointing_steps", 2, "--gradient_accumulation_steps", 2, "--learn_sigma"),
    "--random_flip",
    *("--use_ema", "--channels_last", "--routing_warmup_steps", 5, "--num_clusters", 2, "--balancing", "uncertainty"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


def train(images: Path, output_dir: Path, source: tuple, *flags: object) -> Path:
    return run_main(load_script(SCRIPT), arguments(images, output_dir, *flags, source=source))


def plain_unet(**config) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(8, **{**UNET, "out_channels": 1, "dropout": 0.0, **config})


@pytest.fixture(scope="module")
def plain_pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "ddim"
    scheduler = DDIMScheduler(num_train_timesteps=50, beta_schedule="scaled_linear")
    DDIMPipeline(plain_unet(), scheduler).save_pretrained(folder)
    return folder


def test_resumed_run_ends_with_the_uninterrupted_weights(images, tmp_path):
    whole = train(images, tmp_path / "whole", SOURCES["unet"], *EVERYTHING)
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-4", run / "checkpoint-4")
    train(images, run, SOURCES["unet"], *EVERYTHING, "--resume_from_checkpoint", "latest")
    assert_equal_weights(run, whole, "unet")
    for name in ("unet", "unet_ema"):
        assert_equal_weights(run / "checkpoint-6", whole / "checkpoint-6", name)
    assert not same_weights(run / "checkpoint-6", run, "unet")  # the average is another model


def test_new_model_is_drawn_from_the_seed_alone(images, tmp_path):
    runs = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        flags = ["--seed", seed, "--learning_rate", 0, "--max_train_steps", 1]
        runs.append(train(images, tmp_path / str(number), SOURCES["unet"], *flags))
    assert same_weights(runs[0], runs[1], "unet")
    assert not same_weights(runs[0], runs[2], "unet")


@pytest.mark.parametrize("name", SOURCES)
def test_trained_pipeline_loads_and_samples(name, images, tmp_path):
    flags = ["--routing_beta", 0.5, "--num_train_timesteps", 20, "--validation_data_dir", images]
    run = train(images, tmp_path / "run", SOURCES[name], *flags)
    pipeline = DTRPipeline.from_pretrained(run)
    assert isinstance(pipeline.denoiser, {"unet": DTRUNet2DModel, "transformer": DTRTransformer2DModel}[name])
    assert pipeline.num_classes is None
    assert pipeline.denoiser.config.routing_beta == 0.5
    assert tuple(pipeline.denoiser.config.routing_timestep_range) == (0, 19)
    assert pipeline(num_images=2, num_inference_steps=2).images[1].size == (8, 8)
    assert (run / "samples" / "step-00000003.png").exists()
    assert record(run)["results"]["validation_loss"] > 0
    if name == "unet":
        image = DDPMPipeline(pipeline.unet, pipeline.scheduler)(num_inference_steps=2).images[0]
        assert image.size == (8, 8)  # in diffusers' own pipeline too


def test_plain_pipeline_becomes_a_routed_one_with_its_own_schedule(plain_pipeline, images, tmp_path):
    source = ("--pretrained_model_name_or_path", plain_pipeline)
    run = train(images, tmp_path / "run", source, "--learning_rate", 0, "--routing_beta", 0.7)
    assert_equal_weights(run, plain_pipeline, "unet")
    pipeline = DTRPipeline.from_pretrained(run)
    assert pipeline.unet.config.routing_beta == 0.7
    assert tuple(pipeline.unet.config.routing_timestep_range) == (0, 49)
    assert_same_configs(plain_pipeline, run, plain="unet")


def test_a_transformer_with_classes_is_tuned_without_labels_and_keeps_their_names(images, tmp_path):
    model = DTRTransformer2DModel(**MODEL, out_channels=1, sample_size=8, num_embeds_ada_norm=2)
    DTRPipeline(DDPMScheduler(), transformer=model, id2label={0: "cat", 1: "dog"}).save_pretrained(tmp_path / "named")
    source = ("--pretrained_model_name_or_path", tmp_path / "named")
    run = train(images, tmp_path / "run", source, "--max_train_steps", 1)
    assert DTRPipeline.from_pretrained(run).config.id2label == {"0": "cat", "1": "dog"}


def test_unet_learns_in_the_latent_space_of_an_autoencoder(images, tmp_path):
    vae = AutoencoderKL(1, 1, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (4, 4), norm_num_groups=2)
    vae.save_pretrained(tmp_path / "vae")
    flags = ["--vae_name_or_path", tmp_path / "vae", "--resolution", 16, "--cache_latents", "--center_crop"]
    of_latents = {name: value for name, value in UNET.items() if name != "in_channels"}
    run = train(images, tmp_path / "run", ("--unet_config", of_latents), *flags)
    pipeline = DTRPipeline.from_pretrained(run)
    assert pipeline.unet.config.in_channels == 4
    assert pipeline.unet.config.sample_size == 8
    assert pipeline.scheduler.config.clip_sample is False
    assert pipeline(num_images=1, num_inference_steps=1).images[0].size == (16, 16)
    other = ("--pretrained_model_name_or_path", tmp_path / "pixels")
    DTRPipeline(DDPMScheduler(), unet=plain_unet()).save_pretrained(tmp_path / "pixels")
    with pytest.raises(ValueError, match=r"latents have 4 channels, but the pretrained model has `in_channels`=1"):
        train(images, tmp_path / "refused", other, *flags)


def test_variance_that_is_not_predicted_cannot_be_learned(plain_pipeline, images, tmp_path):
    with pytest.raises(ValueError, match="`--learn_sigma` needs a pretrained model that predicts a variance"):
        train(images, tmp_path / "run", ("--pretrained_model_name_or_path", plain_pipeline), "--learn_sigma")


@pytest.mark.parametrize(
    ("source", "name"),
    [(("--model_preset", "DiT-S/8"), "transformer"), *((("--" + name + "_config", "{}"), name) for name in SOURCES)],
)
def test_new_denoiser_is_of_colour_pixels_unless_it_says_otherwise(source, name):
    script = load_script(SCRIPT)
    args = script.parse_args([*source, "--train_data_dir", "d", "--output_dir", "o"])
    noise_scheduler = training.load_noise_scheduler(args)
    with torch.device("meta"):
        new, given = script.new_denoiser(args.model)
        _, model = training.load_denoiser(args, script.MODELS, new, noise_scheduler, None, **given)
    assert (new[0], model.config.in_channels, model.config.out_channels, model.config.sample_size) == (name, 3, 3, 32)
    assert model.config.get("num_embeds_ada_norm") is None


def test_frozen_weights_are_part_of_the_average(images, tmp_path):
    source = ("--unet_config", {**UNET, "time_embedding_type": "fourier"})
    run = train(images, tmp_path / "run", source, "--use_ema", "--validation_steps", 2)
    averaged = DTRUNet2DModel.from_pretrained(run / "checkpoint-3" / "unet_ema").state_dict()
    result = DTRPipeline.from_pretrained(run).unet.state_dict()
    assert "time_proj.weight" in result
    assert all(torch.equal(result[name], averaged[name]) for name in result)


def test_flags_about_classes_are_not_there(capsys):
    flags = ["--label_column", "--validation_guidance_scale", "--class_dropout_prob"]
    with pytest.raises(SystemExit):
        load_script(SCRIPT).parse_args(["--model_preset", "DiT-S/2", "--output_dir", "o", *flags])
    assert f"unrecognized arguments: {' '.join(flags)}" in capsys.readouterr().err
