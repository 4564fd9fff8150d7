"""What a training script begins with: its folder, its processes, its log."""

from __future__ import annotations

import argparse
import logging

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ..hub import create_run_repo
from .outputs import prepare_output_dir


def start_run(args: argparse.Namespace) -> Accelerator:
    """Make the output folder and the repository, or check a resumed run's, and set up accelerate and logging.

    Args:
        args: Parsed flags.

    Returns:
        The accelerator that everything else is done with.

    Raises:
        ValueError: If a run that does not resume would write into a folder that holds a pipeline or checkpoints.
    """
    output_dir = prepare_output_dir(args.output_dir, resuming=args.resume_from_checkpoint is not None)
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
    return accelerator
