"""Timesteps of every shape that models take: one for all, one per sample, one per frame or token."""

import pytest
import torch
from tiny_denoisers import build, inputs, run

from diffusers_dtr import route
from diffusers_dtr.models import routed_blocks
from diffusers_dtr.routing import routed_residual, routing_mask


# Per token, per frame, and in the shapes that pipelines pass (image to video, long prompts, video to world).
PER_TOKEN = [
    ("WanTransformer3DModel", (18,)),
    ("ChronoEditTransformer3DModel", (18,)),
    ("LTXVideoTransformer3DModel", (12,)),
    ("LTXVideoTransformer3DModel", (12, 1)),
    ("LTX2VideoTransformer3DModel", (12,)),
    ("SanaVideoTransformer3DModel", (12,)),
    ("SanaVideoTransformer3DModel", (1, 2, 2, 3)),
    ("SanaWMLTX2RefinerTransformer3DModel", (12,)),
    ("AnyFlowTransformer3DModel", (3,)),
    ("SkyReelsV2Transformer3DModel", (3,)),
    ("SanaWMTransformer3DModel", (1, 3)),
    ("CosmosTransformer3DModel", (1, 2, 1, 1)),
]
# Sound has its own, which is the video's by default.
BESIDE = {"LTX2VideoTransformer3DModel": {"audio_timestep": torch.tensor([300.0, 700.0])}}
PER_SAMPLE = [
    ("LTXVideoTransformer3DModel", (1,)),
    ("LTX2VideoTransformer3DModel", (1,)),
    ("SanaVideoTransformer3DModel", (1,)),
    ("Ideogram4Transformer2DModel", (1,)),
]


def applied_masks(monkeypatch) -> list[torch.Tensor]:
    """Masks of all blocks from now on, in the shapes of the streams that they are applied to."""
    masks = []

    def recorded(block, hidden_states, mask, *args, **kwargs):
        masks.append(mask.expand(hidden_states.shape))
        return routed_residual(block, hidden_states, mask, *args, **kwargs)

    monkeypatch.setattr(routed_blocks, "routed_residual", recorded)
    return masks


@pytest.mark.parametrize(("name", "shape"), [*PER_TOKEN, *PER_SAMPLE])
def test_each_token_has_the_window_of_its_own_timestep(name, shape, monkeypatch):
    model = route(build(name), routing_alpha=1.0, routing_beta=0.5)
    (width,), (low, high) = model.routed_widths, model.routing.timestep_range
    timestep = low + (high - low) * torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    masks = applied_masks(monkeypatch)
    with torch.no_grad():
        run(model, {**inputs(name), "timestep": timestep, **BESIDE.get(name, {})})
    assert masks
    for mask in masks:
        tokens = mask.flatten(1, -2)
        per_sample = timestep.flatten(1).repeat_interleave(tokens.shape[1] // timestep[0].numel(), dim=1)
        for found, timesteps in zip(tokens, per_sample, strict=True):
            expected = routing_mask(timesteps, width, alpha=1.0, beta=0.5, timestep_range=(low, high))
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "name", ["UNet2DModel", "UNet2DConditionModel", "UNet3DConditionModel", "UNetMotionModel", "PriorTransformer"]
)
@pytest.mark.parametrize("timestep", [700, torch.tensor(700), torch.tensor([700]), torch.tensor(700).expand(2)])
def test_one_timestep_is_that_of_every_sample(name, timestep):
    model = route(build(name), routing_alpha=1.0, routing_beta=0.5)
    with torch.no_grad():
        found = run(model, {**inputs(name), "timestep": timestep})
        expected = run(model, {**inputs(name), "timestep": torch.tensor([700, 700])})
    torch.testing.assert_close(found, expected)
