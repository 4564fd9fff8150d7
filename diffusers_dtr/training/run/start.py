"""What a training script begins with: its folder, its processes, its log."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, ProjectConfiguration, parse_choice_from_env

from ...hub import create_run_repo
from ..config import TrainingConfig
from .folder import check_output_dir, lock_run_folder


def start_run(config: TrainingConfig) -> Accelerator:
    """Make the output folder and the repository, or check a resumed run's, and set up accelerate and logging.

    Raises:
        ValueError: If a run that does not resume would write into a folder that holds a pipeline or checkpoints,
            another process runs in the folder, or a flag and accelerate's configuration give different values for one
            setting.
    """
    output_dir = Path(config.run.output_dir)
    check_output_dir(output_dir, config.run.resume_from_checkpoint)
    accelerator = Accelerator(
        gradient_accumulation_steps=config.run.gradient_accumulation_steps or 1,
        mixed_precision=config.run.mixed_precision,
        log_with=None if config.run.report_to == "none" else config.run.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / config.run.logging_dir),
    )
    agree_with_accelerate(config, accelerator)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            lock_run_folder(output_dir)
        # Where machines do not share their folders
        output_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=logging.INFO if accelerator.is_local_main_process else logging.ERROR,
    )
    # It announces every file of a checkpoint.
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = config.run.allow_tf32
    if config.hub.push_to_hub and accelerator.is_main_process:
        create_run_repo(output_dir, config.hub.hub_model_id, config.hub.hub_token, config.hub.hub_private_repo)
    return accelerator


def agree_with_accelerate(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Settle what flags and accelerate's configuration, environment or DeepSpeed file can decide, or refuse both.

    A DeepSpeed configuration gets the flags' values where it has none of its own.
    """
    if config.run.compile and accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            "`--compile` and the dynamo backend of accelerate's configuration would both compile the model: leave out "
            "the flag, or set `dynamo_backend: no`."
        )
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)  # there only with FSDP
    if config.run.gradient_checkpointing and fsdp is not None and fsdp.activation_checkpointing:
        raise ValueError(
            "`--gradient_checkpointing` and `fsdp_activation_checkpointing` of accelerate's configuration would both "
            "compute activations twice: leave out one of them."
        )
    # accelerate's launcher always sets one: its "no" may stand for none given.
    told = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    precision = accelerator.mixed_precision if told == "no" else told
    if config.run.mixed_precision not in (None, precision):
        raise _disagreement("--mixed_precision", config.run.mixed_precision, precision)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("`--mixed_precision fp16` needs a GPU, got a CPU: use bf16 or no.")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        _agree_with_deepspeed(config, plugin.deepspeed_config)
        steps = plugin.deepspeed_config.get("gradient_accumulation_steps", "auto")
        if steps != "auto":
            accelerator.gradient_accumulation_steps = steps
    steps = accelerator.gradient_accumulation_steps
    if config.run.gradient_accumulation_steps not in (None, steps):
        raise _disagreement("--gradient_accumulation_steps", config.run.gradient_accumulation_steps, steps)


def _agree_with_deepspeed(options: TrainingConfig, config: dict) -> None:
    for name, flag in (("train_micro_batch_size_per_gpu", "train_batch_size"), ("gradient_clipping", "max_grad_norm")):
        value = options.options[flag]
        if config.get(name, "auto") == "auto":
            config[name] = value
        elif config[name] != value:
            raise _disagreement(f"--{flag}", value, f"{config[name]}, as DeepSpeed's `{name}`")


def _disagreement(flag: str, value: object, decided: object) -> ValueError:
    return ValueError(
        f"`{flag}` is {value}, but accelerate's configuration or environment (ACCELERATE_* variables) sets {decided}. "
        "Give it in one place, or the same value in both."
    )
