"""Train or fine-tune a class-conditional diffusion transformer with Denoising Task Routing.

Run with `accelerate launch train_class_conditional.py --help`; README.md beside this file has complete commands.
"""

import argparse
import logging
import math
import sys
import time

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_dtr import (
    DIT_PRESETS,
    DenoisingLoss,
    DTRPipeline,
    DTRTransformer2DModel,
    cluster_timesteps,
    training,
    vae_scale_factor,
)
from diffusers_dtr.hub import push_run, save_model_card


logger = get_logger(__name__)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    group.add_argument("--class_dropout_prob", type=float, default=0.1, help="Share of labels that are dropped.")
    training.add_data_arguments(parser)
    training.add_optimization_arguments(parser)
    training.add_noise_arguments(parser)
    training.add_routing_arguments(parser)
    training.add_run_arguments(parser)
    args = parser.parse_args(argv)
    training.check_arguments(parser, args)
    return args


def load_vae(args):
    if args.vae_name_or_path is not None:
        return AutoencoderKL.from_pretrained(args.vae_name_or_path, cache_dir=args.cache_dir)
    if args.pretrained_model_name_or_path is not None:
        index = DiffusionPipeline.load_config(args.pretrained_model_name_or_path, cache_dir=args.cache_dir)
        if index.get("vae", [None])[0] is not None:
            return AutoencoderKL.from_pretrained(
                args.pretrained_model_name_or_path, subfolder="vae", cache_dir=args.cache_dir
            )
    return None


def load_transformer(args, latent_channels, sample_size, num_classes):
    routing = training.routing_config(args)
    if args.pretrained_model_name_or_path is not None:
        model = DTRTransformer2DModel.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="transformer", cache_dir=args.cache_dir, **routing
        )
        if model.config.num_embeds_ada_norm != num_classes:
            logger.info(f"New label embedding: {model.config.num_embeds_ada_norm} classes before, {num_classes} now.")
            model.replace_classes(num_classes)
        return model.train()
    config = DIT_PRESETS[args.model_preset] if args.model_config is None else args.model_config
    channels = latent_channels or config.get("in_channels", 3)
    shape = {
        "in_channels": channels,
        "out_channels": 2 * channels if args.learn_sigma else channels,
        "sample_size": sample_size,
        "num_embeds_ada_norm": num_classes,
        "class_dropout_prob": args.class_dropout_prob,
        "routing_timestep_range": (0, args.num_train_timesteps - 1),
    }
    return DTRTransformer2DModel(**{**config, **shape, **routing})


def load_noise_scheduler(args, model, in_latents):
    learned_variance = model.config.out_channels == 2 * model.config.in_channels
    config = {
        "variance_type": "learned_range" if learned_variance else "fixed_small",
        "clip_sample": not in_latents,
    }
    if args.pretrained_model_name_or_path is not None:
        return DDPMScheduler.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="scheduler", cache_dir=args.cache_dir, **config
        )
    return DDPMScheduler(
        num_train_timesteps=args.num_train_timesteps,
        beta_schedule=args.noise_schedule,
        prediction_type=args.prediction_type,
        **config,
    )


def build_pipeline(model, noise_scheduler, vae, images):
    pipeline = DTRPipeline(scheduler=noise_scheduler, transformer=model, vae=vae, id2label=images.id2label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def validate(args, accelerator, pipeline, held_out_loss, step):
    """Held-out loss and a sample grid, for the tracker and as a PNG."""
    model = pipeline.transformer.eval()
    values = {}
    if held_out_loss is not None:
        losses = held_out_loss(lambda *inputs: model(*inputs, return_dict=False)[0], accelerator)
        values["validation_loss"] = losses.mean
        for number, loss in enumerate(losses.per_cluster):
            values[f"validation_loss/cluster_{number}"] = loss
        logger.info(f"Step {step}: held-out loss {losses.mean:.5f}")
    if accelerator.is_main_process:
        labels = training.validation_labels(args.num_validation_images, pipeline.num_classes)
        samples = pipeline(
            class_labels=labels,
            guidance_scale=args.validation_guidance_scale,
            num_inference_steps=args.validation_num_inference_steps,
            generator=torch.Generator(accelerator.device).manual_seed(0),
            max_batch_size=args.train_batch_size,
        ).images
        columns = math.isqrt(len(samples) - 1) + 1
        grid = training.save_sample_grid(samples, columns, f"{args.output_dir}/samples/step-{step:08d}.png")
        training.log_image(accelerator, "samples", grid, step)
    accelerator.log(values, step=step)
    accelerator.wait_for_everyone()
    model.train()
    return values


def main(args):
    start_time = time.perf_counter()
    output_dir = training.prepare_output_dir(args.output_dir, resuming=args.resume_from_checkpoint is not None)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / args.logging_dir),
    )
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=logging.INFO if accelerator.is_local_main_process else logging.ERROR,
    )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # 1. Images, and the autoencoder in whose latent space they are learned, if there is one
    images = training.load_images(args, args.label_column)
    vae = load_vae(args)
    if vae is not None:
        vae.requires_grad_(False).eval().to(accelerator.device)
    sample_size = args.resolution // (1 if vae is None else vae_scale_factor(vae))

    # 2. Denoiser, noise schedule and loss
    torch.manual_seed(args.seed)
    model = load_transformer(
        args, None if vae is None else vae.config.latent_channels, sample_size, images.num_classes
    )
    noise_scheduler = load_noise_scheduler(args, model, in_latents=vae is not None)
    loss_fn = DenoisingLoss(noise_scheduler, args.loss_weighting, snr_gamma=args.snr_gamma)
    clusters = cluster_timesteps(noise_scheduler, num_clusters=1, cost="uniform")
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.compile:
        model.compile(fullgraph=True)
    ema = None
    if args.use_ema:
        ema = EMAModel(
            model.parameters(),
            decay=args.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=args.ema_inv_gamma,
            power=args.ema_power,
            foreach=True,
            model_cls=DTRTransformer2DModel,
            model_config=model.config,
        )
        ema.to(accelerator.device)

    # 3. Data, whose order and augmentation depend on the seed and the step alone
    image_channels = model.config.in_channels if vae is None else vae.config.in_channels
    dataset = training.build_dataset(args, images, image_channels, vae, accelerator)
    held_out = training.held_out_samples(args, args.label_column, image_channels, vae, accelerator.device)
    if held_out is not None:
        eighths = cluster_timesteps(noise_scheduler, num_clusters=8, cost="uniform")
        held_out = training.HeldOutLoss(loss_fn.levels, eighths, *held_out)
    global_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(dataset) / global_batch_size)

    # 4. Optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    denoiser, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)

    # 5. Go on from a checkpoint
    checkpoints = training.Checkpoints(
        accelerator, output_dir, "transformer", DTRTransformer2DModel, ema, args.checkpoints_total_limit
    )
    settings = {"seed": args.seed, "global_batch_size": global_batch_size, "num_images": len(dataset)}
    global_step = checkpoints.resume(args.resume_from_checkpoint, settings)
    loader = training.build_loader(args, dataset, accelerator, global_step)
    if accelerator.is_main_process and args.report_to != "none":
        accelerator.init_trackers("class-conditional", config=training.tracker_config(args))

    logger.info(
        f"{len(dataset)} images of {images.num_classes} classes, {model.num_parameters():,} parameters, "
        f"{global_batch_size} images per step, {args.max_train_steps} steps"
    )
    unreadable = training.UnreadableImages()
    monitor = training.LossMonitor(accelerator)
    pipeline = build_pipeline(model, noise_scheduler, vae, images)
    progress_bar = tqdm(
        total=args.max_train_steps, initial=global_step, desc="Steps", disable=not accelerator.is_local_main_process
    )

    # 6. Train
    model.train()
    first_batch = global_step * args.gradient_accumulation_steps
    for number, batch in enumerate(loader, start=first_batch):
        if global_step >= args.max_train_steps:
            break
        unreadable.update(batch["unreadable"])
        model.set_routing_beta(
            training.warmed_up_beta(global_step, args.routing_warmup_steps, model.config.routing_beta)
            if args.routing_warmup_steps
            else None
        )
        # Label drops and dropout read the global generator.
        torch.manual_seed(training.derive_seed(args.seed, number, accelerator.process_index))
        generator = training.step_generator(args.seed, number, accelerator.process_index, accelerator.device)
        with accelerator.accumulate(denoiser):
            clean, class_labels = training.clean_samples(batch, vae, args.seed, accelerator.device)
            noise = torch.randn(clean.shape, generator=generator, device=accelerator.device)
            timesteps = clusters.sample(
                len(clean),
                generator=training.shared_generator(args.seed, number),
                device=accelerator.device,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
            )
            noisy = loss_fn.levels.add_noise(clean, noise, timesteps)
            model_input = loss_fn.levels.model_input(noisy, timesteps)
            model_output = denoiser(model_input, timesteps, class_labels).sample
            loss = loss_fn(model_output, clean, noise, timesteps).loss
            monitor.update(loss, global_step + 1)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(denoiser.parameters(), args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        global_step += 1
        progress_bar.update()
        if ema is not None:
            ema.step(model.parameters())
        last = global_step == args.max_train_steps
        checkpoint_due = global_step % args.checkpointing_steps == 0 or last
        if global_step % args.logging_steps == 0 or checkpoint_due:
            values = {"loss": monitor.read(checkpoints.latest()), "lr": lr_scheduler.get_last_lr()[0]}
            progress_bar.set_postfix(**values)
            accelerator.log(values, step=global_step)
        if checkpoint_due:
            checkpoints.save(global_step, settings)
        if args.validation_steps is not None and global_step % args.validation_steps == 0 and not last:
            with training.averaged_weights(ema, model):
                validate(args, accelerator, pipeline, held_out, global_step)
    progress_bar.close()

    # 7. Save the pipeline, and share it
    model.set_routing_beta(None)
    if ema is not None:
        ema.copy_to(model.parameters())
    results = validate(args, accelerator, pipeline, held_out, global_step)
    if accelerator.is_main_process:
        training.save_pipeline(pipeline, output_dir)
        seconds = time.perf_counter() - start_time
        record = training.run_record(
            args, sys.argv, accelerator, seconds, results=results, unreadable_images=sorted(unreadable.names)
        )
        training.save_record(record, output_dir)
        logger.info(f"Saved the pipeline in {output_dir}")
        if args.push_to_hub:
            description = (
                "A class-conditional diffusion transformer with Denoising Task Routing, trained for "
                f"{global_step} steps with `{record['command']}`."
            )
            tags = ["diffusers", "diffusers-dtr", "class-conditional-image-generation"]
            save_model_card(output_dir, description, tags, base_model=args.pretrained_model_name_or_path)
            url = push_run(output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo, "End of training")
            logger.info(f"Pushed to {url}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
