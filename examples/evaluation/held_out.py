"""Held-out denoising loss of a pipeline by cluster of timesteps and by bin of log SNR, of the same noise for all."""

from __future__ import annotations

import math

import torch
from evaluation_data import data_config

from diffusers_dtr import DTRPipeline, NoiseLevels, TimestepClusters, cluster_timesteps, training
from diffusers_dtr.training.data import held_out_samples
from diffusers_dtr.training.families import TEXT_TO_IMAGE_FAMILIES, denoiser_family


def held_out_losses(sampler, images, side, args, accelerator):
    """What measures mean squared errors of the prediction, unweighted, when it is called; all is checked by then.

    Args:
        sampler: Of the pipeline.
        images: The data, with the pipeline's labels.
        side: Resolution of the images.
        args: `pipeline`, `revision`, `num_clusters`, `cluster_cost`, `max_held_out_images` and what names the data.
        accelerator: Its processes share the work.

    Returns:
        A function without arguments, whose result has `mean`, `per_cluster` and `per_log_snr_bin` (each with its
        timesteps and log SNR), and what was drawn.
    """
    pipeline, denoiser = sampler.pipeline, sampler.denoiser
    pretrained = {"pretrained_model_name_or_path": args.pipeline, "revision": args.revision}
    config = data_config(args, args.output_dir, side, args.batch_size, pretrained)
    vae = pipeline.components.get("vae")
    data = training.load_data(config, images, model=denoiser, vae=vae)
    denoiser.eval()
    if isinstance(pipeline, DTRPipeline):
        denoise = _class_denoise(denoiser)
    else:
        denoise = _text_denoise(config, denoiser, data, accelerator)
    clean, batch = held_out_samples(data.held_out, vae, args.max_held_out_images, args.batch_size, accelerator.device)
    measure = _Measure(training.load_noise_scheduler(config), clean, batch, args)

    def losses():
        with torch.autocast(accelerator.device.type, denoiser.dtype, enabled=denoiser.dtype != torch.float32):
            return measure(denoise, accelerator)

    return losses


def _class_denoise(denoiser):
    def denoise(noisy, timesteps, batch):
        labels = {"class_labels": batch["labels"].to(noisy.device)} if "labels" in batch else {}
        return denoiser(noisy, timestep=timesteps, **labels, return_dict=False)[0]

    return denoise


def _text_denoise(config, denoiser, data, accelerator):
    family = denoiser_family(config, TEXT_TO_IMAGE_FAMILIES)
    family.resolution = config.data.resolution
    text = training.TextPipeline(config, family, denoiser, data, accelerator)
    return lambda noisy, timesteps, batch: text.denoise(denoiser, noisy, timesteps, text.conditions(batch))


class _Measure:
    """The loss over the pieces between the edges of both axes, of which each axis adds up its own."""

    def __init__(self, scheduler, clean, batch, args):
        self.levels = NoiseLevels(scheduler)
        bins = cluster_timesteps(scheduler, args.num_clusters, cost="uniform")  # log SNR falls from step to step
        clusters = cluster_timesteps(scheduler, args.num_clusters, cost=args.cluster_cost)
        self.axes = {"per_cluster": clusters, "per_log_snr_bin": bins}
        edges = sorted({*bins.boundaries, *clusters.boundaries})
        pieces = TimestepClusters(edges, clusters.timesteps)
        times = math.ceil(args.num_clusters * 8 / len(clean))
        self.measure = training.HeldOutLoss(self.levels, pieces, clean, batch, times, args.batch_size)
        self.counts = torch.bincount(pieces.assign(self.measure.timesteps), minlength=len(pieces)).double()

    def __call__(self, denoise, accelerator):
        losses = self.measure(denoise, accelerator)
        # A piece may be so narrow that no sample falls into it
        sums = torch.tensor(losses.per_cluster, dtype=torch.float64).where(self.counts > 0, 0) * self.counts
        if not sums.isfinite().all():
            raise FloatingPointError("The held-out loss is not finite: the pipeline's predictions are not.")
        starts = torch.tensor(self.measure.clusters.boundaries[:-1])
        report = {"mean": losses.mean, **self.measure.describe()}
        for name, axis in self.axes.items():
            inside = [(starts >= part.start) & (starts < part.stop) for part in axis]
            report[name] = [
                {"loss": (sums[mask].sum() / self.counts[mask].sum()).item(), **self._range(part)}
                for part, mask in zip(axis, inside, strict=True)
            ]
        return report

    def _range(self, part):
        ends = self.levels.timesteps[[part.start, part.stop - 1]]
        log_snr = self.levels.log_snr(ends).tolist()
        finite = [value if math.isfinite(value) else None for value in log_snr]  # JSON has no infinity
        return {"timesteps": ends.tolist(), "log_snr": finite[::-1]}
