"""How a run runs: its folder, steps and precision, its validation, and what it pushes to the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from diffusers.models.attention_dispatch import AttentionBackendName

from .options import Count, NonNegative, Options, Seed, option


# What a run and its pipeline keep in the output folder
_TAKEN_FOLDERS = ("transformer", "unet", "vae", "scheduler", "samples", "figures", "latents", "text_embeddings")
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class RunConfig(Options):
    """The training loop, its checkpoints and its log."""

    _argument_group_name = "run"

    output_dir: str = option(help="Folder of checkpoints, samples and the final pipeline.")
    seed: Seed = option(0, "Seed of everything random in the run.")
    train_batch_size: Count = option(16, "Images per process and forward call.")
    num_train_epochs: Count = option(100, "Used if --max_train_steps is not given.")
    max_train_steps: Count | None = option(None, "Number of optimizer steps.")
    gradient_accumulation_steps: Count | None = option(
        None, "Forward calls per optimizer step. Default what accelerate is configured with, or else 1."
    )
    gradient_checkpointing: bool = option(False, "Save memory by computing activations twice.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "Default accelerate's configuration.")
    allow_tf32: bool = option(False, "Let Ampere and newer GPUs multiply matrices in TF32.")
    compile: bool = option(False, "Compile the model with torch.compile.")
    channels_last: bool = option(False, "Keep convolutions' weights in the layout that GPUs compute them fastest in.")
    attention_backend: Literal[tuple(backend.value for backend in AttentionBackendName)] | None = option(
        None, "Kernel of the denoiser's attention, one of diffusers'. Default torch's choice."
    )
    checkpointing_steps: Count = option(500, "Steps between checkpoints.")
    checkpoints_total_limit: Count | None = option(None, "How many checkpoints to keep.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint's folder, or `latest`.")
    allow_changed_settings: bool = option(
        False, "Resume although flags that define the objective or the data differ from the checkpoint's."
    )
    logging_steps: Count = option(10, "Steps between readings of the loss.")
    logging_dir: str = option("logs", "Folder of the tracker's files inside the output folder.")
    report_to: Literal[(*TRACKERS, "none")] = option("tensorboard", "Where losses and samples go.")
    tracker_project_name: str | None = option(None, "The tracker's project. Default the name of the script.")

    def __post_init__(self):
        super().__post_init__()
        self.effect_only(self.report_to != "none", "on --report_to a tracker", "tracker_project_name")
        if Path(self.logging_dir).parts[:1] in [(name,) for name in _TAKEN_FOLDERS]:
            raise ValueError(f"`--logging_dir` must not be a folder of the result, got {self.logging_dir!r}.")
        if self.report_to in TRACKERS and find_spec(self.report_to) is None:
            raise ValueError(f"`--report_to {self.report_to}` needs the package {self.report_to}: pip install it.")


@dataclass(frozen=True)
class ValidationConfig(Options):
    """Sample grids and the held-out loss."""

    _argument_group_name = "validation"

    validation_steps: Count | None = option(None, "Steps between sample grids. None without it.")
    validation_epochs: Count | None = option(None, "The same in epochs.")
    num_validation_images: Count = option(16, "Images of a grid.")
    max_held_out_images: Count = option(1024, "How many images the held-out loss is of.")
    validation_num_inference_steps: Count = option(50, "Denoising steps of a grid's images.")
    # Of a model that cannot be guided
    validation_guidance_scale = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.validation_epochs is not None and self.validation_steps is not None:
            raise ValueError("At most one of --validation_steps and --validation_epochs can be given.")


@dataclass(frozen=True)
class GuidedValidationConfig(ValidationConfig):
    """Validation of a model whose samples can be guided."""

    validation_guidance_scale: NonNegative = option(1.0, "Guidance of a grid's images; 1: none.")


@dataclass(frozen=True)
class HubConfig(Options):
    """What is pushed to the Hub, and where."""

    _argument_group_name = "Hub"

    push_to_hub: bool = option(False, "Upload the result with its card, samples and logs.")
    hub_model_id: str | None = option(None, "Repository to push to. Default the name of the output folder.")
    hub_token: str | None = option(None, "Token to push with. Default the one of `hf auth login`.")
    hub_private_repo: bool | None = option(
        None, "Make the repository private. Without it, as its owner has new ones.", nargs="?", const=True
    )
    hub_revision: str | None = option(None, "Branch to push to, made if there is none of that name. Default main.")
    hub_create_pr: bool = option(False, "Push the result as a pull request.")
    hub_strategy: Literal["end", "checkpoint"] = option(
        "end", "When to push: at the end, or the latest checkpoint too while training goes on, in the background."
    )

    def __post_init__(self):
        super().__post_init__()
        self.effect_only(self.push_to_hub, "with --push_to_hub", "hub_revision", "hub_create_pr", "hub_strategy")
        if self.hub_create_pr and (self.hub_revision is not None or self.hub_strategy == "checkpoint"):
            raise ValueError("`--hub_create_pr` is for the result alone: leave out --hub_revision and --hub_strategy.")
