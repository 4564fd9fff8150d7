"""One cell of the study: a run, measured at several points with the same noise for every arm."""

import base64
import hashlib
import io
import runpy
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch.utils.data import Dataset

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel, DTRUNet2DModel, NoiseLevels, cluster_timesteps, training
from diffusers_dtr.analysis import frechet_distance
from diffusers_dtr.model_card import save_metrics, save_model_card
from diffusers_dtr.training.config import LabelledDataConfig, RunConfig
from diffusers_dtr.training.data import held_out_samples


HERE = Path(__file__).resolve().parent
MODELS = {"transformer": DTRTransformer2DModel, "unet": DTRUNet2DModel}
# Nobody looks at the run's own grids and logs.
QUIET = {"report_to": "none", "num_validation_images": 1}
BATCH_SIZE = 250


def run_cell(settings, seed, folders, pipeline_dir=None):
    """Train and measure.

    Args:
        settings: Of `cell_settings`.
        seed: Of weights, data order, noise and samples.
        folders: What stands for the names in braces.
        pipeline_dir: A new folder for the trained pipeline and its card; they are not kept by default.

    Returns:
        A JSON object: `points` of the run and what it was. Two of one seed are compared with each other only if they
        agree in `num_parameters`, `first_batch` and the like, which `make_report.py` checks.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = _config(settings, seed, folders, folder)
        images = training.load_images(config)
        noise_scheduler = training.load_noise_scheduler(config)
        torch.manual_seed(seed)
        labels = {} if images.num_classes is None else {"num_embeds_ada_norm": images.num_classes}
        new = settings["denoiser"], settings["model"]
        config, model = training.load_denoiser(config, MODELS, new, noise_scheduler, None, **labels)
        initial_weights = _digest(model.parameters())
        data = training.load_data(config, images, model=model)
        if config.data.center_crop and not config.data.random_flip:
            data = replace(data, dataset=Decoded(data.dataset))
        extractor = settings["measure"]["feature_extractor"].format(**folders)
        extract, features_hash = load_extractor(extractor)
        measurement = Measurement(settings, seed, data, noise_scheduler, extract)
        trainer = MeasuredTrainer(measurement, model, replace(data, held_out=None), config)
        first_batch = _digest([next(iter(trainer.loader))["pixel_values"]])
        start = time.process_time()
        trainer.train()
        record = trainer.finish()
        seconds = time.process_time() - start
        if pipeline_dir is not None:
            features = " ".join(filter(None, (Path(extractor).name, features_hash)))
            _describe(Path(config.run.output_dir), pipeline_dir.parts[-3:], measurement, trainer.points[-1], features)
            shutil.copytree(config.run.output_dir, pipeline_dir, ignore=shutil.ignore_patterns("checkpoint-*"))
    return {
        "settings": settings,
        "seed": seed,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "initial_weights": initial_weights,
        "first_batch": first_batch,
        "features": features_hash,
        "points": trainer.points,
        "samples": measurement.picture,
        "processor_seconds": round(seconds, 1),
        "versions": record["versions"],
        "hardware": record["hardware"],
    }


def check_options(settings, folders):
    """Refuse settings that no cell can be run with."""
    try:
        _config(settings, 0, folders, "")
    except TypeError as error:  # an option that there is none of
        raise ValueError(f"`training` of the settings and `arms`: {error}") from error


def check_task(settings, folders):
    """Refuse data and a network of features that no cell can be run with; the hash of that network."""
    training.load_images(_config(settings, 0, folders, ""))
    return load_extractor(settings["measure"]["feature_extractor"].format(**folders))[1]


def _config(settings, seed, folders, folder):
    options = {**QUIET, **settings["training"], "seed": seed}
    options = {name: value.format(**folders) if isinstance(value, str) else value for name, value in options.items()}
    options["validation_num_inference_steps"] = settings["measure"]["num_inference_steps"]  # the card says them
    options["validation_steps"] = options["max_train_steps"] // settings["measure"]["points"]
    options["checkpointing_steps"] = options["max_train_steps"]
    data = LabelledDataConfig(**{name: options.pop(name) for name in LabelledDataConfig.names() if name in options})
    return training.TrainingConfig(run=RunConfig(output_dir=f"{folder}/run"), data=data).replace(**options)


def _describe(run, cell, measurement, point, features):
    """Let a run's pipeline sample as it was measured, and its card show the last point."""
    DTRPipeline.from_pretrained(run, scheduler=measurement.scheduler).save_pretrained(run)
    (run / "samples").mkdir()
    (run / "samples" / "end.png").write_bytes(base64.b64decode(measurement.picture))
    options = measurement.options
    loss = {"evaluations_per_image": options["evaluations_per_image"], "weights": "exponential moving average"}
    distance = {key: options[key] for key in ("num_samples", "num_inference_steps", "num_reference_images")}
    distance |= {"scheduler": type(measurement.scheduler).__name__, "features": features}
    metrics = [
        {"name": "Held-out denoising loss", "type": "mse", "value": round(point["loss"], 5), "settings": loss},
        {"name": "Fréchet distance", "type": "frechet_distance", "settings": distance}
        | {"value": round(point["frechet_distance"], 3)},
    ]
    save_metrics(run, [{**metric, "dataset": cell[0]} for metric in metrics], sys.argv)
    (run / "README.md").unlink()  # that of the run, which has neither the name nor the figures
    save_model_card(run, name="-".join(cell))


def _digest(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()[:16]


class Decoded(Dataset):
    """Images that are decoded once, because those of all epochs are the same: a third less time for the smallest."""

    def __init__(self, dataset):
        self.dataset, self.samples = dataset, {}

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        epoch, index = item
        if index not in self.samples:
            self.samples[index] = self.dataset[item]
        return {**self.samples[index], "epoch": epoch}


class MeasuredTrainer(training.Trainer):
    """Trains as any other, and measures the averaged weights wherever a run is validated."""

    def __init__(self, measurement, *arguments):
        super().__init__(*arguments)
        self.measurement, self.points = measurement, []

    def validate(self):
        """A point of the run."""
        self.model.eval()
        point = {"step": self.global_step, **self.measurement(self.model, self.accelerator)}
        self.model.train()
        self.points.append(point)
        return {name: value for name, value in point.items() if isinstance(value, float)}


class Measurement:
    """Held-out loss and Fréchet distance of a denoiser, on the same images and noise for all arms."""

    def __init__(self, settings, seed, data, noise_scheduler, extract):
        self.options, self.denoiser, self.seed = settings["measure"], settings["denoiser"], seed
        self.num_classes, self.extract = data.num_classes, extract
        cpu = torch.device("cpu")
        num_held_out = self.options.get("num_held_out_images", len(data.held_out))
        clean, batch = held_out_samples(data.held_out, None, num_held_out, BATCH_SIZE, cpu)
        levels, eighths = NoiseLevels(noise_scheduler), cluster_timesteps(noise_scheduler, 8, cost="uniform")
        times = self.options["evaluations_per_image"]
        self.held_out_loss = training.HeldOutLoss(levels, eighths, clean, batch, times, BATCH_SIZE)
        self.scheduler = DDIMScheduler.from_config(noise_scheduler.config, timestep_spacing="trailing")
        real, _ = held_out_samples(data.dataset, None, self.options["num_reference_images"], BATCH_SIZE, cpu)
        self.real_features = self._features(real / 2 + 0.5)

    def __call__(self, model, accelerator):
        """The point's figures; `picture` is of the latest point."""
        losses = self.held_out_loss(self._denoise(model), accelerator)
        samples = self._sample(model).cpu()
        self.picture = _png(samples[: self.options["sample_images"]])
        return {
            "loss": losses.mean,
            "loss_per_eighth": list(losses.per_cluster),
            "frechet_distance": frechet_distance(self._features(samples), self.real_features),
        }

    def _denoise(self, model):
        def denoise(noisy, timesteps, batch):
            labels = {} if self.num_classes is None else {"class_labels": batch["labels"].to(noisy.device)}
            return model(noisy, timestep=timesteps, **labels, return_dict=False)[0]

        return denoise

    def _sample(self, model):
        pipeline = DTRPipeline(self.scheduler, **{self.denoiser: model})
        pipeline.set_progress_bar_config(disable=True)
        number = self.options["num_samples"]
        what = {"num_images": number}
        if self.num_classes is not None:
            what = {"class_labels": [index % self.num_classes for index in range(number)]}
        return pipeline(
            **what,
            num_inference_steps=self.options["num_inference_steps"],
            generator=torch.Generator().manual_seed(self.seed),
            output_type="pt",
            max_batch_size=BATCH_SIZE,
        ).images

    @torch.no_grad()
    def _features(self, images):
        return torch.cat([self.extract(part) for part in images.split(BATCH_SIZE)])


def load_extractor(name):
    """Features of images, by a function of a file, `file.py:function`, or TorchScript of `train_feature_extractor.py`.

    With the latter comes the hash of the file: it is trained anew elsewhere to other weights. A ValueError for a file
    that is missing or no TorchScript.
    """
    file, python, function = name.partition(".py:")
    if python:
        return runpy.run_path(str(HERE / f"{file}.py"))[function], None
    try:
        network = torch.jit.load(name, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"`--cifar10_features` must be a file of TorchScript, got {name!r}: {error}") from error
    features_hash = hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]
    return lambda images: network((images * 255).round().to(torch.uint8))[0], features_hash


def _png(images):
    """A row of images `(n, channels, height, width)` in [0, 1], as the text of a PNG."""
    row = torch.cat(list((images * 255).round().to(torch.uint8)), dim=-1).permute(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(row.squeeze(-1).numpy()).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
