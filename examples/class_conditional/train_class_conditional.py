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
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_dtr import (
    DIT_PRESETS,
    DTRPipeline,
    DTRTransformer2DModel,
    cluster_timesteps,
    training,
    vae_scale_factor,
)
from diffusers_dtr.hub import create_run_repo, push_run, save_model_card


logger = get_logger(__name__)


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
        "--class_dropout_prob", type=float, help="Share of labels that are dropped. Default 0.1, or the pretrained."
    )
    training.add_data_arguments(parser)
    training.add_optimization_arguments(parser)
    training.add_noise_arguments(parser)
    training.add_objective_arguments(parser)
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


def load_noise_scheduler(args):
    config = training.noise_config(args)
    if args.pretrained_model_name_or_path is None:
        return DDPMScheduler(**config)
    return DDPMScheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler", cache_dir=args.cache_dir, **config
    )


def load_transformer(args, noise_scheduler, latent_channels, sample_size, num_classes):
    given = {
        **training.routing_config(args),
        "routing_timestep_range": (0, noise_scheduler.config.num_train_timesteps - 1),
        "sample_size": sample_size,
    }
    if args.class_dropout_prob is not None:
        given["class_dropout_prob"] = args.class_dropout_prob
    if args.pretrained_model_name_or_path is not None:
        return load_pretrained_transformer(args, given, latent_channels, num_classes)
    # The presets are made for latents; pixels have three channels.
    config = args.model_config or {**DIT_PRESETS[args.model_preset], "in_channels": 3}
    channels = latent_channels or config.get("in_channels", 3)
    shape = {
        "in_channels": channels,
        "out_channels": 2 * channels if args.learn_sigma else channels,
        "num_embeds_ada_norm": num_classes,
    }
    return DTRTransformer2DModel(**{**config, **shape, **given})


def load_pretrained_transformer(args, given, latent_channels, num_classes):
    model = DTRTransformer2DModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="transformer", cache_dir=args.cache_dir, **given
    )
    if latent_channels not in (None, model.config.in_channels):
        raise ValueError(
            f"The autoencoder's latents have {latent_channels} channels, but the pretrained model has "
            f"`in_channels`={model.config.in_channels}. Leave out `--vae_name_or_path` to use the pipeline's own."
        )
    if args.learn_sigma and not learns_variance(model):
        raise ValueError("`--learn_sigma` needs a pretrained model that predicts a variance, and this one does not.")
    if model.config.num_embeds_ada_norm != num_classes:
        logger.info(f"New label embedding: {model.config.num_embeds_ada_norm} classes before, {num_classes} now.")
        model.replace_classes(num_classes)
    return model.train()


def learns_variance(model):
    return model.config.out_channels == 2 * model.config.in_channels


def build_pipeline(args, model, noise_scheduler, vae, images):
    scheduler = DDPMScheduler.from_config(
        noise_scheduler.config,
        variance_type="learned_range" if learns_variance(model) else "fixed_small",
        clip_sample=vae is None,
    )
    pipeline = DTRPipeline(scheduler=scheduler, transformer=model, vae=vae, id2label=images.id2label)
    if args.validation_guidance_scale > 1 and pipeline.null_class is None:
        raise ValueError(
            f"`--validation_guidance_scale` must be 1, got {args.validation_guidance_scale}: without dropped labels "
            "(`--class_dropout_prob`) the model has no null class to be guided away from."
        )
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
    # It announces every file of a checkpoint.
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if args.push_to_hub and accelerator.is_main_process:
        create_run_repo(output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo)

    # 1. Images, and the autoencoder in whose latent space they are learned, if there is one
    images = training.load_images(args, args.label_column)
    vae = load_vae(args)
    if vae is not None:
        vae.requires_grad_(False).eval().to(accelerator.device)
    sample_size = args.resolution // (1 if vae is None else vae_scale_factor(vae))

    # 2. Denoiser, noise schedule and loss
    noise_scheduler = load_noise_scheduler(args)
    torch.manual_seed(args.seed)
    latent_channels = None if vae is None else vae.config.latent_channels
    model = load_transformer(args, noise_scheduler, latent_channels, sample_size, images.num_classes)
    pipeline = build_pipeline(args, model, noise_scheduler, vae, images)
    objective = training.build_objective(args, noise_scheduler, model, accelerator)
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
    held_out = training.held_out_samples(args, images, image_channels, vae, accelerator.device)
    if held_out is not None:
        eighths = cluster_timesteps(noise_scheduler, num_clusters=8, cost="uniform")
        held_out = training.HeldOutLoss(objective.levels, eighths, *held_out)
    micro_batches = accelerator.num_processes * args.gradient_accumulation_steps
    global_batch_size = args.train_batch_size * micro_batches
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(dataset) / global_batch_size)

    # 4. Optimizer, and going on from a checkpoint
    denoiser, optimizer = accelerator.prepare(model, training.build_optimizer(args, model, objective.loss_fn))
    checkpoints = training.Checkpoints(
        accelerator, output_dir, "transformer", model, ema, args.checkpoints_total_limit
    )
    settings = {
        "seed": args.seed,
        "train_batch_size": args.train_batch_size,
        "global_batch_size": global_batch_size,
        "num_images": len(dataset),
    }
    global_step = checkpoints.resume(args.resume_from_checkpoint, settings)
    lr_scheduler = training.build_lr_scheduler(args, optimizer, global_step)
    loader = training.build_loader(args, dataset, accelerator, global_step)
    if accelerator.is_main_process and args.report_to != "none":
        accelerator.init_trackers("class-conditional", config=training.tracker_config(args))

    logger.info(
        f"{len(dataset)} images of {images.num_classes} classes, {model.num_parameters():,} parameters, "
        f"{global_batch_size} images per step, {args.max_train_steps} steps"
    )
    logger.info(f"{objective.clusters}")
    unreadable = training.UnreadableImages()
    monitor = training.LossMonitor(accelerator, len(objective.clusters))
    history = training.LossHistory(output_dir, global_step)
    progress_bar = tqdm(
        total=args.max_train_steps, initial=global_step, desc="Steps", disable=not accelerator.is_local_main_process
    )

    # 5. Train
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
        micro_batch = number * accelerator.num_processes + accelerator.process_index
        training.seed_model(args.seed, micro_batch)
        with accelerator.accumulate(denoiser):
            clean, class_labels = training.clean_samples(batch, vae, args.seed, accelerator.device)
            noise_generator = training.noise_generator(args.seed, micro_batch, accelerator.device)
            noise = torch.randn(clean.shape, generator=noise_generator, device=accelerator.device)
            # One draw for the whole step, of which this is a part
            timesteps = objective.sample_timesteps(
                len(clean), args.seed, global_step, micro_batch % micro_batches, micro_batches, accelerator.device
            )
            noisy = objective.levels.add_noise(clean, noise, timesteps)
            model_input = objective.levels.model_input(noisy, timesteps)
            model_output = denoiser(model_input, timesteps, class_labels).sample
            out = objective.loss_fn(model_output, clean, noise, timesteps, objective.sample_weights(timesteps))
            objective.observe(accelerator, timesteps, out)
            monitor.update(out, global_step + 1)
            accelerator.backward(out.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(denoiser.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        global_step += 1
        lr_scheduler.step()
        progress_bar.update()
        if ema is not None:
            ema.step(model.parameters())
        last = global_step == args.max_train_steps
        checkpoint_due = global_step % args.checkpointing_steps == 0 or last
        if global_step % args.logging_steps == 0 or checkpoint_due:
            losses = monitor.read(checkpoints.latest())
            weights = objective.loss_fn.cluster_weights().tolist()
            learning_rate = lr_scheduler.get_last_lr()[0]
            progress_bar.set_postfix(loss=losses.mean, lr=learning_rate)
            values = {"loss": losses.mean, "lr": learning_rate}
            values |= {f"loss/cluster_{number}": loss for number, loss in enumerate(losses.per_cluster)}
            values |= {f"weight/cluster_{number}": weight for number, weight in enumerate(weights)}
            accelerator.log(values, step=global_step)
            if accelerator.is_main_process:
                history.append(global_step, losses, weights)
        if checkpoint_due:
            checkpoints.save(global_step, settings)
            if accelerator.is_main_process:
                history.save_picture()
        if args.validation_steps is not None and global_step % args.validation_steps == 0 and not last:
            with training.averaged_weights(ema, model):
                validate(args, accelerator, pipeline, held_out, global_step)
    progress_bar.close()

    # 6. Save the pipeline, and share it
    model.set_routing_beta(None)
    if ema is not None:
        ema.copy_to(model.parameters())
    results = validate(args, accelerator, pipeline, held_out, global_step)
    unreadable_images = unreadable.gather()
    if accelerator.is_main_process:
        training.save_pipeline(pipeline, output_dir)
        seconds = time.perf_counter() - start_time
        record = training.run_record(
            args,
            sys.argv,
            accelerator,
            seconds,
            clusters=objective.describe(),
            results=results,
            unreadable_images=unreadable_images,
        )
        training.save_record(record, output_dir)
        logger.info(f"Saved the pipeline in {output_dir}")
        if args.push_to_hub:
            description = (
                "A class-conditional diffusion transformer with Denoising Task Routing, trained for "
                f"{global_step} steps with `{record['command']}`.\n\nThe clusters of timesteps have the boundaries "
                f"{list(objective.clusters.boundaries)}; their balancing is `{args.balancing}`."
            )
            tags = ["diffusers", "diffusers-dtr", "class-conditional-image-generation"]
            save_model_card(output_dir, description, tags, base_model=args.pretrained_model_name_or_path)
            url = push_run(output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo, "End of training")
            logger.info(f"Pushed to {url}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
