"""What two processes do alike: one sample of a pipeline of diffusers, and its digest."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline


ARGUMENTS = {
    "prompt": "a cat",
    "class_labels": [1, 2],
    "num_inference_steps": 2,
    "height": 8,
    "width": 8,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
    "use_resolution_binning": False,
    "output_type": "np",
}


def images(pipeline: DiffusionPipeline, **more: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    accepted = inspect.signature(pipeline.__call__).parameters
    arguments = {name: value for name, value in ARGUMENTS.items() if name in accepted}
    found = pipeline(**arguments, **more, generator=torch.Generator().manual_seed(0)).images
    return torch.from_numpy(found)


def sample(pipeline: DiffusionPipeline) -> str:
    return hashlib.sha256(images(pipeline).numpy().tobytes()).hexdigest()
