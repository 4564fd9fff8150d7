"""The declarations: one for every denoiser of diffusers that can be routed.

Text that comes into a block as an argument of its own is not routed. Where a model puts text and image tokens into one
stream, as Z-Image and the single blocks of Flux.2 do, that stream is routed whole: a block sees a window of channels,
and it has one set of weights for both kinds of tokens.

Not declared, because there is no timestep per sample: Cosmos3OmniTransformer and MiniMaxH3Transformer3DModel (samples
packed into one sequence), RFD4ProteinaTransformer (two clocks), AnyFlowFARTransformer3DModel (chunks at different
times, and their cache, in one stream), WanAnimate2Transformer3DModel (a cache filled by calls without noise). Because
blocks are not residual around their input: HunyuanDiT2DModel (a linear layer mixes it with a skip connection first).
Because they are no denoisers: DualTransformer2DModel, Transformer2DModel, TransformerTemporalModel and
DreamLiteTransformer2DModel (parts of U-Nets), T5FilmDecoder, MiniMaxMusic3RVQDepthDecoder.
"""

from __future__ import annotations

from functools import cache
from types import new_class

import diffusers
from diffusers.loaders import PeftAdapterMixin

from .family import OTHER_STREAMS, Family
from .routed_blocks import Stream
from .scoped_model import ScopedRoutingMixin
from .transformer import RoutedTransformerMixin
from .unet import RoutedUNetMixin


# What pipelines pass for a noise level σ of flow matching, at the cleanest and at the noisiest step.
_SIGMA = {"timestep_range": (0.0, 1.0)}
_SIGMA_1000 = {"timestep_range": (0.0, 1000.0)}
_ONE_MINUS_SIGMA = {"timestep_range": (1.0, 0.0)}

_BLOCKS = {"blocks": ["transformer_blocks"]}
_DOUBLE_AND_SINGLE = {"blocks": ["transformer_blocks", "single_transformer_blocks"]}

# Its layers in LTX-2, and embedders of timesteps of which there may be one per sample.
_SOUND = (
    r"\b(audio_(?!to_video_attn)\w+|audio_to_video_attn\.to_[kv]|video_to_audio_attn\.to_(q|out|gate_logits)"
    r"|prompt_adaln|av_cross_attn_\w+)\b"
)

# By class of diffusers.
TRANSFORMERS = {
    "AceStepTransformer1DModel": Family(**_SIGMA, blocks=["layers"], width="hidden_size"),
    "AllegroTransformer3DModel": Family(**_BLOCKS),
    "AnyFlowTransformer3DModel": Family(**_SIGMA_1000),
    "AuraFlowTransformer2DModel": Family(
        **_SIGMA,
        blocks=["joint_transformer_blocks", "single_transformer_blocks"],
        streams={"AuraFlowJointTransformerBlock": 1},
    ),
    "BriaFibo2Transformer2DModel": Family(**_SIGMA, blocks=["noise_refiner", "layers"], width="dim"),
    "BriaFiboTransformer2DModel": Family(**_SIGMA_1000, streams={"BriaFiboTransformerBlock": 1}),
    # diffusers' registry has the text's place for the first of these.
    "BriaTransformer2DModel": Family(
        **_SIGMA_1000, **_DOUBLE_AND_SINGLE, streams={"BriaTransformerBlock": 1, "BriaSingleTransformerBlock": 1}
    ),
    "ChromaTransformer2DModel": Family(**_SIGMA, streams={"ChromaTransformerBlock": 1}),
    "ChronoEditTransformer3DModel": Family(**_SIGMA_1000),
    "CogVideoXTransformer3DModel": Family(**_BLOCKS),
    "CogView3PlusTransformer2DModel": Family(**_BLOCKS, streams={"CogView3PlusTransformerBlock": 0}),
    "CogView4Transformer2DModel": Family(**_SIGMA_1000, **_BLOCKS),
    "ConsisIDTransformer3DModel": Family(**_BLOCKS, streams={"ConsisIDBlock": 0}),
    # ln(σ) / 4 of Cosmos 1, for σ from 0.002 to 80; σ / (1 + σ) of Cosmos 2, and σ of 2.5, which learn no positions.
    "CosmosTransformer3DModel": Family(
        timestep_range=lambda config: (-1.5537, 1.0955) if config["extra_pos_embed_type"] else (0.0, 1.0),
        **_BLOCKS,
        streams={"CosmosTransformerBlock": 0},
    ),
    # Its own embedders in every block, as diffusers has it. DTRTransformer2DModel embeds once.
    "DiTTransformer2DModel": Family(**_BLOCKS),
    "EasyAnimateTransformer3DModel": Family(**_SIGMA_1000, **_BLOCKS, streams={"EasyAnimateTransformerBlock": 0}),
    "ErnieImageTransformer2DModel": Family(
        **_SIGMA_1000, width="hidden_size", streams={"ErnieImageSharedAdaLNBlock": Stream(batch_dim=1)}
    ),
    "Flux2Transformer2DModel": Family(**_SIGMA),
    "Flux3Transformer2DModel": Family(
        **_SIGMA, blocks=["mode_blocks.image", "single_transformer_blocks"], streams={"Flux3SingleTransformerBlock": 1}
    ),
    "FluxTransformer2DModel": Family(**_SIGMA),
    "GlmImageTransformer2DModel": Family(streams={"GlmImageTransformerBlock": 0}),
    "HeliosTransformer3DModel": Family(**_SIGMA_1000),
    "HiDreamImageTransformer2DModel": Family(
        **_SIGMA_1000,
        timestep="timesteps",
        blocks=["double_stream_blocks", "single_stream_blocks"],
        streams={"HiDreamBlock": 0},
        packed=r"\bexperts\b",
    ),
    "HunyuanImageTransformer2DModel": Family(**_SIGMA_1000),
    "HunyuanVideo15Transformer3DModel": Family(
        **_SIGMA_1000, **_BLOCKS, streams={"HunyuanVideo15TransformerBlock": 0}
    ),
    "HunyuanVideoFramepackTransformer3DModel": Family(**_SIGMA_1000, **_DOUBLE_AND_SINGLE),
    "HunyuanVideoTransformer3DModel": Family(**_SIGMA_1000, **_DOUBLE_AND_SINGLE),
    "Ideogram4Transformer2DModel": Family(**_ONE_MINUS_SIGMA),
    "JoyImageEditPlusTransformer3DModel": Family(
        **_SIGMA_1000, width="hidden_size", streams={"JoyImageEditPlusTransformerBlock": 0}
    ),
    "JoyImageEditTransformer3DModel": Family(
        **_SIGMA_1000, width="hidden_size", streams={"JoyImageTransformerBlock": 0}
    ),
    "Kandinsky5Transformer3DModel": Family(**_SIGMA_1000, blocks=["visual_transformer_blocks"], width="model_dim"),
    "Kandinsky6SRTransformer3DModel": Family(**_SIGMA_1000, width="model_dim"),
    "Kandinsky6Transformer3DModel": Family(
        **_SIGMA_1000,
        blocks=["visual_transformer_blocks"],
        streams={"Kandinsky6FusedTransformerDecoderBlock": 0},
        width="model_dim",
    ),
    "Krea2Transformer2DModel": Family(**_SIGMA),
    "LTX2VideoTransformer3DModel": Family(
        **_SIGMA_1000, streams={"LTX2VideoTransformerBlock": 0}, other_streams=f"{OTHER_STREAMS}|{_SOUND}"
    ),
    "LTXVideoTransformer3DModel": Family(**_SIGMA_1000),
    "LatteTransformer3DModel": Family(blocks=["transformer_blocks", "temporal_transformer_blocks"]),
    "LongCatAudioDiTTransformer": Family(**_ONE_MINUS_SIGMA, width="dit_dim"),
    "LongCatImageTransformer2DModel": Family(
        **_SIGMA, streams={"LongCatImageTransformerBlock": 1, "LongCatImageSingleTransformerBlock": 1}
    ),
    "Lumina2Transformer2DModel": Family(**_ONE_MINUS_SIGMA, blocks=["noise_refiner", "layers"], width="hidden_size"),
    "LuminaNextDiT2DModel": Family(**_ONE_MINUS_SIGMA, blocks=["layers"], width="hidden_size"),
    "MiniMaxMusic3Transformer1DModel": Family(**_ONE_MINUS_SIGMA),
    # Its scheduler inverts σ before it is multiplied by 1000.
    "MochiTransformer3DModel": Family(timestep_range=(1000.0, 0.0), **_BLOCKS),
    "MotifVideoTransformer3DModel": Family(**_SIGMA_1000),
    "NucleusMoEImageTransformer2DModel": Family(**_SIGMA),
    "OmniGenTransformer2DModel": Family(**_ONE_MINUS_SIGMA, blocks=["layers"], width="hidden_size"),
    "OvisImageTransformer2DModel": Family(
        **_SIGMA, streams={"OvisImageTransformerBlock": 1, "OvisImageSingleTransformerBlock": 1}
    ),
    "PRXTransformer2DModel": Family(**_SIGMA, blocks=["blocks"], width="hidden_size"),
    "PixArtTransformer2DModel": Family(**_BLOCKS),
    "PriorTransformer": Family(**_BLOCKS),
    "QwenImage21Transformer2DModel": Family(**_SIGMA),
    "QwenImageTransformer2DModel": Family(**_SIGMA),
    "SD3Transformer2DModel": Family(**_SIGMA_1000, **_BLOCKS),
    # σ of Sana Sprint, whose scale is 0.001.
    "SanaTransformer2DModel": Family(
        timestep_range=lambda config: (0.0, 1000.0 * config["timestep_scale"]), **_BLOCKS
    ),
    "SanaVideoTransformer3DModel": Family(**_SIGMA_1000, **_BLOCKS),
    "SanaWMLTX2RefinerTransformer3DModel": Family(**_SIGMA_1000),
    "SanaWMTransformer3DModel": Family(
        **_SIGMA_1000, width="hidden_size", other_streams=r"\b(y_embedder|cross_attn\.kv_linear)\b"
    ),
    "SkyReelsV2Transformer3DModel": Family(**_SIGMA_1000),
    "StableAudio3DiTModel": Family(**_SIGMA, width="embed_dim"),
    "StableAudioDiTModel": Family(**_SIGMA, **_BLOCKS),
    "WanAnimateTransformer3DModel": Family(**_SIGMA_1000),
    "WanTransformer3DModel": Family(**_SIGMA_1000),
    "WanVACETransformer3DModel": Family(**_SIGMA_1000, blocks=["blocks"]),
    "ZImageTransformer2DModel": Family(
        **_ONE_MINUS_SIGMA,
        timestep="t",
        blocks=["noise_refiner", "layers"],
        width="dim",
        packed=r"\b(all_x|cap|siglip)_embedder\b",
    ),
}
UNETS = {
    "I2VGenXLUNet": Family(),
    "UNet2DConditionModel": Family(),
    "UNet2DModel": Family(),
    "UNet3DConditionModel": Family(),
    "UNetMotionModel": Family(),
    # ln(σ) / 4 for σ from 0.002 to 700.
    "UNetSpatioTemporalConditionModel": Family(timestep_range=(-1.5537, 1.6378)),
}


@cache
def routed_class(plain_name: str) -> type[ScopedRoutingMixin]:
    """The routed class of a key of `TRANSFORMERS` or `UNETS`, made when it is first asked for."""
    mixin, families = (RoutedUNetMixin, UNETS) if plain_name in UNETS else (RoutedTransformerMixin, TRANSFORMERS)
    plain = getattr(diffusers, plain_name)
    bases = (mixin, plain) if issubclass(plain, PeftAdapterMixin) else (mixin, plain, PeftAdapterMixin)
    namespace = {
        "__module__": __name__.partition(".")[0],
        "__doc__": f"A [`~diffusers.{plain_name}`] with Denoising Task Routing (arXiv 2310.07138).\n\n"
        "Parameters are those of the base class, and the routing's, as in [`DTRTransformer2DModel`].\n",
    }
    return new_class(f"DTR{plain_name}", bases, {"family": families[plain_name]}, lambda body: body.update(namespace))
