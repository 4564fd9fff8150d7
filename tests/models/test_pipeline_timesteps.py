"""The timesteps that pipelines pass: in every family they move the window from its last channels to its first."""

import pytest
import torch
from diffusers import DDIMScheduler, ModelMixin
from timed_pipeline import ends_only
from timed_pipelines import PIPELINES
from tiny_denoisers import build
from tiny_dit import NUM_CLASSES, routed_dit

from diffusers_dtr import DTRPipeline, route


def recorded_windows(model: ModelMixin) -> list[dict[int, set[int]]]:
    """Of every call from now on and every width, where the windows of its samples, frames or tokens begin."""
    calls, compute = [], model.routing.mask

    def mask(timestep: torch.Tensor, width: int) -> torch.Tensor:
        found = compute(timestep, width)
        if width == model.routed_widths[0]:
            calls.append({})
        calls[-1][width] = set(found.flatten(0, -2).int().argmax(-1).tolist())
        return found

    model.routing.mask = mask
    return calls


@pytest.mark.parametrize("pipeline", sorted(PIPELINES))
def test_the_noisiest_step_has_the_last_channels_and_the_cleanest_the_first(pipeline):
    declared = PIPELINES[pipeline]
    model = route(build(declared.denoiser, **declared.config), routing_alpha=1.0, routing_beta=0.5)
    calls = recorded_windows(model)
    declared.run(pipeline, model)
    assert len(calls) >= 2
    for width in model.routed_widths:
        way = width - width // 2
        assert calls[0][width] == {way}
        assert calls[-1][width] == {round(declared.last * way)}


def test_our_own_transformer_and_pipeline_do_as_well():
    model = routed_dit(routing_alpha=1.0, routing_beta=0.5)
    calls = recorded_windows(model)
    pipe = DTRPipeline(ends_only(DDIMScheduler()), transformer=model)
    pipe(class_labels=[NUM_CLASSES - 1], num_inference_steps=500, output_type="latent")
    assert [call[16] for call in calls] == [{8}, {0}]
