"""What a sampling loop must not do at every step: wait for the device, compile again, embed a timestep twice."""

import diffusers
import pytest
import torch
from tiny_dit import routed_dit
from torch._dynamo.utils import counters

from diffusers_dtr import DTRPipeline


SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
)


def make_pipeline(scheduler="DDIMScheduler", **config):
    pipeline = DTRPipeline(getattr(diffusers, scheduler)(**config), transformer=routed_dit())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, num_inference_steps=5, **arguments):
    sampling = {"guidance_scale": 1.5, "output_type": "latent", "num_inference_steps": num_inference_steps}
    return pipeline([1, 2, 3], **sampling, **arguments).images


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [*((scheduler, {}) for scheduler in SCHEDULERS), ("DDPMScheduler", {"variance_type": "learned_range"})],
)
def test_no_step_reads_a_value_from_the_device(scheduler, config):
    # On this device there are no values, and whoever reads one gets an error.
    pipeline = make_pipeline(scheduler, **config).to("meta")
    assert sample(pipeline, guidance_interval=(0.0, 500.0)).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_step_waits_for_a_gpu(scheduler):
    pipeline = make_pipeline(scheduler).to("cuda")

    def forbid_waits(pipeline, step, timestep, tensors):
        torch.cuda.set_sync_debug_mode("error" if step < 4 else "default")
        return {}

    try:
        sample(pipeline, generator=torch.Generator("cuda"), callback_on_step_end=forbid_waits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fifty_compiled_steps_are_one_graph():
    pipeline = make_pipeline("DPMSolverMultistepScheduler")
    expected = sample(pipeline, 50, generator=torch.manual_seed(0))
    torch._dynamo.reset()
    counters.clear()
    pipeline.transformer.compile(backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = sample(pipeline, 50, generator=torch.manual_seed(0))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(found, expected)


def test_a_step_embeds_its_timestep_once_for_the_whole_batch():
    pipeline, rows = make_pipeline(), []
    pipeline.transformer.emb.timestep_embedder.register_forward_hook(lambda *call: rows.append(len(call[2])))
    sample(pipeline)
    assert rows == [1] * 5
