"""Pictures for whichever trackers a run reports to."""

from __future__ import annotations

import numpy as np
from accelerate import Accelerator
from PIL import Image


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Send a picture to all trackers of a run.

    Args:
        accelerator: Holds the trackers.
        name: What the tracker calls the picture.
        image: The picture.
        step: Optimizer steps done.
    """
    pixels = np.asarray(image.convert("RGB"))
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            # The only one of diffusers' trackers for which accelerate has no `log_images`.
            import trackio

            tracker.log({name: trackio.Image(pixels)}, step=step)
        else:
            formats = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels[None]}, step=step, **formats)
