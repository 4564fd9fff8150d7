"""Pipelines of diffusers around tiny denoisers."""

from __future__ import annotations

from timed_image_pipelines import IMAGE_PIPELINES
from timed_pipeline import TimedPipeline
from timed_sound_pipelines import SOUND_PIPELINES
from timed_unet_pipelines import UNET_PIPELINES
from timed_video_pipelines import VIDEO_PIPELINES


PIPELINES: dict[str, TimedPipeline] = {
    **IMAGE_PIPELINES,
    **UNET_PIPELINES,
    **VIDEO_PIPELINES,
    **SOUND_PIPELINES,
}
