"""The families of text-to-image models that can be trained, each by what is different about it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from ...latents import LatentNormalization
from .base import DenoiserFamily, TextEmbedding


_PROMPT = TextEmbedding(0, "prompt_embeds", "encoder_hidden_states")
_MASK = TextEmbedding(1, "prompt_attention_mask", "encoder_attention_mask")
# Where the empty prompt of guidance is encoded otherwise than a prompt.
_PROMPT_AND_NEGATIVE = TextEmbedding(0, "prompt_embeds", "encoder_hidden_states", 2)
_MASK_AND_NEGATIVE = TextEmbedding(1, "prompt_attention_mask", "encoder_attention_mask", 3)

# All of attention, where text has projections of its own.
_JOINT_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

# The single blocks' `to_out` is a layer, that of the others a list of layers.
_FLUX_2_LAYERS = (
    *(*_JOINT_ATTENTION, "to_qkv_mlp_proj"),
    *(f"single_transformer_blocks.{number}.attn.to_out" for number in range(48)),
)

# Flow matching denoisers are told σ where pipelines count timesteps σ · 1000.
_SIGMA_1000 = 1000


class StableDiffusion(DenoiserFamily):
    """Stable Diffusion 1 and 2."""

    pipelines = ("StableDiffusionPipeline",)
    denoiser_class = "UNet2DConditionModel"
    embeddings = (_PROMPT,)
    denoiser = "unet"
    max_sequence_length = False


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL, told the size of an image before training, its crop, and its size in training."""

    pipelines = ("StableDiffusionXLPipeline",)
    embeddings = (
        TextEmbedding(0, "prompt_embeds", "encoder_hidden_states", 1),
        TextEmbedding(2, "pooled_prompt_embeds", "text_embeds", 3),
    )

    def conditions(self, pipeline, rows, batch):
        told = super().conditions(pipeline, rows, batch)
        pooled = told.pop("text_embeds")
        sizes = torch.cat([batch["original_size"], batch["crop_top_left"], self.last_of_sizes(batch)], dim=1)
        return {**told, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.to(pooled, non_blocking=True)}}

    def last_of_sizes(self, batch):
        """What comes after size and crop, `(batch, ...)`."""
        return batch["target_size"]


class StableDiffusionXLRefiner(StableDiffusionXL):
    """The refiner of Stable Diffusion XL, told an aesthetic score: its pipeline's of prompts and negative prompts."""

    pipelines = ("StableDiffusionXLImg2ImgPipeline",)

    def last_of_sizes(self, batch):
        return torch.tensor([[2.5 if caption == "" else 6.0] for caption in batch["caption"]])

    def size(self):
        return {"strength": 1.0}

    def start(self, pipeline, count):  # it goes on from an image: here from nothing of it
        side = self.resolution // pipeline.vae_scale_factor
        return {"image": torch.zeros(count, pipeline.unet.config.in_channels, side, side)}


class PixArt(DenoiserFamily):
    """PixArt-α and PixArt-Σ."""

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    denoiser_class = "PixArtTransformer2DModel"
    embeddings = (_PROMPT, _MASK)
    takes_variance = True
    # Else the images would be of a size that the pipeline prefers.
    sample_options: ClassVar = {"use_resolution_binning": False}

    def conditions(self, pipeline, rows, batch):
        text = rows["prompt_embeds"]
        resolution = batch["target_size"].to(text, non_blocking=True)
        size = {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}
        return {**super().conditions(pipeline, rows, batch), "added_cond_kwargs": size}


class StableDiffusion3(DenoiserFamily):
    """Stable Diffusion 3 and 3.5."""

    pipelines = ("StableDiffusion3Pipeline",)
    denoiser_class = "SD3Transformer2DModel"
    embeddings = (_PROMPT, TextEmbedding(2, "pooled_prompt_embeds", "pooled_projections"))
    lora_layers = tuple(f"attn.{layer}" for layer in _JOINT_ATTENTION)


class TokenFamily(DenoiserFamily):
    """A family whose denoiser is told σ, and where every token of an image and a text lies."""

    def denoise(self, pipeline, model, noisy, timesteps, conditions):
        told = {**conditions, **self.places(pipeline, noisy, conditions)}
        if pipeline.transformer.config.guidance_embeds:  # distilled from guided predictions
            told["guidance"] = noisy.new_full((len(noisy),), self.guidance_scale, dtype=torch.float32)
        output = model(self.pack(pipeline, noisy), timestep=timesteps / _SIGMA_1000, **told, return_dict=False)[0]
        return self.unpack(pipeline, output, noisy.shape[2:])

    def places(self, pipeline, noisy, conditions):
        """The denoiser's arguments that tell where tokens lie."""
        raise NotImplementedError

    def pack(self, pipeline, noisy):
        """Tokens `(batch, tokens, channels)` of latents."""
        return pipeline._pack_latents(noisy, *noisy.shape)

    def unpack(self, pipeline, latents, size):
        unpacked = pipeline._unpack_latents(latents, *size, vae_scale_factor=1)
        return unpacked.reshape(len(latents), -1, *size)  # without the one frame that some have

    def guidance(self, scale):  # of pipelines that are guided only if they are given a negative prompt
        return {"true_cfg_scale": scale, **({"negative_prompt": ""} if scale > 1 else {})}


class Flux(TokenFamily):
    """Flux.1: tokens of 2×2 latents and their places."""

    pipelines = ("FluxPipeline",)
    denoiser_class = "FluxTransformer2DModel"
    embeddings = (_PROMPT, TextEmbedding(1, "pooled_prompt_embeds", "pooled_projections"))
    lora_layers = _JOINT_ATTENTION
    packing = 2

    def places(self, pipeline, noisy, conditions):
        batch, _, height, width = noisy.shape
        places = pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype)
        return {"img_ids": places, "txt_ids": noisy.new_zeros(conditions["encoder_hidden_states"].shape[1], 3)}

    def guidance(self, scale):
        return {**super().guidance(scale), "guidance_scale": self.guidance_scale}


class Flux2(TokenFamily):
    """Flux.2 [dev], which cannot be guided by a negative prompt: tokens are what its autoencoder normalises."""

    pipelines = ("Flux2Pipeline",)
    denoiser_class = "Flux2Transformer2DModel"
    embeddings = (_PROMPT,)
    lora_layers = _FLUX_2_LAYERS
    guided = False

    def places(self, pipeline, noisy, conditions):
        text_places = pipeline._prepare_text_ids(conditions["encoder_hidden_states"])
        return {
            "img_ids": pipeline._prepare_latent_ids(noisy).to(noisy.device, non_blocking=True),
            "txt_ids": text_places.to(noisy.device, non_blocking=True),
        }

    def pack(self, pipeline, noisy):
        return pipeline._pack_latents(noisy)

    def guidance(self, scale):
        return {"guidance_scale": self.guidance_scale}

    def unpack(self, pipeline, latents, size):
        return latents.transpose(1, 2).unflatten(2, size)


class Flux2Klein(Flux2):
    """Flux.2 [klein]; its base models can be guided by a negative prompt."""

    pipelines = ("Flux2KleinPipeline",)
    guided = True

    def guidance(self, scale):
        return {"guidance_scale": scale}

    def sampled(self, pipeline, latents, size):  # those that are decoded
        return LatentNormalization.from_vae(pipeline.vae).normalize(pipeline._patchify_latents(latents))


class QwenImage(TokenFamily):
    """Qwen-Image: tokens of 2×2 latents, and texts of their own lengths."""

    pipelines = ("QwenImagePipeline",)
    denoiser_class = "QwenImageTransformer2DModel"
    embeddings = (_PROMPT, TextEmbedding(1, "prompt_embeds_mask", "encoder_hidden_states_mask"))
    lora_layers = _JOINT_ATTENTION
    packing = 2

    def encode(self, pipeline, texts, device, options):
        rows, mask = super().encode(pipeline, texts, device, options).values()
        lengths = [rows.shape[1]] * len(rows) if mask is None else mask.sum(1)
        return {"prompt_embeds": [row[:length] for row, length in zip(rows, lengths, strict=True)]}

    def batch(self, rows):
        rows = rows["prompt_embeds"]
        mask = pad_sequence([row.new_ones(len(row), dtype=torch.long) for row in rows], True)
        alike = len({len(row) for row in rows}) == 1
        return {"prompt_embeds": pad_sequence(rows, True), "prompt_embeds_mask": None if alike else mask}

    def places(self, pipeline, noisy, conditions):
        return {"img_shapes": [[(1, noisy.shape[2] // 2, noisy.shape[3] // 2)]] * len(noisy)}

    def out_channels(self, channels):
        return channels


class ZImage(DenoiserFamily):
    """Z-Image: lists of images and of texts of their own lengths; told 1 − σ, it predicts clean − noise."""

    pipelines = ("ZImagePipeline",)
    denoiser_class = "ZImageTransformer2DModel"
    embeddings = (TextEmbedding(0, "prompt_embeds", "cap_feats"),)
    size_multiple = 16

    def denoise(self, pipeline, model, noisy, timesteps, conditions):
        images = [*noisy.unsqueeze(2)]
        output = model(images, t=1 - timesteps / _SIGMA_1000, **conditions, return_dict=False)[0]
        return -torch.stack(output).squeeze(2)

    def guidance(self, scale):
        return {"guidance_scale": scale - 1}


class Sana(DenoiserFamily):
    """Sana: prompts come after an instruction, the negative prompt does not."""

    pipelines = ("SanaPipeline",)
    denoiser_class = "SanaTransformer2DModel"
    embeddings = (_PROMPT_AND_NEGATIVE, _MASK_AND_NEGATIVE)
    size_multiple = 32
    sample_options: ClassVar = {"use_resolution_binning": False}

    def denoise(self, pipeline, model, noisy, timesteps, conditions):
        timesteps = timesteps * pipeline.transformer.config.timestep_scale
        return super().denoise(pipeline, model, noisy, timesteps, conditions)


class Lumina2(DenoiserFamily):
    """Lumina Image 2: only prompts come after a system prompt; told 1 − σ, it predicts clean − noise."""

    pipelines = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")
    denoiser_class = "Lumina2Transformer2DModel"
    embeddings = (_PROMPT_AND_NEGATIVE, _MASK_AND_NEGATIVE)
    size_multiple = 16

    def denoise(self, pipeline, model, noisy, timesteps, conditions):
        return -super().denoise(pipeline, model, noisy, 1 - timesteps / _SIGMA_1000, conditions)


_FAMILIES = (
    *(StableDiffusion, StableDiffusionXL, StableDiffusionXLRefiner, PixArt, StableDiffusion3),
    *(Flux, Flux2, Flux2Klein, QwenImage, ZImage, Sana, Lumina2),
)
# By the class of the pipeline. Its name alone: importing the classes would import the models of transformers.
TEXT_TO_IMAGE_FAMILIES = {name: family for family in _FAMILIES for name in family.pipelines}
