"""The schedulers of a run: what it trains with, and what its result is sampled with."""

import logging

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from pretrained_pipelines import saved
from run_config import run_config

from diffusers_dtr import NoiseLevels
from diffusers_dtr.training import load_noise_scheduler
from diffusers_dtr.training.noise_schedule import sampling_scheduler


def settings(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def tuned(folder, scheduler, **options):
    """The configuration of a run from a pipeline with this scheduler."""
    return run_config(pretrained_model_name_or_path=saved(folder, scheduler), **options)


def result_of(config, latents=False):
    load_noise_scheduler(config)
    return sampling_scheduler(config, latents=latents)


def test_training_noises_as_the_pretrained_pipeline_was_trained(tmp_path):
    sampler = EulerDiscreteScheduler(beta_schedule="scaled_linear", num_train_timesteps=500)  # variance exploding
    config = tuned(tmp_path, sampler, prediction_type="v_prediction")
    scheduler = load_noise_scheduler(config)
    assert type(scheduler) is DDPMScheduler
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.num_train_timesteps == 500
    assert scheduler.config.prediction_type == "v_prediction"


def test_flow_matching_stays_flow_matching(tmp_path):
    config = tuned(tmp_path, FlowMatchEulerDiscreteScheduler(shift=3.0))
    for scheduler in (load_noise_scheduler(config), sampling_scheduler(config, latents=False)):
        assert type(scheduler) is FlowMatchEulerDiscreteScheduler
        assert scheduler.config.shift == 3.0
    for name, value in (("prediction_type", "epsilon"), ("learn_sigma", True)):
        with pytest.raises(ValueError, match=f"`--{name}` must be left out: .* flow matching"):
            load_noise_scheduler(config.replace(**{name: value}))


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon"),
    ],
    ids=["EDM", "continuous", "flow of noise"],
)
def test_noise_levels_that_training_would_not_have_are_refused(tmp_path, scheduler):
    with pytest.raises(ValueError, match=f"`pretrained_model_name_or_path` .* got a {type(scheduler).__name__}"):
        load_noise_scheduler(tuned(tmp_path, scheduler))


@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_flow_matching_is_trained_with_the_shift_that_its_solver_samples_with(tmp_path, solver):
    original = solver(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    config = tuned(tmp_path, original)
    scheduler = load_noise_scheduler(config)
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    torch.testing.assert_close(NoiseLevels(scheduler).timesteps, NoiseLevels(original).timesteps)
    assert scheduler.config.shift == 3.0
    assert settings(sampling_scheduler(config, latents=True)) == settings(original)


# ---- what the result is sampled with

UNUSUAL = [
    DDPMScheduler(variance_type="fixed_large", clip_sample=False),
    DDPMScheduler(thresholding=True, clip_sample=False, sample_max_value=1.5, timestep_spacing="trailing"),
    DDPMScheduler(variance_type="learned_range", steps_offset=1),
    DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
    PNDMScheduler(skip_prk_steps=True, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, solver_order=3),
    EulerDiscreteScheduler(timestep_spacing="trailing", interpolation_type="log_linear"),
    FlowMatchHeunDiscreteScheduler(shift=3.0),
]


@pytest.mark.parametrize("scheduler", UNUSUAL, ids=lambda scheduler: type(scheduler).__name__)
def test_class_and_config_that_no_flag_asks_for_stay(tmp_path, scheduler):
    result = result_of(tuned(tmp_path, scheduler))
    assert type(result) is type(scheduler)
    assert settings(result) == settings(scheduler)


def test_flags_change_what_they_name_and_nothing_else(tmp_path):
    before = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    given = {"prediction_type": "v_prediction", "noise_schedule": "squaredcos_cap_v2"}
    result = result_of(tuned(tmp_path, before, **given))
    changed = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}
    assert settings(result) == {**settings(before), **changed}


def test_variance_that_is_learned_by_a_flag_is_sampled_with(tmp_path):
    for source in ({"pretrained_model_name_or_path": saved(tmp_path, DDPMScheduler())}, {}):
        assert result_of(run_config(**source, learn_sigma=True)).config.variance_type == "learned_range"


@pytest.mark.parametrize("latents", [True, False])
def test_new_model_is_sampled_by_ddpm_and_pixels_are_clipped(latents):
    result = result_of(run_config(), latents)
    assert (type(result), result.config.clip_sample) == (DDPMScheduler, not latents)


def test_schedule_that_the_samplers_class_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`--noise_schedule` must be one of DDIMScheduler's: sigmoid"):
        load_noise_scheduler(tuned(tmp_path, DDIMScheduler(), noise_schedule="sigmoid"))


@pytest.mark.parametrize("given", [{"noise_schedule": "linear"}, {"num_train_timesteps": 10}])
def test_betas_that_were_set_one_by_one_are_not_overruled(tmp_path, given):
    betas = torch.linspace(0.01, 0.9, 20).tolist()
    original = DDPMScheduler(num_train_timesteps=20, beta_schedule="scaled_linear", trained_betas=betas)
    config = tuned(tmp_path, original)
    assert load_noise_scheduler(config).betas.tolist() == pytest.approx(betas)
    with pytest.raises(ValueError, match=r"must be left out: .* `trained_betas`"):
        load_noise_scheduler(config.replace(**given))


# ---- other numbers of timesteps


def noisiest(scheduler):
    levels = NoiseLevels(scheduler)
    return levels.alpha(levels.timesteps[-1:]).item()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("num_timesteps", [2, 20, 1000, 4000])
def test_noisiest_sample_is_noise_for_every_number_of_timesteps(schedule, num_timesteps):
    scheduler = load_noise_scheduler(run_config(noise_schedule=schedule, num_train_timesteps=num_timesteps))
    assert noisiest(scheduler) < 0.1
    assert scheduler.betas.max() < 1


def test_fewer_timesteps_of_a_pretrained_schedule_span_the_same_noise_levels(tmp_path):
    before = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    config = tuned(tmp_path, before, num_train_timesteps=100)
    result = sampling_scheduler(config, latents=True)
    assert noisiest(result) == pytest.approx(noisiest(before), rel=0.1)
    assert (result.config.beta_start, result.config.beta_end) == pytest.approx((0.0085, 0.12))


def test_schedule_that_leaves_an_image_is_refused_when_asked_for_and_named_when_found(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"noisiest of the 1 timesteps 0\.95 .* more `--num_train_timesteps`"):
        load_noise_scheduler(run_config(num_train_timesteps=1))
    with caplog.at_level(logging.WARNING):
        scheduler = load_noise_scheduler(tuned(tmp_path, DDPMScheduler(num_train_timesteps=100)))
    assert settings(scheduler) == settings(DDPMScheduler(num_train_timesteps=100))
    assert "noisiest of the 100 timesteps 0.60 of the image is left" in caplog.text


# ---- steps of validation


@pytest.mark.parametrize("of_pretrained", [True, False])
def test_more_validation_steps_than_timesteps_are_refused(tmp_path, of_pretrained):
    config = tuned(tmp_path, DPMSolverMultistepScheduler()) if of_pretrained else run_config()
    for steps in (1, 20):
        result_of(config.replace(num_train_timesteps=20, validation_num_inference_steps=steps))
    with pytest.raises(ValueError, match=r"`--validation_num_inference_steps` must be at most the 20 .*, got 21"):
        result_of(config.replace(num_train_timesteps=20, validation_num_inference_steps=21))


def test_validation_steps_that_an_offset_pushes_out_of_the_schedule_are_refused(tmp_path):
    scheduler = DDIMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2", steps_offset=1)
    config = tuned(tmp_path, scheduler, validation_num_inference_steps=10)
    result_of(config)
    with pytest.raises(ValueError, match=r"less the `steps_offset` of DDIMScheduler, got 20"):
        result_of(config.replace(validation_num_inference_steps=20))


def test_flow_matching_takes_any_number_of_validation_steps(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=20)
    result_of(tuned(tmp_path, scheduler, validation_num_inference_steps=50))


@pytest.mark.parametrize("sampler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
def test_zero_terminal_snr_is_learned_whichever_scheduler_samples(sampler, tmp_path):
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}
    config = tuned(tmp_path, sampler(**options))
    levels = NoiseLevels(load_noise_scheduler(config))
    assert levels.alpha(levels.timesteps[-1:]).item() < 3e-4
