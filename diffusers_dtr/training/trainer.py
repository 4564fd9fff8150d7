"""The training loop that all scripts share. A script says what its denoiser is told, and how it is sampled."""

from __future__ import annotations

import logging
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from diffusers import ModelMixin, SchedulerMixin
from tqdm.auto import tqdm

from ..model_card.card import save_model_card
from ..routing import warmed_up_beta
from ..run_record import RUN_CONFIG
from .agreement import check_agreement
from .computation import set_up_computation
from .config import TrainingConfig
from .data.loading import TrainingData, build_loader, clean_samples, stream_states
from .ema import WeightAverage
from .engine import Engine
from .interruption import Interruption
from .noise_schedule import load_noise_scheduler
from .objective import build_objective, draw_noise
from .optimizer import build_lr_scheduler, build_model_optimizer, build_optimizer
from .pipelines import ClassPipeline, TextPipeline
from .randomness import Draw, generator_for, seed_model
from .run.checkpoints import Checkpoints
from .run.folder import save_record, unlock_run_folder
from .run.losses import LossHistory, LossMonitor
from .run.record import describe_model, run_record, tracker_config
from .run.resuming import IMAGES_PER_STEP, RunState, data_settings, run_settings
from .run.sharing import BackgroundPush, push_result, rehearse_sharing, start_background_push
from .run.start import start_run
from .validation import Validation, ends_epochs


logger = logging.getLogger(__name__)

# Clusters that take a machine back give half a minute, as a rule.
_PUSH_SECONDS_WHEN_STOPPED = 20.0


class Trainer:
    """Trains a denoiser as its configuration says, on from a checkpoint where that names one.

    Args:
        model: The denoiser, a routed one. What of it requires gradients is trained.
        data: What it is trained on. A checkpoint of others, or of other names of classes, is refused.
        config: The run's configuration.
        pipeline: What the denoiser is told, and how it is sampled and saved; by default as [`ClassPipeline`] does.
        noise_scheduler: Scheduler that is trained with; by default that of [`load_noise_scheduler`].
        accelerator: Of [`start_run`], by default. `project_name` is what trackers call the run's project.

    Attributes:
        state: Optimizer steps done, and what else a checkpoint tells of the run.
        objective: Clusters, loss and sampling of timesteps.

    Raises:
        ValueError: If options do not fit the model, the data or a checkpoint.
    """

    def __init__(
        self,
        model: ModelMixin,
        data: TrainingData,
        config: TrainingConfig,
        *,
        pipeline: ClassPipeline | TextPipeline | None = None,
        noise_scheduler: SchedulerMixin | None = None,
        accelerator: Accelerator | None = None,
        project_name: str = "diffusers-dtr",
    ):
        self._start_time = time.perf_counter()
        self.accelerator = accelerator = accelerator or start_run(config)
        self.model, self.data, self.output_dir = model, data, Path(config.run.output_dir)
        self.micro_batches = accelerator.num_processes * accelerator.gradient_accumulation_steps
        self.num_images, self.images_per_step = data.num_images, config.run.train_batch_size * self.micro_batches
        # What a run is started again with has what accelerate has decided; fp8 is no option of ours.
        config = config.replace(
            gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
            mixed_precision=None if accelerator.mixed_precision == "fp8" else accelerator.mixed_precision,
        ).with_max_train_steps(self.num_images, self.images_per_step)
        self.config, self.max_train_steps = config, config.run.max_train_steps
        self.noise_scheduler = noise_scheduler or load_noise_scheduler(config)
        check_agreement(config, model, data, self.noise_scheduler)
        self.pipeline = pipeline or ClassPipeline(config, model, data)
        if data.vae is not None:
            # Latents that were made before need its config alone; its weights are loaded where samples are drawn.
            data.vae.to("meta" if getattr(config.data, "latents_dir", None) else accelerator.device)
        self.objective = build_objective(config, self.noise_scheduler, model, accelerator)
        self.engine = Engine(accelerator, model)
        self.validation = Validation(config, self.engine, data, self.pipeline, self.noise_scheduler)
        limit = config.run.checkpoints_total_limit
        self.checkpoints = Checkpoints(self.engine, self.output_dir, self.pipeline.denoiser, limit, self.objective)
        self.state = self._resume()
        self._model_description = describe_model(model)
        self.denoiser, self.optimizer = self._prepare()
        self.ema = WeightAverage(config.ema, self.engine) if config.ema.use_ema else None
        self.checkpoints.restore(self.state, self.ema)
        self.lr_schedulers = [
            build_lr_scheduler(config.optimizer, optimizer, self.max_train_steps, self.global_step)
            for optimizer in (self.optimizer, self.objective.optimizer)
            if optimizer is not None
        ]
        self.loader = build_loader(config, data.dataset, accelerator, self.global_step, self.state.streams)
        self.monitor = LossMonitor(accelerator, len(self.objective.clusters))
        self.history = LossHistory(self.output_dir, self.global_step)
        # Once, in small, all that the end of the run needs: what would fail there fails here.
        self.validation.rehearse()
        if accelerator.is_main_process:
            rehearse_sharing(config.hub, self.output_dir, self._record(results={}))
        # After all that may refuse the run, of which nothing should be left then
        self._background_push = self._start_reporting(project_name)

    def train(self) -> None:
        """Take all steps that are left.

        Raises:
            SystemExit: If SIGINT, SIGTERM or SIGHUP came: after the step that it came in, whose checkpoint is saved,
                and with the code 128 + signal. A second Ctrl-C is a KeyboardInterrupt, at once.
        """
        config, accelerator = self.config, self.accelerator
        silent = not accelerator.is_local_main_process
        progress_bar = tqdm(total=self.max_train_steps, initial=self.global_step, desc="Steps", disable=silent)
        self.model.train()
        first_batch = self.global_step * accelerator.gradient_accumulation_steps
        with progress_bar, Interruption() as interruption:
            for number, batch in enumerate(self.loader, start=first_batch):
                if self.global_step >= self.max_train_steps:
                    break
                self._set_routing()
                with accelerator.accumulate(self.denoiser):
                    self._backward(batch, number)
                    if accelerator.sync_gradients and config.optimizer.max_grad_norm:
                        accelerator.clip_grad_norm_(self.denoiser.parameters(), config.optimizer.max_grad_norm)
                    if accelerator.sync_gradients:
                        self.objective.step(accelerator.scaler)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if accelerator.sync_gradients:
                    self.state.global_step += 1
                    for lr_scheduler in self.lr_schedulers:
                        lr_scheduler.step()
                    if self.ema is not None:
                        self.ema.step()
                    progress_bar.update()
                    signum = interruption.received()
                    self._after_step(progress_bar, stopping=signum is not None)
                    if signum is not None:
                        self._stop(signum)

    def _backward(self, batch: dict[str, Any], number: int) -> None:
        """Loss and gradients of one micro-batch: what a process feeds through the model in one forward call."""
        config, accelerator, objective = self.config, self.accelerator, self.objective
        device = accelerator.device
        micro_batch = number * accelerator.num_processes + accelerator.process_index
        seed_model(config.run.seed, micro_batch)
        clean = clean_samples(batch, self.data.vae, config.run.seed, device)
        conditions = self.pipeline.conditions(batch)
        generator = generator_for(Draw.NOISE, config.run.seed, micro_batch, device=device)
        noise, added = draw_noise(clean.shape, generator, config.noise.noise_offset, config.noise.input_perturbation)
        # One draw for the whole step, of which this is a part
        timesteps = objective.sample_timesteps(
            len(clean), config.run.seed, self.global_step, micro_batch % self.micro_batches, self.micro_batches, device
        )
        noisy = objective.levels.add_noise(clean, added, timesteps)
        model_input = objective.levels.model_input(noisy, timesteps)
        with self.engine.autocast():
            denoise = partial(self.pipeline.denoise, self.denoiser)
            model_output = objective.loss_fn.denoise(denoise, model_input, timesteps, conditions)
        out = objective.loss_fn(model_output, clean, noise, timesteps, objective.sample_weights(timesteps))
        objective.observe(accelerator, timesteps, out)
        self.monitor.update(out, self.global_step + 1)
        accelerator.backward(out.loss)

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self.state.global_step

    def _set_routing(self) -> None:
        warmup_steps, target = self.config.routing.routing_warmup_steps, self.model.config.routing_beta
        beta = warmed_up_beta(self.global_step, warmup_steps, target) if warmup_steps else None
        self.model.set_routing_beta(beta)

    def _after_step(self, progress_bar: tqdm, stopping: bool) -> None:
        step, run = self.global_step, self.config.run
        last = step == self.max_train_steps or stopping
        checkpoint_due = step % run.checkpointing_steps == 0 or last
        if step % run.logging_steps == 0 or checkpoint_due:
            self._log(progress_bar)
        if checkpoint_due:
            self.state.seconds = self._seconds
            self.state.streams = stream_states(self.loader, self.accelerator, step)
            checkpoint = self.checkpoints.save(self.state, self.ema)
            if self._background_push is not None:
                self._background_push.push_checkpoint(checkpoint, step)
            if self.accelerator.is_main_process:
                self.history.save_picture()
        if self._validation_due() and not last:
            with self.engine.computing_with(self._average):
                self.validate()

    def _log(self, progress_bar: tqdm) -> None:
        losses, rate = self.monitor.read(self.checkpoints.latest()), self.lr_schedulers[0].get_last_lr()[0]
        weights = self.objective.loss_fn.cluster_weights().tolist()
        progress_bar.set_postfix(loss=losses.mean, lr=rate)
        values = {"lr": rate, **{f"weight/cluster_{number}": weight for number, weight in enumerate(weights)}}
        self.accelerator.log({**losses.values("loss", "cluster"), **values}, step=self.global_step)
        if self.accelerator.is_main_process:
            self.history.append(self.global_step, losses, weights)

    def _validation_due(self) -> bool:
        options, step = self.config.validation, self.global_step
        if options.validation_epochs is not None:
            return ends_epochs(step, self.images_per_step, self.num_images * options.validation_epochs)
        return options.validation_steps is not None and step % options.validation_steps == 0

    def validate(self) -> dict[str, float]:
        """Measure the held-out loss and draw a sample grid, for the tracker and as a PNG; all processes must call it.

        Returns:
            `validation_loss` and `validation_loss/eighth_<number>`; nothing without held-out images.
        """
        return self.validation(self.global_step)

    def finish(self) -> dict[str, Any]:
        """Save the result with its averaged weights, validate it, share it if asked for, and return its record."""
        self.model.set_routing_beta(None)
        # Before anything that may fail
        with self.engine.whole_model(self._average) as model:
            if model is not None:
                self.pipeline.save(self.output_dir, model)
                self._describe(results={})
                logger.info(f"Saved the result in {self.output_dir}")
        if self._average is not None:
            self.engine.put(self._average)
        results = self.validate()
        record = self._describe(results) if self.accelerator.is_main_process else {}
        # It closes the trackers, whose files are shared too.
        self.accelerator.end_training()
        if self.config.hub.push_to_hub and self.accelerator.is_main_process:
            push_result(self.config.hub, self.output_dir, self._background_push)
        unlock_run_folder(self.output_dir)
        return record

    def _stop(self, signum: int) -> NoReturn:
        """End the run before its end, with all that it needs to go on."""
        if self._background_push is not None:
            self._background_push.finish(_PUSH_SECONDS_WHEN_STOPPED)
        self.accelerator.end_training()
        unlock_run_folder(self.output_dir)
        logger.warning(
            f"Stopped by {signal.Signals(signum).name} after step {self.global_step}. Go on with the same command and "
            "`--resume_from_checkpoint latest`."
        )
        raise SystemExit(128 + signum)

    def _prepare(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        set_up_computation(self.model, self.config.run)
        if self.config.run.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if self.config.run.compile:
            self.engine.compile()
        options = self.config.optimizer
        scale = self.images_per_step if options.scale_lr else 1
        learned = self.objective.loss_fn.parameter_groups()
        self.objective.optimizer = build_optimizer(options, learned, scale) if learned else None
        return self.engine.prepare(build_model_optimizer(options, self.model, scale))

    def _resume(self) -> RunState:
        run, others = self.config.run, {**data_settings(self.data.images), **self.pipeline.settings}
        others |= {**self.objective.settings, IMAGES_PER_STEP: self.images_per_step}
        settings = run_settings(self.config, self.model, self.noise_scheduler, self.accelerator, **others)
        state = self.checkpoints.resume(run.resume_from_checkpoint, settings, run.allow_changed_settings)
        if state.global_step > self.max_train_steps:
            raise ValueError(
                f"`--max_train_steps` must be at least the {state.global_step} steps of the checkpoint, got "
                f"{self.max_train_steps}."
            )
        self._start_time -= state.seconds
        return state

    def _start_reporting(self, project_name: str) -> BackgroundPush | None:
        config = self.config
        logger.info(
            f"{self.num_images or 'A stream of'} images, "
            f"{self._model_description['num_trained_parameters']:,} trained parameters of "
            f"{self._model_description['num_parameters']:,}, {self.images_per_step} images per step, "
            f"{self.max_train_steps} steps, {self.accelerator.num_processes} processes "
            f"({self.accelerator.distributed_type.value})"
        )
        logger.info(f"{self.objective.clusters}")
        if not self.accelerator.is_main_process:
            return None
        config.save(self.output_dir / RUN_CONFIG)
        if config.run.report_to != "none":
            project = config.run.tracker_project_name or project_name
            self.accelerator.init_trackers(project, config=tracker_config(config))
        return start_background_push(config.hub, self.output_dir)

    @property
    def _average(self) -> list[torch.Tensor] | None:
        return None if self.ema is None else self.ema.weights

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._start_time

    def _record(self, **outcome: Any) -> dict[str, Any]:
        return run_record(
            self.config,
            sys.argv,
            self.accelerator,
            self._seconds,
            model=self._model_description,
            **({} if self.num_images is None else {"num_images": self.num_images}),
            clusters={"num_clusters": len(self.objective.clusters), **self.objective.clusters.to_dict()},
            held_out=self.validation.describe(),
            changed_settings=self.state.changes,
            **outcome,
        )

    def _describe(self, results: dict[str, float]) -> dict[str, Any]:
        """Write the record, with the samples that the pipeline itself makes with seed 0, and the model card."""
        record = self._record(results=results, sampling=self.pipeline.sampling)
        save_record(record, self.output_dir)
        save_model_card(self.output_dir, repo_id=self.config.hub.hub_model_id)
        return record
