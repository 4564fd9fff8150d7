"""The families of text-to-video models that can be trained, each by what is different about it."""

from __future__ import annotations

from ...latents import frames_per_latent
from .base import DenoiserFamily, TextEmbedding


class VideoFamily(DenoiserFamily):
    """A family of videos, whose clips have so many frames, and so many of them a second."""

    def __init__(self, resolution: int, num_frames: int, frame_rate: float, guidance_scale: float = 3.5):
        super().__init__(resolution, guidance_scale)
        self.num_frames = num_frames
        self.frame_rate = frame_rate

    def latent_size(self, vae):
        return ((self.num_frames - 1) // frames_per_latent(vae) + 1, *super().latent_size(vae))

    def check_size(self, model, vae):
        super().check_size(model, vae)
        span = frames_per_latent(vae)
        if (self.num_frames - 1) % span:
            raise ValueError(f"`--num_frames` must be 1 more than a multiple of {span}, got {self.num_frames}.")

    def size(self):
        return {**super().size(), "num_frames": self.num_frames}


class Wan(VideoFamily):
    """Wan 2.1, and those models of Wan 2.2 that have one denoiser."""

    pipelines = ("WanPipeline",)
    denoiser_class = "WanTransformer3DModel"
    embeddings = (TextEmbedding(0, "prompt_embeds", "encoder_hidden_states"),)
    size_multiple = 16

    def check_pipeline(self, pipeline):
        if pipeline.config.boundary_ratio is not None:
            raise ValueError(
                "`pretrained_model_name_or_path` must have one denoiser, got a pipeline with one of high and one of "
                "low noise (`boundary_ratio`)."
            )


class LTX(VideoFamily):
    """LTX-Video: tokens are latents, told where they lie in seconds and pixels."""

    pipelines = ("LTXPipeline",)
    denoiser_class = "LTXVideoTransformer3DModel"
    embeddings = (
        TextEmbedding(0, "prompt_embeds", "encoder_hidden_states"),
        TextEmbedding(1, "prompt_attention_mask", "encoder_attention_mask"),
    )
    size_multiple = 32

    def denoise(self, pipeline, model, noisy, timesteps, conditions):
        frames, height, width = noisy.shape[2:]
        spatial = pipeline.vae_spatial_compression_ratio
        scale = (pipeline.vae_temporal_compression_ratio / self.frame_rate, spatial, spatial)
        places = {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": scale}
        output = super().denoise(pipeline, model, pipeline._pack_latents(noisy), timesteps, {**conditions, **places})
        return self.unpack(pipeline, output, (frames, height, width))

    def size(self):
        return {**super().size(), "frame_rate": self.frame_rate}

    def unpack(self, pipeline, latents, size):
        return pipeline._unpack_latents(latents, *size)


TEXT_TO_VIDEO_FAMILIES = {name: family for family in (Wan, LTX) for name in family.pipelines}
