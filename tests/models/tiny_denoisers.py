"""Every denoiser of diffusers in a size that takes milliseconds: configurations and inputs of our own."""

from __future__ import annotations

import diffusers
import torch
from diffusers import ModelMixin
from tiny_latent_denoisers import LATENT_DENOISERS
from tiny_packed_denoisers import PACKED_DENOISERS
from tiny_shapes import TinyDenoiser
from tiny_sound_denoisers import SOUND_DENOISERS
from tiny_unets import UNETS
from tiny_video_denoisers import VIDEO_DENOISERS
from tiny_wan_denoisers import WAN_DENOISERS


# Classes that are exported beside the denoisers, and why they are not among them.
LEFT_OUT = {
    "DreamLiteTransformer2DModel": "a part of a U-Net",
    "MiniMaxMusic3RVQDepthDecoder": "autoregressive: no timestep",
    "RFD4ProteinaTransformer": "proteins: two noise levels at once, of coordinates and of latents, in one stream",
    "T5FilmDecoder": "returns logits of a spectrogram, takes its noise level under a name of its own",
    "Transformer2DModel": "a part of U-Nets",
    "TransformerTemporalModel": "a part of U-Nets",
    "WanAnimate2Transformer3DModel": "denoises by compiled flex attention only, from a cache of an earlier call",
}
# Flex attention takes seconds on a CPU, and has no backward there.
FLEX_ATTENTION = {"AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel"}
DENOISERS: dict[str, TinyDenoiser] = {
    **LATENT_DENOISERS,
    **PACKED_DENOISERS,
    **VIDEO_DENOISERS,
    **WAN_DENOISERS,
    **SOUND_DENOISERS,
    **UNETS,
}


def build(name: str, seed: int = 0, **config) -> ModelMixin:
    """The plain model in evaluation mode, with parameters that let the blocks reach the output.

    Many families start with output layers of zeros, and some leave memory as it is. Values in `config` take the place
    of the tiny configuration's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, name)(**{**DENOISERS[name].config, **config})
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
