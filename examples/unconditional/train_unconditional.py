"""Train or fine-tune an unconditional U-Net or diffusion transformer with Denoising Task Routing.

Run with `accelerate launch train_unconditional.py --help`; README.md beside this file has complete commands.
"""

import argparse

import torch

from diffusers_dtr import DIT_PRESETS, DTRPipeline, DTRTransformer2DModel, DTRUNet2DModel, training
from diffusers_dtr.user_errors import run_script


# What pipelines call each kind of denoiser.
MODELS = {"unet": DTRUNet2DModel, "transformer": DTRTransformer2DModel}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("model")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--unet_config",
        type=training.json_config,
        help="Config of DTRUNet2DModel to train from scratch, as JSON or as a JSON file.",
    )
    source.add_argument(
        "--transformer_config",
        type=training.json_config,
        help="Config of DTRTransformer2DModel to train from scratch, as JSON or as a JSON file.",
    )
    source.add_argument("--model_preset", choices=DIT_PRESETS, help="Published transformer to train from scratch.")
    source.add_argument(
        "--pretrained_model_name_or_path",
        help="Pipeline to fine-tune: ours, a DDPMPipeline or a DDIMPipeline.",
    )
    training.add_pretrained_arguments(group)
    training.add_data_arguments(parser, labels=False)
    training.add_optimization_arguments(parser)
    training.add_noise_arguments(parser)
    training.add_objective_arguments(parser)
    training.add_routing_arguments(parser)
    training.add_run_arguments(parser, guidance=False)
    args = parser.parse_args(argv)
    training.check_arguments(parser, args)
    return args


def load_denoiser(args, noise_scheduler, vae):
    if args.pretrained_model_name_or_path is not None:
        name = training.pretrained_denoiser(args, MODELS)
        options = training.pretrained_options(args)
        config = training.pretrained_config(args, name, MODELS[name])
        given = training.denoiser_config(args, noise_scheduler, vae, MODELS[name], config)
        model = MODELS[name].from_pretrained(args.pretrained_model_name_or_path, subfolder=name, **options, **given)
        training.check_pretrained_denoiser(args, model, vae)
        return name, model.train()

    if args.model_preset is not None:
        # The presets are made for latents; pixels have three channels.
        name, config = "transformer", {**DIT_PRESETS[args.model_preset], "in_channels": 3}
    elif args.transformer_config is not None:
        name, config = "transformer", args.transformer_config
    else:
        name, config = "unet", args.unet_config
    channels = config.get("in_channels", 3) if vae is None else vae.config.latent_channels
    shape = {"in_channels": channels, "out_channels": 2 * channels if args.learn_sigma else channels}
    if name == "transformer":
        shape |= {"num_embeds_ada_norm": None, "class_dropout_prob": 0.0}
    training.check_new_denoiser(args, f"{name}_config", shape)
    given = training.denoiser_config(args, noise_scheduler, vae, MODELS[name], config)
    return name, MODELS[name](**{**config, **shape, **given})


def main(args):
    accelerator = training.start_run(args)

    # 1. Images, and the autoencoder in whose latent space they are learned, if there is one
    images = training.load_images(args, label_column=None)
    vae = training.load_vae(args)
    if vae is not None:
        vae.to(accelerator.device)

    # 2. Denoiser and noise schedule
    noise_scheduler = training.load_noise_scheduler(args)
    torch.manual_seed(args.seed)
    name, model = load_denoiser(args, noise_scheduler, vae)
    scheduler = training.sampling_scheduler(args, latents=vae is not None)
    names = training.pretrained_class_names(args)  # of a transformer that can do without labels
    pipeline = DTRPipeline(scheduler, **{name: model}, vae=vae, id2label=names)
    pipeline.set_progress_bar_config(disable=True)

    # 3. Train
    sampling = {
        "num_images": args.num_validation_images,
        "num_inference_steps": args.validation_num_inference_steps,
        "max_batch_size": args.train_batch_size,
    }

    channels = training.image_channels(model, vae)
    trainer = training.Trainer(
        args,
        accelerator,
        model,
        name,
        noise_scheduler,
        images=images,
        dataset=training.build_dataset(args, images, channels, vae, accelerator),
        held_out_dataset=training.held_out_dataset(args, images, channels),
        vae=vae,
        conditions=None,
        sample=lambda generator: pipeline(**sampling, generator=generator).images,
        project_name="unconditional",
    )
    trainer.train()
    trainer.finish(save=lambda folder: training.save_pipeline(pipeline, folder), sampling=sampling)


if __name__ == "__main__":
    run_script(main, parse_args())
