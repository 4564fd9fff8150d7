"""The timesteps that pipelines pass: in every family they move the window from its last channels to its first."""

import pytest
import torch
from diffusers import DDIMScheduler, ModelMixin
from diffusers.pipelines.omnigen import pipeline_omnigen
from timed_parts import OmniGenProcessor
from timed_pipeline import ends_only
from timed_pipelines import PIPELINES
from tiny_denoisers import FLEX_ATTENTION, build
from tiny_dit import NUM_CLASSES, routed_dit

from diffusers_dtr import DTRPipeline, route
from diffusers_dtr.models.families import TRANSFORMERS, UNETS


# Families whose pipelines cannot be asked, and how their ranges are known.
NOT_ASKED = {
    "SanaWMLTX2RefinerTransformer3DModel": "refines from a fixed noise level of 0.91 on, told as in LTX-2: σ·1000",
}
slow_on_cpus = [
    pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES if PIPELINES[name].denoiser in FLEX_ATTENTION
]


def recorded_windows(model: ModelMixin) -> list[dict[int, list[int]]]:
    """Where the windows of samples, frames or tokens begin, in order, by width, for every call from now on."""
    calls, compute = [], model.routing.mask

    def mask(timestep: torch.Tensor, width: int) -> torch.Tensor:
        found = compute(timestep, width)
        if width == model.routed_widths[0]:
            calls.append({})
        calls[-1][width] = found.int().argmax(-1).flatten().tolist()
        return found

    model.routing.mask = mask
    return calls


def test_every_family_is_asked():
    asked = {declared.denoiser for declared in PIPELINES.values()}
    assert {*TRANSFORMERS, *UNETS} - asked == NOT_ASKED.keys()


@pytest.mark.parametrize("pipeline", [*sorted(PIPELINES.keys() - {p.values[0] for p in slow_on_cpus}), *slow_on_cpus])
def test_the_noisiest_step_has_the_last_channels_and_the_cleanest_the_first(pipeline, monkeypatch):
    declared = PIPELINES[pipeline]
    if declared.requires is not None:
        pytest.importorskip(declared.requires)
    monkeypatch.setattr(pipeline_omnigen, "OmniGenMultiModalProcessor", OmniGenProcessor, raising=False)
    model = route(build(declared.denoiser, **declared.config), routing_alpha=1.0, routing_beta=0.5)
    calls = recorded_windows(model)
    declared.run(pipeline, model)
    assert len(calls) >= 2
    for width in model.routed_widths:
        way = width - width // 2
        # The first frame is known, so it is clean throughout, and the window stands at its first channels.
        known = {0} if declared.starts_known else set()
        assert set(calls[0][width]) == {way} | known
        assert set(calls[-1][width]) == {round(declared.last * way)} | known
        if declared.starts_known:
            assert calls[0][width][0] == 0


def test_our_own_transformer_and_pipeline_do_as_well():
    model = routed_dit(routing_alpha=1.0, routing_beta=0.5)
    calls = recorded_windows(model)
    pipe = DTRPipeline(ends_only(DDIMScheduler()), transformer=model)
    pipe(class_labels=[NUM_CLASSES - 1], num_inference_steps=500, output_type="latent")
    assert [call[16] for call in calls] == [[8], [0]]
