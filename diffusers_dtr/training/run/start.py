"""What a training script begins with: its folder, its processes, its log."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    ProjectConfiguration,
    parse_choice_from_env,
    parse_flag_from_env,
)
from transformers.integrations import unset_hf_deepspeed_config

from ...hub import create_run_repo
from ...objective.balancing import BALANCINGS
from ..computation import check_attention_backend, check_processes
from ..config import TrainingConfig
from ..families.parts import frozen_dtype
from .folder import check_output_dir, lock_run_folder


# Which optimizers the engines know that shard them
_OPTIMIZERS = {DistributedType.FSDP: ("adamw", "muon"), DistributedType.DEEPSPEED: ("adamw",)}
_FLAGS_OF_DEEPSPEED = {"train_micro_batch_size_per_gpu": "train_batch_size", "gradient_clipping": "max_grad_norm"}


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
    check_processes()
    agree_with_accelerate(config, accelerator)
    if config.run.attention_backend is not None:
        check_attention_backend(config.run.attention_backend, accelerator.device, frozen_dtype(accelerator))
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
    _check_engine(config, accelerator)
    # accelerate's launcher always sets one: its "no" may stand for none given.
    told = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    _check_agreement("mixed_precision", config, accelerator.mixed_precision if told == "no" else told)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("`--mixed_precision fp16` needs a GPU, got a CPU: use bf16 or no.")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        given = {name: value for name, value in plugin.deepspeed_config.items() if value != "auto"}
        for name, flag in _FLAGS_OF_DEEPSPEED.items():
            plugin.deepspeed_config[name] = given.get(name, config.options[flag])
            _check_agreement(flag, config, plugin.deepspeed_config[name], f", as DeepSpeed's `{name}`")
        if "gradient_accumulation_steps" in given:
            accelerator.gradient_accumulation_steps = given["gradient_accumulation_steps"]
    _check_agreement("gradient_accumulation_steps", config, accelerator.gradient_accumulation_steps)


def _check_engine(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Refuse what FSDP or DeepSpeed cannot do, and let FSDP2 shard the gradients that it accumulates."""
    balancing = config.objective.balancing
    for engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        asked = parse_flag_from_env(f"ACCELERATE_USE_{engine.value}") and accelerator.num_processes > 1
        if asked and accelerator.distributed_type != engine:
            raise ValueError(
                f"accelerate's configuration asks for {engine.value}, of which accelerate has none on "
                f"{accelerator.device.type}: take examples/accelerate_configs/ddp.yaml there, or a GPU."
            )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("`fsdp_version` of accelerate's configuration must be 2, got 1.")
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    _check_sharing(config, accelerator)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    # Frozen models are whole in every process; transformers would partition them.
    unset_hf_deepspeed_config()
    stage = accelerator.deepspeed_plugin.zero_stage
    if stage not in (1, 2, 3):
        raise ValueError(f"`zero_stage` of accelerate's configuration must be 1, 2 or 3, got {stage}.")
    if balancing not in BALANCINGS:
        raise ValueError(
            f"`--balancing {balancing}` needs the gradients of every cluster by themselves, which DeepSpeed does not "
            "give: use FSDP2 or DistributedDataParallel, or `--balancing uncertainty`."
        )
    if balancing != "uniform" and accelerator.mixed_precision == "fp16":
        raise ValueError(
            f"`--balancing {balancing}` learns from losses that DeepSpeed's fp16 scales: use `--mixed_precision bf16`."
        )


def _check_sharing(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Refuse optimizers, layouts and quantised weights that the processes cannot share out among them."""
    quantize, engine = config.lora.quantize, accelerator.distributed_type
    if quantize in ("bnb_4bit", "bnb_8bit") and accelerator.device.type == "cpu":
        raise ValueError(f"`--quantize {quantize}` needs a GPU, got a CPU: use torchao_int8.")
    if quantize == "torchao_int8" and accelerator.device.type == "cpu" and accelerator.mixed_precision != "no":
        # torchao's layers do not heed autocast, and group norms of a CPU take no inputs of another precision.
        raise ValueError(f"`--quantize {quantize}` is for `--mixed_precision no` on a CPU.")
    if quantize == "torchao_int8" and engine != DistributedType.NO:
        # DistributedDataParallel sends all weights to the other processes, which torchao's cannot be.
        raise ValueError(f"`--quantize {quantize}` is for one process, got several: use bnb_4bit or bnb_8bit.")
    if engine not in _OPTIMIZERS:
        return
    for flag in ("channels_last", "quantize"):
        if config.options[flag]:
            raise ValueError(f"`--{flag}` does not go with FSDP and DeepSpeed, which lay weights out themselves.")
    if config.optimizer.optimizer not in _OPTIMIZERS[engine]:
        allowed = " or ".join(_OPTIMIZERS[engine])
        raise ValueError(f"`--optimizer` must be {allowed} under {engine.value}, got {config.optimizer.optimizer}.")


def _check_agreement(flag: str, config: TrainingConfig, decided: object, source: str = "") -> None:
    value = config.options[flag]
    if value not in (None, decided):
        raise ValueError(
            f"`--{flag}` is {value}, but accelerate's configuration or environment (ACCELERATE_* variables) sets "
            f"{decided}{source}. Give it in one place, or the same value in both."
        )
