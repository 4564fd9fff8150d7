import sys
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image

from diffusers_dtr.training.validation import log_image


PICTURE = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))


def test_tensorboard_shows_the_picture(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    project = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path))
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_config=project)
    accelerator.init_trackers("run")
    log_image(accelerator, "samples", PICTURE, 7)
    accelerator.end_training()
    (event,) = EventAccumulator(str(tmp_path / "run")).Reload().Images("samples")
    assert (event.step, event.width, event.height) == (7, 4, 3)


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_get_colour_pixels_and_the_step(tracker, monkeypatch):
    """What accelerate's trackers of these names take; the packages themselves want an account or a server."""
    logged = {}

    def log(values, step):
        logged.update(values, step=step)

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda pixels: pixels))
    methods = {"log_images": lambda values, step: log({name: images[0] for name, images in values.items()}, step)}
    accelerator = SimpleNamespace(trackers=[SimpleNamespace(name=tracker, log=log, **methods)])
    log_image(accelerator, "samples", PICTURE, 7)
    assert logged["step"] == 7
    assert np.array_equal(logged["samples"], np.asarray(PICTURE.convert("RGB")))
