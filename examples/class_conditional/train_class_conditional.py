"""Train or fine-tune a class-conditional diffusion transformer with Denoising Task Routing.

Run with `accelerate launch train_class_conditional.py --help`; README.md beside this file has complete commands.
"""

import argparse

import torch

from diffusers_dtr import DIT_PRESETS, DTRPipeline, DTRTransformer2DModel, training
from diffusers_dtr.ranges import Range
from diffusers_dtr.user_errors import run_script


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("model")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--model_preset", choices=DIT_PRESETS, help="Published size to train from scratch.")
    source.add_argument(
        "--model_config",
        type=training.json_config,
        help="Config of DTRTransformer2DModel to train from scratch, as JSON or as a JSON file.",
    )
    source.add_argument(
        "--pretrained_model_name_or_path",
        help="Pipeline to fine-tune: ours or a DiTPipeline.",
    )
    group.add_argument(
        "--class_dropout_prob",
        type=Range("[0, 1)"),
        help="Share of labels that are dropped. Default 0.1, or the pretrained.",
    )
    training.add_pretrained_arguments(group)
    training.add_data_arguments(parser)
    training.add_optimization_arguments(parser)
    training.add_noise_arguments(parser)
    training.add_objective_arguments(parser)
    training.add_routing_arguments(parser)
    training.add_run_arguments(parser)
    args = parser.parse_args(argv)
    training.check_arguments(parser, args)
    return args


def load_transformer(args, noise_scheduler, vae, images):
    if args.pretrained_model_name_or_path is not None:
        return load_pretrained_transformer(args, noise_scheduler, vae, images)
    # The presets are made for latents; pixels have three channels.
    config = {**DIT_PRESETS[args.model_preset], "in_channels": 3} if args.model_config is None else args.model_config
    channels = config.get("in_channels", 3) if vae is None else vae.config.latent_channels
    shape = {
        "in_channels": channels,
        "out_channels": 2 * channels if args.learn_sigma else channels,
        "num_embeds_ada_norm": images.num_classes,
    }
    training.check_new_denoiser(args, "model_config", shape)
    return DTRTransformer2DModel(**{**config, **shape, **given_config(args, noise_scheduler, vae, config)}), images


def load_pretrained_transformer(args, noise_scheduler, vae, images):
    path, options = args.pretrained_model_name_or_path, training.pretrained_options(args)
    options["subfolder"] = training.pretrained_denoiser(args, {"transformer": DTRTransformer2DModel})
    config = training.pretrained_config(args, options["subfolder"], DTRTransformer2DModel)
    given = given_config(args, noise_scheduler, vae, config)
    before = config.get("class_dropout_prob", 0.1)
    if (given.get("class_dropout_prob", before) > 0) != (before > 0):
        raise ValueError(
            f"`--class_dropout_prob` must be {'above 0' if before else '0'}, got {args.class_dropout_prob}: the "
            f"pretrained model was trained with {before}, and has {'a' if before else 'no'} null class."
        )
    model = DTRTransformer2DModel.from_pretrained(path, **options, **given)
    training.check_pretrained_denoiser(args, model, vae)
    names, num_classes = training.pretrained_class_names(args), model.config.num_embeds_ada_norm
    images, known = training.match_classes(images, names, num_classes or 0, new_classes=True)
    if not known or images.num_classes > num_classes:
        model.replace_classes(images.num_classes, keep=known)
    return model.train(), images


def given_config(args, noise_scheduler, vae, config):
    given = training.denoiser_config(args, noise_scheduler, vae, DTRTransformer2DModel, config)
    return given if args.class_dropout_prob is None else {**given, "class_dropout_prob": args.class_dropout_prob}


def build_pipeline(args, model, vae, images):
    scheduler = training.sampling_scheduler(args, latents=vae is not None)
    pipeline = DTRPipeline(scheduler=scheduler, transformer=model, vae=vae, id2label=images.id2label)
    if args.validation_guidance_scale > 1 and pipeline.null_class is None:
        raise ValueError(
            f"`--validation_guidance_scale` must be 1, got {args.validation_guidance_scale}: without dropped labels "
            "(`--class_dropout_prob`) the model has no null class to be guided away from."
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(args):
    accelerator = training.start_run(args)

    # 1. Images, and the autoencoder in whose latent space they are learned, if there is one
    images = training.load_images(args, args.label_column)
    vae = training.load_vae(args)
    if vae is not None:
        vae.to(accelerator.device)

    # 2. Denoiser and noise schedule
    noise_scheduler = training.load_noise_scheduler(args)
    torch.manual_seed(args.seed)
    model, images = load_transformer(args, noise_scheduler, vae, images)
    pipeline = build_pipeline(args, model, vae, images)

    # 3. What the denoiser is told, and how it is sampled
    def conditions(batch):
        return {"class_labels": batch["labels"].to(accelerator.device, non_blocking=True)}

    classes = images.classes
    sampling = {
        "class_labels": [classes[index % len(classes)] for index in range(args.num_validation_images)],
        "guidance_scale": args.validation_guidance_scale,
        "num_inference_steps": args.validation_num_inference_steps,
        "max_batch_size": args.train_batch_size,
    }

    # 4. Train
    channels = training.image_channels(model, vae)
    trainer = training.Trainer(
        args,
        accelerator,
        model,
        "transformer",
        noise_scheduler,
        images=images,
        dataset=training.build_dataset(args, images, channels, vae, accelerator),
        held_out_dataset=training.held_out_dataset(args, images, channels),
        vae=vae,
        conditions=conditions,
        sample=lambda generator: pipeline(**sampling, generator=generator).images,
        project_name="class-conditional",
    )
    trainer.train()
    trainer.finish(save=lambda folder: training.save_pipeline(pipeline, folder), sampling=sampling)


if __name__ == "__main__":
    run_script(main, parse_args())
