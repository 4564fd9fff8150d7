"""What a training step must not do: wait for the device."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from run_config import run_config
from tiny_dit import NUM_CLASSES, routed_dit

from diffusers_dtr.training import trainer as module
from diffusers_dtr.training.ema import WeightAverage
from diffusers_dtr.training.engine import Engine
from diffusers_dtr.training.objective import build_objective
from diffusers_dtr.training.pipelines import ClassPipeline
from diffusers_dtr.training.run.losses import LossMonitor
from diffusers_dtr.training.trainer import Trainer


BATCH, STEPS = 4, 3


def batches():
    for number in range(STEPS):
        yield {"latents": torch.randn(BATCH, 4, 8, 8), "labels": torch.arange(BATCH) % NUM_CLASSES}
        if torch.cuda.is_available() and number == 0:  # tables are copied to the device once
            torch.cuda.set_sync_debug_mode("error")


def make_trainer(scheduler, **options):
    """A trainer within its loop, without the folder that it begins with and the results that it ends with."""
    config = run_config(train_batch_size=BATCH, max_train_steps=2 * STEPS, num_clusters=2, **options)
    trainer = object.__new__(Trainer)
    trainer.config, trainer.max_train_steps, trainer.micro_batches = config, config.run.max_train_steps, 1
    trainer.accelerator, trainer.model = Accelerator(), routed_dit(out_channels=4)
    trainer.data, trainer.state = SimpleNamespace(vae=None), SimpleNamespace(global_step=0)
    images = SimpleNamespace(labels=[0], id2label=None, classes=[0, 1])
    trainer.pipeline = ClassPipeline(config, trainer.model, SimpleNamespace(vae=None, images=images))
    trainer.objective = build_objective(config, scheduler, trainer.model, trainer.accelerator)
    trainer.engine = Engine(trainer.accelerator, trainer.model)
    trainer.denoiser, trainer.optimizer = trainer._prepare()
    trainer.ema = WeightAverage(config.ema, trainer.engine)
    trainer.lr_schedulers, trainer.loader = [], batches()
    trainer.monitor = LossMonitor(trainer.accelerator, 2)
    return trainer


@pytest.fixture(params=["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """On the meta device there are no values, and whoever reads one gets an error."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "meta":
        monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
        # It has no generators.
        monkeypatch.setattr(module, "generator_for", lambda *place, device: None)
        monkeypatch.setattr(module, "draw_noise", lambda shape, *_: [torch.empty(shape, device="meta")] * 2)
    yield request.param
    if request.param == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"balancing": "uncertainty", "routing_warmup_steps": 2},
        {"balancing": "continuous_uncertainty", "loss_weighting": "min_snr"},
        {"timestep_sampling": "loss"},
    ],
)
@pytest.mark.parametrize("scheduler", [DDPMScheduler, FlowMatchEulerDiscreteScheduler])
def test_no_step_waits_for_the_device(device, scheduler, options):
    trainer = make_trainer(scheduler(), **options)
    trainer.train()
    assert trainer.global_step == STEPS
    assert trainer.monitor._totals.device.type == device
