"""Every denoiser of diffusers in a size that takes milliseconds: configurations and inputs of our own."""

from __future__ import annotations

import diffusers
import torch
from diffusers import ModelMixin
from tiny_image_denoisers import IMAGE_DENOISERS
from tiny_shapes import TinyDenoiser
from tiny_video_denoisers import VIDEO_DENOISERS


DENOISERS: dict[str, TinyDenoiser] = {**IMAGE_DENOISERS, **VIDEO_DENOISERS}


def build(name: str, seed: int = 0) -> ModelMixin:
    """The plain model in evaluation mode, with parameters that let the blocks reach the output.

    Many families start with output layers of zeros, and some leave memory as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, name)(**DENOISERS[name].config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def inputs(name: str, batch: int = 2, seed: int = 0) -> dict:
    """Keyword arguments for `forward`, as the family's pipeline passes them."""
    return DENOISERS[name].inputs(batch, torch.Generator().manual_seed(seed))


def run(model: ModelMixin, inputs: dict) -> torch.Tensor:
    """The image, video or sound that the model predicts."""
    output = model(**inputs)[0]
    return torch.stack(output) if isinstance(output, list) else output
