"""Pipelines of diffusers around tiny denoisers."""

from __future__ import annotations

from timed_image_pipelines import IMAGE_PIPELINES
from timed_pipeline import TimedPipeline
from timed_video_pipelines import VIDEO_PIPELINES


PIPELINES: dict[str, TimedPipeline] = {**IMAGE_PIPELINES, **VIDEO_PIPELINES}
