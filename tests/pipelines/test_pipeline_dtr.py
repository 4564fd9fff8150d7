"""Sampling: what reaches the denoiser and the scheduler, what comes back, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors import safe_open
from tiny_autoencoders import tiny_vae
from tiny_dit import plain_dit, routed_dit, with_random_weights

from diffusers_dtr import DTRPipeline
from diffusers_dtr.conversion import convert_original_dit


REFERENCE = Path(__file__).parents[1] / "fixtures" / "dtr_dit_tiny.safetensors"

# Images of a batch and of single samples differ by the order in which matrix products are summed.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_dit(make=routed_dit, **config):
    return make(**{"out_channels": 4, "num_embeds_ada_norm": 10, **config})


def make_unet(**config):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    size = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return with_random_weights(UNet2DModel(**{**blocks, **size, "attention_head_dim": 8, **config}))


def make_pipeline(denoiser=None, scheduler=None, **components):
    denoiser = make_dit() if denoiser is None else denoiser
    name = "unet" if isinstance(denoiser, UNet2DModel) else "transformer"
    pipeline = DTRPipeline(scheduler=scheduler or DDIMScheduler(), **{name: denoiser}, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(pipeline, class_labels=(3, 7), seed=0, **arguments):
    """Samples of the denoiser's own space, `(images, channels, height, width)`."""
    defaults = {"num_inference_steps": 4, "generator": seeded(seed), "output_type": "latent"}
    return pipeline(class_labels, **{**defaults, **arguments}).images


def record_inputs(model):
    """The positional and keyword arguments of every call of `model` from now on."""
    calls = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return calls


# ---- schedulers

LEARNED = {"variance_type": "learned_range"}
SCHEDULERS = {
    "DDPM": (DDPMScheduler, {}, {}),
    "DDPM, learned variance": (DDPMScheduler, LEARNED, {"out_channels": 8}),
    "DDPM, learned variance dropped": (DDPMScheduler, {}, {"out_channels": 8}),
    "PNDM": (PNDMScheduler, {}, {}),
    "EulerAncestral": (EulerAncestralDiscreteScheduler, {}, {}),
    "Heun": (HeunDiscreteScheduler, {}, {}),
    "DPMSolver, learned variance": (DPMSolverMultistepScheduler, LEARNED, {"in_channels": 3, "out_channels": 6}),
    "SDE-DPMSolver": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "UniPC": (UniPCMultistepScheduler, {}, {}),
    "EDMEuler": (EDMEulerScheduler, {}, {"routing_timestep_range": (-1.6, 1.1)}),
    "FlowMatchEuler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {}),
}


def documented_loop(scheduler, model, class_labels, steps, generator):
    """Sampling as the schedulers' documentation writes it."""
    labels = torch.tensor(class_labels)
    shape = (len(labels), model.config.in_channels, 8, 8)
    scheduler.set_timesteps(steps)
    latents = torch.randn(shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1)
    is_stochastic = isinstance(scheduler, (DDPMScheduler, EulerAncestralDiscreteScheduler))
    is_stochastic |= scheduler.config.get("algorithm_type") == "sde-dpmsolver++"
    for t in scheduler.timesteps:
        has_scaling = not isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        model_input = scheduler.scale_model_input(latents, t) if has_scaling else latents
        output = model(model_input, t, class_labels=labels).sample
        if not (isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type == "learned_range"):
            output = output[:, : shape[1]]
        latents = scheduler.step(output, t, latents, **({"generator": generator} if is_stochastic else {})).prev_sample
    return latents


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_sampling_equals_the_schedulers_documented_loop_to_the_bit(name):
    scheduler_class, scheduler_config, model_config = SCHEDULERS[name]
    model = make_dit(**model_config)
    expected = documented_loop(scheduler_class(**scheduler_config), model, [3, 7], 4, seeded())
    pipeline = make_pipeline(model, scheduler_class(**scheduler_config))
    assert torch.isfinite(expected).all()
    assert torch.equal(sample(pipeline), expected)
    # The scheduler's state, and its noise level of another number of steps, are gone with the next call.
    sample(pipeline, num_inference_steps=5)
    assert torch.equal(sample(pipeline), expected)


@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_variance_type_left_over_from_the_training_scheduler_cuts_nothing_and_stays(scheduler_class):
    model = make_dit(out_channels=8)
    pipeline = make_pipeline(model, DDPMScheduler(**LEARNED))
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    assert torch.equal(sample(pipeline), sample(make_pipeline(model, scheduler_class())))
    assert pipeline.scheduler.config.variance_type == "learned_range"


# ---- guidance


@torch.no_grad()
def test_the_guided_prediction_equals_the_authors():
    with safe_open(REFERENCE, "pt") as file:
        values, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - no dict
    weights = {key.removeprefix("checkpoint."): value for key, value in values.items() if key.startswith("checkp")}
    routing = {f"routing_{name}": float(metadata[name]) for name in ("alpha", "beta")}
    model = convert_original_dit(weights, int(metadata["num_heads"]), **routing)
    pipeline = make_pipeline(model, DDPMScheduler(**LEARNED))
    inputs = values["cfg_sample"], values["cfg_timestep"], values["cfg_class_labels"]
    guided = pipeline.predict(*inputs, guidance_scale=2.0)
    torch.testing.assert_close(guided, values["cfg_output_scale2"], rtol=0, atol=1e-5)
    # A scheduler without use for the variance gets the first half.
    pipeline.scheduler = DDIMScheduler()
    assert torch.equal(pipeline.predict(*inputs, guidance_scale=2.0), guided[:, :4])


@torch.no_grad()
def test_guidance_leaves_the_variance_of_the_labelled_half():
    model = make_dit(plain_dit, out_channels=8)
    inputs, labels = torch.randn(2, 4, 8, 8, generator=seeded()), torch.tensor([3, 7])
    labelled = model(inputs, torch.tensor([600, 600]), class_labels=labels).sample
    pipeline = make_pipeline(model, DDPMScheduler(**LEARNED))
    guided = pipeline.predict(inputs, torch.tensor(600), labels, guidance_scale=3.0)
    torch.testing.assert_close(guided[:, 4:], labelled[:, 4:], **ROUNDING)


def test_guidance_is_off_at_one_and_outside_a_closed_interval():
    model = make_dit()
    calls = record_inputs(model)
    for scale in (1.0, 0.0):
        assert torch.equal(sample(make_pipeline(model), guidance_scale=scale), sample(make_pipeline(model)))
    assert {len(args[0]) for args, _ in calls} == {2}
    calls.clear()
    pipeline = make_pipeline(model, DDIMScheduler(timestep_spacing="trailing"))
    sample(pipeline, guidance_scale=3.0, guidance_interval=(499, 749))
    evaluated = {int(args[1][0]): len(args[0]) for args, _ in calls}
    assert evaluated == {999: 2, 749: 4, 499: 4, 249: 2}


# ---- labels


@pytest.mark.parametrize(
    ("model", "null_class", "label"),
    [
        (make_dit(), 10, 10),
        (make_dit(plain_dit), 10, 10),
        (make_dit(num_embeds_ada_norm=1, class_dropout_prob=0.0), None, 0),
        (make_unet(num_class_embeds=1), None, 0),
    ],
)
def test_without_labels_the_images_are_those_of_the_null_class_or_the_only_one(model, null_class, label):
    pipeline = make_pipeline(model)
    assert pipeline.null_class == null_class
    assert torch.equal(sample(pipeline, None, num_images=2), sample(pipeline, [label, label]))


@pytest.mark.parametrize("model", [make_dit(num_embeds_ada_norm=None), make_unet()])
def test_an_unconditional_denoiser_gets_no_labels(model):
    pipeline = make_pipeline(model)
    assert pipeline.num_classes is pipeline.null_class is None
    calls = record_inputs(model)
    assert len(sample(pipeline, None)) == 1
    assert len(sample(pipeline, None, num_images=3)) == 3
    assert {kwargs["class_labels"] for _, kwargs in calls} == {None}


@pytest.mark.parametrize("class_embed_type", [None, "timestep"])
def test_a_conditional_unet_gets_its_labels(class_embed_type):
    pipeline = make_pipeline(make_unet(num_class_embeds=10, class_embed_type=class_embed_type))
    assert (pipeline.num_classes, pipeline.null_class) == (10, None)
    latents = torch.randn(1, 3, 8, 8, generator=seeded())
    three, seven = (sample(pipeline, label, latents=latents) for label in (3, 7))
    assert not torch.allclose(three, seven)
    both = sample(pipeline, [7, 3], latents=latents.repeat(2, 1, 1, 1))
    torch.testing.assert_close(both, torch.cat([seven, three]), **ROUNDING)


NAMES = {0: "zero", 3: "three, drei", 4: "vier", 7: "seven", 8: "crane", 9: "crane, bird"}


def test_names_synonyms_and_numbers_of_every_kind_stand_for_the_same_class():
    pipeline = make_pipeline(id2label=NAMES)
    expected = sample(pipeline, [3])
    for label in ("drei", "three", "three, drei", 3, ["drei"], [np.int64(3)], np.array([3]), torch.tensor([3]), (3,)):
        assert torch.equal(sample(pipeline, label), expected)
    assert torch.equal(sample(pipeline, ["seven", 3]), sample(pipeline, [7, 3]))
    assert list(pipeline.labels) == sorted(pipeline.labels)
    assert pipeline.labels["crane"] == [8, 9]
    assert pipeline.get_label_ids("vier") == [4]
    assert pipeline.get_label_ids(["bird", "three, drei"]) == [9, 3]


# ---- outputs


def test_images_come_in_the_asked_form():
    pipeline = make_pipeline(make_dit(in_channels=3, out_channels=3))
    pixels = (sample(pipeline) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(sample(pipeline, output_type="pt"), pixels)
    arrays = sample(pipeline, output_type="np")
    assert np.array_equal(arrays, pixels.permute(0, 2, 3, 1).numpy())
    pictures = sample(pipeline, output_type="pil")
    assert all(isinstance(picture, Image.Image) and picture.mode == "RGB" for picture in pictures)
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), (arrays * 255).round())
    (tensors,) = pipeline([3, 7], generator=seeded(), num_inference_steps=4, output_type="pt", return_dict=False)
    assert torch.equal(tensors, pixels)


@torch.no_grad()
def test_latents_are_decoded_by_the_vae():
    vae = tiny_vae()
    pipeline = make_pipeline(vae=vae)
    latents = sample(pipeline)
    decoded = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(sample(pipeline, output_type="pt"), decoded)
    assert (latents.shape, decoded.shape) == ((2, 4, 8, 8), (2, 3, 16, 16))


def test_height_and_width_are_pixels_of_the_image_and_by_default_those_of_the_denoiser():
    pipeline = make_pipeline(vae=tiny_vae())
    assert sample(pipeline, output_type="pt", height=8, width=24).shape == (2, 3, 8, 24)
    assert sample(pipeline, width=24).shape == (2, 4, 8, 12)
    assert sample(make_pipeline(make_unet(sample_size=(4, 8))), None).shape == (1, 3, 4, 8)
    without_size = make_pipeline(make_unet(sample_size=None))
    assert sample(without_size, None, height=8, width=4).shape == (1, 3, 8, 4)
    assert_refused(without_size, ValueError, "`width` must be given", class_labels=None, height=8)
    squares_alone = make_pipeline(make_dit(plain_dit))
    assert sample(squares_alone, height=12, width=12).shape == (2, 4, 12, 12)
    assert_refused(squares_alone, ValueError, "`height` and `width` must be equal", height=4, width=8)


def test_half_precision_stays_half_precision():
    model = make_dit()
    expected = sample(make_pipeline(model, EulerDiscreteScheduler()))
    pipeline = make_pipeline(model, EulerDiscreteScheduler(), vae=tiny_vae()).to(torch.bfloat16)
    calls = record_inputs(model)
    latents = sample(pipeline, latents=torch.randn(2, 4, 8, 8, generator=seeded()))
    assert latents.dtype == torch.bfloat16
    assert {args[0].dtype for args, _ in calls} == {torch.bfloat16}
    assert sample(pipeline, output_type="np").dtype == np.float32
    # 8 bits of precision, lost in every one of 4 steps
    assert (latents.float() - expected).norm() < 0.1 * expected.norm()


# ---- batches


def test_a_generator_per_image_makes_it_independent_of_its_batch():
    pipeline = make_pipeline(scheduler=DDPMScheduler())
    batch = sample(pipeline, [3, 7, 1], generator=[seeded(seed) for seed in (10, 11, 12)])
    alone = [sample(pipeline, [label], generator=[seeded(seed)]) for label, seed in ((3, 10), (7, 11), (1, 12))]
    torch.testing.assert_close(batch, torch.cat(alone), **ROUNDING)
    assert not torch.allclose(batch, sample(pipeline, [3, 7, 1], generator=seeded(10)))


@pytest.mark.parametrize("max_batch_size", [2, 9])
def test_slices_of_a_batch_give_the_images_of_the_whole(max_batch_size):
    model, vae = make_dit(), tiny_vae()
    pipeline = make_pipeline(model, DDPMScheduler(), vae=vae)
    arguments = {"class_labels": [3, 7, 1, 0, 9], "guidance_scale": 2.0, "output_type": "pt"}
    expected = sample(pipeline, **arguments)
    calls, decoded = record_inputs(model), record_inputs(vae.decoder)
    torch.testing.assert_close(sample(pipeline, **arguments, max_batch_size=max_batch_size), expected, **ROUNDING)
    assert max(len(args[0]) for args, _ in calls) == 2 * min(max_batch_size, 5)
    assert max(len(args[0]) for args, _ in decoded) == min(max_batch_size, 5)


# ---- components in training mode, offloading


def test_a_model_in_training_mode_is_sampled_without_dropping_labels_and_stays_in_it():
    model, vae = make_dit(class_dropout_prob=0.9, dropout=0.5), tiny_vae()
    pipeline = make_pipeline(model, vae=vae)
    expected = sample(pipeline, output_type="pt")
    model.train()
    vae.train()
    assert torch.equal(sample(pipeline, output_type="pt"), expected)
    with pytest.raises(ZeroDivisionError):
        sample(pipeline, callback_on_step_end=lambda *_: 1 / 0)
    assert model.training
    assert vae.training


def offload_sequentially(pipeline, device):
    # `enable_sequential_cpu_offload` without its device `cpu:0`, which accelerate takes for another one than `cpu`.
    for component in (pipeline.transformer, pipeline.vae):
        accelerate.cpu_offload(component, torch.device(device))


def offload_models(pipeline, device):
    pipeline.enable_model_cpu_offload(device=device)


@pytest.mark.parametrize("offload", [offload_models, offload_sequentially])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def test_offloading_changes_no_image_and_can_be_used_again(offload, device):
    pipeline = make_pipeline(vae=tiny_vae()).to(device)
    arguments = {"output_type": "pt", "latents": torch.randn(2, 4, 8, 8, generator=seeded())}
    expected = sample(pipeline, **arguments)
    offload(pipeline.to("cpu"), device)
    for _ in range(2):
        torch.testing.assert_close(sample(pipeline, **arguments), expected, **ROUNDING)


# ---- callback


def test_the_callback_sees_every_step_and_replaces_the_latents():
    pipeline = make_pipeline(scheduler=DDIMScheduler())
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].clone()))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    replaced = sample(pipeline, callback_on_step_end=look)
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep, _ in seen] == pipeline.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], sample(pipeline))
    assert not replaced.any()
    seen.clear()
    arguments = {"callback_on_step_end": lambda *args: seen.append(args[3]), "callback_on_step_end_tensor_inputs": []}
    sample(pipeline, **arguments)
    assert seen == [{}] * 4


# ---- what is refused


def assert_refused(pipeline, error, match, **arguments):
    """`pipeline(**arguments)` raises before the denoiser is called or noise is drawn."""
    calls, state = record_inputs(pipeline.denoiser), torch.get_rng_state()
    with pytest.raises(error, match=match):
        pipeline(**{"class_labels": [3, 7], "num_inference_steps": 2, **arguments})
    assert calls == []
    assert torch.equal(torch.get_rng_state(), state)


NO_NULL_CLASS = {"class_dropout_prob": 0.0}
WRONG_CALLS = [
    ({"class_labels": None}, "`class_labels` must be given", NO_NULL_CLASS),
    ({}, "`class_labels` must be None", {"num_embeds_ada_norm": None}),
    ({"class_labels": [3, 11]}, r"names of classes or numbers in \[0, 9\], got 11", {}),
    ({"class_labels": [10]}, r"numbers in \[0, 9\], got 10", NO_NULL_CLASS),
    ({"class_labels": []}, "at least one image, got 0", {}),
    ({"class_labels": ["owl"]}, "`class_labels` has no class named 'owl'. Known names: bird, ", {}),
    ({"class_labels": "crane"}, r"`class_labels`: 'crane' names the classes \[8, 9\]", {}),
    ({"num_images": 2}, "`num_images`=2 and `class_labels` cannot both", {}),
    ({"guidance_scale": 2.0}, "`guidance_scale` must be 1, got 2.0", NO_NULL_CLASS),
    ({"class_labels": None, "guidance_scale": 2.0}, "needs `class_labels`", {}),
    ({"guidance_interval": (9, 3)}, "`guidance_interval` must be", {}),
    ({"guidance_interval": (9,)}, "`guidance_interval` must be", {}),
    ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0", {}),
    ({"num_inference_steps": 1001}, "`num_inference_steps`.* cannot be larger", {}),
    ({"generator": [seeded()]}, "`generator` must have one generator per image: 2, got 1", {}),
    ({"latents": torch.zeros(2, 4, 8, 9)}, r"`latents` must have shape \(2, 4, 8, 8\)", {}),
    ({"height": 9}, "`height` must be a multiple of 2, got 9", {}),
    ({"width": 0}, "`width` must be a multiple of 2, got 0", {}),
    ({"output_type": "jpg"}, "`output_type` must be one of pil, np, pt, latent, got 'jpg'", {}),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "_tensor_inputs` must be among", {}),
    ({"max_batch_size": 0}, "`max_batch_size` must be at least 1, got 0", {}),
    ({}, "must predict 4 or 8 channels, from 4, .* got 5", {"out_channels": 5}),
]


@pytest.mark.parametrize(("arguments", "match", "config"), WRONG_CALLS, ids=lambda value: str(value)[:40])
def test_wrong_arguments_are_refused_before_any_work(arguments, match, config):
    assert_refused(make_pipeline(make_dit(**config), id2label=NAMES), ValueError, match, **arguments)


def test_a_number_and_a_name_that_looks_like_one_are_told_apart():
    pipeline = make_pipeline(id2label={5: "2", 3: "70", 2: "five"})
    assert torch.equal(sample(pipeline, ["2", 2, "70"]), sample(pipeline, [5, 2, 3]))
    assert_refused(pipeline, ValueError, r"no class named '5'.* number is an int: 5, without quotes", class_labels="5")
    assert_refused(pipeline, ValueError, r"got 70\. The class named '70' is a string", class_labels=70)


def test_what_does_not_fit_the_components_is_refused():
    assert_refused(make_pipeline(), TypeError, "`class_labels` must be integers or names", class_labels=[1.5])
    assert_refused(make_pipeline(), ValueError, "because the pipeline has no `id2label`", class_labels="three")
    learned = make_pipeline(scheduler=DDPMScheduler(**LEARNED))
    assert_refused(learned, ValueError, "must predict 8 channels, from 4, for DDPMScheduler")
    assert_refused(make_pipeline(vae=tiny_vae()), ValueError, "multiple of 4, got 18", width=18)
    own_size = make_pipeline(make_unet(sample_size=7))
    assert_refused(own_size, ValueError, "`height` must be a multiple of 2, got 7", class_labels=None)
    unscaled = make_pipeline(vae=tiny_vae())
    unscaled.vae.register_to_config(scaling_factor=None)
    assert_refused(unscaled, ValueError, "`vae` must have `scaling_factor`")
    assert sample(unscaled, output_type="latent").shape == (2, 4, 8, 8)


@pytest.mark.parametrize("components", [{}, {"transformer": make_dit(), "unet": make_unet()}])
def test_there_is_exactly_one_denoiser(components):
    with pytest.raises(ValueError, match="Exactly one of `transformer` and `unet`"):
        DTRPipeline(scheduler=DDIMScheduler(), **components)


@pytest.mark.parametrize("class_embed_type", ["identity", "timestep"])
def test_a_unet_whose_classes_have_no_numbers_is_refused(class_embed_type):
    with pytest.raises(ValueError, match="`num_class_embeds`"):
        make_pipeline(make_unet(class_embed_type=class_embed_type))
