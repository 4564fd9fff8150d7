"""Plain denoisers of published widths beside their routed ones, with inputs: at what depth and size one likes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch

import diffusers_dtr
from diffusers_dtr import DIT_PRESETS, DTRTransformer2DModel


@dataclass(frozen=True)
class _Size:
    batch: int
    depth: int | None
    divisor: int
    shrink: int

    def layers(self, published: int) -> int:
        return min(published, self.depth or published)

    def width(self, published: int) -> int:
        return max(1, published // self.shrink)

    def side(self, published: int) -> int:
        return max(8, published // self.divisor)

    def image(self, channels: int, side: int) -> torch.Tensor:
        return self.rows(channels, self.side(side), self.side(side))

    def rows(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.batch, *shape)


def dit(model: str, shrink: int = 1) -> dict[str, Any]:
    """The config of a DiT, named and cut like those of [`pair`]; a ValueError for another model."""
    name, depth, divisor = name_and_cuts(model)
    if name not in DIT_PRESETS:
        raise ValueError(f"`--preset` must be one of {', '.join(DIT_PRESETS)}, got {name!r}.")
    return _dit_config(name, _Size(1, depth, divisor, shrink))


def _dit_config(preset: str, size: _Size) -> dict[str, Any]:
    published = DIT_PRESETS[preset]
    layers, heads = size.layers(published["num_layers"]), size.width(published["num_attention_heads"])
    side = {"sample_size": size.side(published["sample_size"])}
    return {**published, "num_layers": layers, "num_attention_heads": heads, **side}


def _dit(preset: str, size: _Size):
    config = _dit_config(preset, size)
    inputs = {"hidden_states": size.rows(4, config["sample_size"], config["sample_size"])}
    return "DiTTransformer2DModel", config, inputs | {"class_labels": torch.randint(1000, (size.batch,))}


def _unet(size: _Size, channels: tuple[int, ...], layers: int = 2, **config) -> dict[str, Any]:
    small = {"block_out_channels": tuple(map(size.width, channels)), "norm_num_groups": size.width(32)}
    return {**small, "layers_per_block": size.layers(layers), **config}


def _ddpm(size):  # google/ddpm-cifar10-32
    down = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up, "attention_head_dim": None}
    config = _unet(size, (128, 256, 256, 256), sample_size=size.side(32), **blocks)
    return "UNet2DModel", config, {"sample": size.image(3, 32)}


def _stable_diffusion(size):
    config = _unet(size, (320, 640, 1280, 1280), cross_attention_dim=768)
    return "UNet2DConditionModel", config, {"sample": size.image(4, 64), "encoder_hidden_states": size.rows(77, 768)}


def _stable_diffusion_xl(size):
    config = _unet(
        size, (320, 640, 1280), cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=tuple(map(size.layers, (1, 2, 10))), addition_time_embed_dim=256,
        attention_head_dim=tuple(map(size.width, (5, 10, 20))), projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    added = {"text_embeds": size.rows(1280), "time_ids": torch.full((size.batch, 6), 1024.0)}
    inputs = {"sample": size.image(4, 128), "encoder_hidden_states": size.rows(77, 2048), "added_cond_kwargs": added}
    return "UNet2DConditionModel", config, inputs


def _pixart(size):  # PixArt-α at 512 pixels
    heads = size.width(16)
    config = {"num_layers": size.layers(28), "num_attention_heads": heads, "cross_attention_dim": 72 * heads}
    inputs = {"hidden_states": size.image(4, 64), "encoder_hidden_states": size.rows(120, 4096)}
    inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return "PixArtTransformer2DModel", config | {"sample_size": size.side(64), "caption_channels": 4096}, inputs


def _sd3(size):  # medium at 512 pixels
    heads = size.width(24)
    config = {"num_layers": size.layers(24), "num_attention_heads": heads, "caption_projection_dim": 64 * heads}
    inputs = {"hidden_states": size.image(16, 64), "encoder_hidden_states": size.rows(154, 4096)}
    inputs["pooled_projections"] = size.rows(2048)
    return "SD3Transformer2DModel", config | {"pos_embed_max_size": 192}, inputs


def _flux(size):  # at 512 pixels
    layers = {"num_layers": size.layers(19), "num_single_layers": size.layers(38)}
    side = size.side(32)
    inputs = {"hidden_states": size.rows(side**2, 64), "encoder_hidden_states": size.rows(128, 4096)}
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
    inputs |= {"pooled_projections": size.rows(768), "img_ids": places, "txt_ids": torch.zeros(128, 3)}
    return "FluxTransformer2DModel", {**layers, "num_attention_heads": size.width(24)}, inputs


def _qwen_image(size):  # at 512 pixels
    side = size.side(32)
    inputs = {"hidden_states": size.rows(side**2, 64), "encoder_hidden_states": size.rows(128, 3584)}
    inputs["encoder_hidden_states_mask"] = torch.ones(size.batch, 128, dtype=torch.bool)
    config = {"num_layers": size.layers(60), "num_attention_heads": size.width(24)}
    return "QwenImageTransformer2DModel", config, inputs | {"img_shapes": [[(1, side, side)]] * size.batch}


def _wan(size):  # 14 billion parameters, 5 frames of 256 pixels
    config = {"num_layers": size.layers(40), "num_attention_heads": size.width(40), "ffn_dim": size.width(13824)}
    inputs = {"hidden_states": size.rows(16, 2, size.side(32), size.side(32))}
    return "WanTransformer3DModel", config, inputs | {"encoder_hidden_states": size.rows(128, 4096)}


_FAMILIES = {"UNet2D": _ddpm, "SD1.5": _stable_diffusion, "SDXL": _stable_diffusion_xl, "PixArt": _pixart}
_FAMILIES |= {"SD3": _sd3, "Flux": _flux, "Qwen-Image": _qwen_image, "Wan": _wan}
DENOISERS = ("DiT-S/4", "DiT-B/2", "DiT-L/2", "DiT-XL/2", *_FAMILIES)
# What pipelines pass is σ and not σ · 1000.
_SIGMA = ("Flux", "Qwen-Image")


def name_and_cuts(model: str) -> tuple[str, int | None, int]:
    """Name, depth (or None) and divisor of NAME, NAME:DEPTH or NAME:DEPTH:DIVISOR; a ValueError for anything else."""
    name, *cuts = model.split(":")
    if (
        name not in (*DIT_PRESETS, *_FAMILIES)
        or len(cuts) > 2
        or not all(cut.isdecimal() and int(cut) for cut in cuts)
    ):
        names = ", ".join((*DIT_PRESETS, *_FAMILIES))
        raise ValueError(
            f"`--models` and `--preset` take NAME, NAME:DEPTH or NAME:DEPTH:DIVISOR, with a name of {names}, got "
            f"{model!r}."
        )
    depth, divisor = [*map(int, cuts), *(None, 1)[len(cuts) :]]
    return name, depth, divisor


def pair(
    model: str, device: str, batch_size: int, shrink: int = 1
) -> tuple[dict[str, diffusers.ModelMixin], dict[str, Any]]:
    """A routed denoiser and the plain one, and the arguments of a forward call.

    `model` is NAME:DEPTH:DIVISOR: at most DEPTH blocks of each kind, and sides of images divided by DIVISOR. All
    widths are divided by `shrink`.
    """
    name, depth, divisor = name_and_cuts(model)
    size = _Size(batch_size, depth, divisor, shrink)
    torch.manual_seed(0)
    class_name, config, inputs = _FAMILIES[name](size) if name in _FAMILIES else _dit(name, size)
    with torch.device(device):
        own = {key: value for key, value in config.items() if key != "freq_shift"}
        plain = getattr(diffusers, class_name)(**own)
        if class_name == "DiTTransformer2DModel":  # which embeds in every block
            routed = DTRTransformer2DModel(**config)
        else:
            routed = getattr(diffusers_dtr, f"DTR{class_name}")(**config)
            routed.load_state_dict(plain.state_dict(), assign=True)
    inputs["timestep"] = torch.linspace(50, 950, batch_size) / (1000 if name in _SIGMA else 1)
    return {"routed": routed.train(), "plain": plain.train()}, _moved(inputs, device)


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    return value.to(device) if torch.is_tensor(value) else value
