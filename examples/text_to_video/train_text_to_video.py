"""Train or fine-tune a text-to-video model with Denoising Task Routing, whole or by LoRA.

Run with `accelerate launch train_text_to_video.py --help`; README.md beside this file has complete commands.
"""

import argparse
from functools import partial
from itertools import chain

import torch

from diffusers_dtr import training
from diffusers_dtr.user_errors import run_script


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help=f"A pipeline whose denoiser is diffusers' or ours: {', '.join(training.TEXT_TO_VIDEO_FAMILIES)}.",
    )
    training.add_pretrained_arguments(group)
    training.add_guidance_arguments(group)
    training.add_video_arguments(parser)
    training.add_text_arguments(parser)
    training.add_optimization_arguments(parser)
    training.add_lora_arguments(parser)
    training.add_noise_arguments(parser)
    training.add_objective_arguments(parser)
    training.add_routing_arguments(parser)
    training.add_run_arguments(parser)
    parser.set_defaults(denoiser_config=None)
    args = parser.parse_args(argv)
    training.check_arguments(parser, args)
    training.check_text_to_image_arguments(parser, args)
    return args


def main(args):
    accelerator = training.start_run(args)

    # 1. Captioned clips, and the autoencoder in whose latent space they are learned
    family = training.text_to_video_family(args)
    dataset = training.video_dataset(args, args.train_data_dir)
    held_out = training.video_dataset(args, args.validation_data_dir, held_out=True)
    frozen_dtype = training.frozen_dtype(accelerator)
    vae = training.load_vae(args, frozen_dtype).to(accelerator.device)

    # 2. Denoiser and noise schedule
    noise_scheduler = training.load_noise_scheduler(args)
    torch.manual_seed(args.seed)
    # By the flags of routing, `--route_lora` routes the adapters.
    unrouted = {"routing_type": "none"} if args.route_lora else None
    model = family.routed_class.from_pretrained(
        args.pretrained_model_name_or_path,
        subfolder=family.denoiser,
        # What is trained is in full precision, and what is frozen under adapters is not.
        torch_dtype=torch.float32 if args.rank is None else frozen_dtype,
        **training.pretrained_options(args),
        **(unrouted or training.denoiser_routing(args, None, {})),
    )
    training.check_pretrained_denoiser(args, model, vae, family.packing)
    if args.rank is not None:
        training.add_lora(model, args, family.lora_layers)
    pipeline = training.load_text_to_image_pipeline(args, family, model, vae, frozen_dtype)

    # 3. A sample is a clip, and one of its captions or, now and then, none
    videos, captions = dataset.images, dataset.images.captions
    dataset = training.CaptionedDataset(
        dataset, captions, seed=args.seed, proportion_empty=args.proportion_empty_prompts
    )
    if held_out is not None:
        held_out = training.CaptionedDataset(held_out, held_out.images.captions)

    # 4. The text encoders, or what they make of every text that will be needed
    rows = range(min(args.num_validation_images, len(dataset)))
    prompts = args.validation_prompts or [captions[row][0] for row in rows]
    texts = [source.captions.all() for source in (dataset, held_out) if source is not None]
    encode = training.build_text_encoder(args, family, pipeline, chain([""], prompts, *texts), accelerator)

    # 5. What the denoiser is told, and how it is sampled: strips of frames
    def conditions(batch):
        return family.conditions(pipeline, encode(batch["caption"]), batch)

    in_turn = [prompts[number % len(prompts)] for number in range(args.num_validation_images)]

    def sample(generator):
        return training.sample_text_to_image(args, family, pipeline, encode, in_turn, generator)

    # 6. Train
    trainer = training.Trainer(
        args,
        accelerator,
        model,
        family.denoiser,
        noise_scheduler,
        images=videos,
        dataset=dataset,
        held_out_dataset=held_out,
        vae=vae,
        conditions=conditions,
        sample=sample,
        denoise=partial(family.denoise, pipeline),
        project_name="text-to-video",
    )
    trainer.train()

    # 7. Save the adapters, or a pipeline whose frozen parts are as they were loaded, in full precision
    def save(folder):
        if args.rank is not None:
            training.save_lora(pipeline, family.denoiser, folder)
        else:
            result = training.load_text_to_image_pipeline(args, family, model, training.load_vae(args))
            training.save_pipeline(result, folder)

    sampling = {"prompt": in_turn[: args.train_batch_size], **training.sampling_arguments(args, family)}
    trainer.finish(save, sampling)


if __name__ == "__main__":
    run_script(main, parse_args())
