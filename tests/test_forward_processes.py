"""The noise levels of every scheduler family, against the scheduler's own methods."""

import math

import pytest
import torch
from noise_processes import T, make, noise_pair

from diffusers_dtr.noise_levels import NoiseLevels


TIMESTEPS = torch.tensor([0, 1, 57, 500, 900, 998, 999])
BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]

TABULATED = ["DDPM", "DDIM", "DDPMParallel", "DDIMParallel", "PNDM", "LCM", "TCD"]
TABULATED += ["SASolver", "CogVideoXDDIM", "CogVideoXDPM"]
WITH_ZERO_SNR = ["DDPM", "DDIM", "DDPMParallel", "DDIMParallel", "LCM", "TCD", "CogVideoXDDIM", "CogVideoXDPM"]
SOLVERS = ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"]
EXPLODING = ["EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "HeunDiscrete"]
EXPLODING += ["KDPM2Discrete", "KDPM2AncestralDiscrete"]

# Schedulers keep ᾱ in float32: with σ = √(1 − ᾱ) = 0.01 at t = 0 that is 1.5e-6 in σ. Everything is of order 1, but
# for σ = √((1 − ᾱ)/ᾱ), which is up to 157 or 10⁴: there the tolerance is relative to it.
FLOAT32_ALPHAS_CUMPROD = {"rtol": 1e-4, "atol": 1e-5}
FLOAT32_SIGMAS = {"rtol": 2e-4, "atol": 1e-4}


# --- schedules made of betas -----------------------------------------------------------------------------------------


def known_timesteps(name, scheduler):
    """Some that its `add_noise` takes: solvers look them up in the sampling table."""
    if name in SOLVERS:
        scheduler.set_timesteps(T)
    elif name not in EXPLODING:
        return TIMESTEPS[len(scheduler.betas) > TIMESTEPS]
    whole = scheduler.timesteps == scheduler.timesteps.double().round()
    return scheduler.timesteps[whole][::111]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, {"beta_schedule": kind}) for name in TABULATED + SOLVERS + EXPLODING for kind in BETA_SCHEDULES),
        ("DPMSolverMultistep", {"rescale_betas_zero_snr": True}),
        ("UniPCMultistep", {"rescale_betas_zero_snr": True}),
        ("UnCLIP", {}),
        ("DDPM", {"beta_schedule": "sigmoid"}),
        ("DDPM", {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}),
    ],
    ids=str,
)
def test_noisy_samples_equal_add_noise(name, config):
    scheduler = make(name, **config)
    levels, timesteps = NoiseLevels(scheduler), known_timesteps(name, scheduler)
    clean, noise = noise_pair(len(timesteps))
    expected = scheduler.add_noise(clean, noise, timesteps)
    tolerance = FLOAT32_SIGMAS if name in EXPLODING else FLOAT32_ALPHAS_CUMPROD
    torch.testing.assert_close(levels.add_noise(clean, noise, timesteps), expected, **tolerance)


@pytest.mark.parametrize("name", WITH_ZERO_SNR)
def test_zero_terminal_snr_samples_and_velocities_equal_the_scheduler_s(name):
    scheduler = make(name, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    levels = NoiseLevels(scheduler)
    clean, noise = noise_pair(len(TIMESTEPS))
    noisy = levels.add_noise(clean, noise, TIMESTEPS)
    velocity = levels.target(clean, noise, TIMESTEPS)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, TIMESTEPS), **FLOAT32_ALPHAS_CUMPROD)
    torch.testing.assert_close(velocity, scheduler.get_velocity(clean, noise, TIMESTEPS), **FLOAT32_ALPHAS_CUMPROD)
    torch.testing.assert_close(levels.predict_clean(velocity, noisy, TIMESTEPS), clean, rtol=0, atol=1e-5)
    assert levels.log_snr(TIMESTEPS[-1:]).item() == -math.inf or name.startswith("CogVideoX")


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_predicted_clean_sample_equals_the_one_ddpm_steps_with(prediction_type):
    scheduler = make("DDPM", prediction_type=prediction_type, clip_sample=False)
    levels = NoiseLevels(scheduler)
    noisy, model_output = noise_pair(1)
    assert levels.model_input(noisy, torch.tensor([3])) is noisy
    for t in (0, 100, 600):
        step = scheduler.step(model_output, t, noisy, generator=torch.Generator().manual_seed(0))
        predicted = levels.predict_clean(model_output, noisy, torch.tensor([t]))
        torch.testing.assert_close(predicted, step.pred_original_sample, rtol=1e-4, atol=1e-4)


# EulerDiscreteScheduler.get_velocity reads ᾱ at the mirrored timestep (it indexes an ascending table with positions in
# a descending one), so what a velocity means is taken from its sampling step.
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete"])
def test_predicted_clean_sample_equals_the_one_euler_steps_with(name, prediction_type):
    scheduler = make(name, prediction_type=prediction_type)
    levels = NoiseLevels(scheduler)
    scheduler.set_timesteps(5)
    clean, noise = noise_pair(1)
    timestep = scheduler.timesteps[2]
    noisy = levels.add_noise(clean, noise, timestep[None])
    model_output = levels.target(clean, noise, timestep[None])
    scheduler.set_begin_index(2)
    scheduler.scale_model_input(noisy, timestep)
    step = scheduler.step(model_output, timestep, noisy, generator=torch.Generator().manual_seed(0))
    predicted = levels.predict_clean(model_output, noisy, timestep[None])
    torch.testing.assert_close(predicted, step.pred_original_sample, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(predicted, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EXPLODING)
def test_variance_exploding_model_input_equals_scale_model_input(name):
    scheduler = make(name)
    levels, timestep = NoiseLevels(scheduler), scheduler.timesteps[0]
    noisy = levels.add_noise(*noise_pair(1), timestep[None])
    expected = scheduler.scale_model_input(noisy, timestep)
    torch.testing.assert_close(levels.model_input(noisy, timestep[None]), expected, rtol=1e-4, atol=1e-5)


def test_euler_interpolates_sigma_between_timesteps():
    scheduler = make("EulerDiscrete")
    scheduler.set_timesteps(7)
    assert (scheduler.timesteps != scheduler.timesteps.round()).any()
    sigma = NoiseLevels(scheduler).sigma(scheduler.timesteps)
    torch.testing.assert_close(sigma, scheduler.sigmas[:-1].double(), rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete"])
def test_zero_terminal_snr_has_the_large_sigma_that_euler_gives_it(name):
    scheduler = make(name, rescale_betas_zero_snr=True)
    last = NoiseLevels(scheduler).sigma(scheduler.timesteps[:1]).item()
    assert last == pytest.approx(scheduler.sigmas[0].item(), rel=1e-6)


def test_continuous_euler_is_called_with_a_quarter_of_log_sigma():
    scheduler = make("EulerDiscrete", timestep_type="continuous", prediction_type="v_prediction")
    levels = NoiseLevels(scheduler)
    torch.testing.assert_close(levels.timesteps, scheduler.timesteps.flip(0).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(levels.sigma(scheduler.timesteps), scheduler.sigmas[:-1].double(), rtol=1e-5, atol=0)


# --- EDM and flow matching -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
def test_edm_equals_the_scheduler_s_preconditioning(name, prediction_type, sigma_schedule):
    scheduler = make(name, prediction_type=prediction_type, sigma_schedule=sigma_schedule, sigma_data=0.7)
    levels, config = NoiseLevels(scheduler), scheduler.config
    timesteps, sigma = scheduler.timesteps[::111], scheduler.sigmas[:-1][::111].view(-1, 1, 1, 1)
    clean, noise = noise_pair(len(timesteps))
    noisy = levels.add_noise(clean, noise, timesteps)
    for ours, theirs in [
        (noisy, scheduler.add_noise(clean, noise, timesteps)),
        (levels.model_input(noisy, timesteps), scheduler.precondition_inputs(noisy, sigma)),
        (levels.predict_clean(noise, noisy, timesteps), scheduler.precondition_outputs(noisy, noise, sigma)),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ends = scheduler.precondition_noise(torch.tensor([config.sigma_min, config.sigma_max]))
    torch.testing.assert_close(levels.timesteps[[0, -1]].float(), ends, rtol=1e-5, atol=0)
    if name == "EDMDPMSolverMultistep":  # the other one begins with a sampling grid
        torch.testing.assert_close(levels.timesteps.flip(0).float(), scheduler.timesteps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchLCM"])
def test_flow_equals_scale_noise_on_the_scheduler_s_grid(name, config):
    scheduler = make(name, **config)
    levels = NoiseLevels(scheduler)
    torch.testing.assert_close(levels.timesteps, scheduler.timesteps.flip(0).double(), rtol=1e-6, atol=0)
    timesteps = scheduler.timesteps[::111]
    clean, noise = noise_pair(len(timesteps))
    expected = scheduler.scale_noise(clean, timesteps, noise)
    torch.testing.assert_close(levels.add_noise(clean, noise, timesteps), expected, rtol=1e-5, atol=1e-6)
    assert levels.prediction_type == "flow"
    torch.testing.assert_close(levels.target(clean, noise, timesteps), noise - clean)


@pytest.mark.parametrize("name", [*SOLVERS, "SASolver"])
def test_solvers_with_flow_sigmas_are_flows(name):
    scheduler = make(name, use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    levels = NoiseLevels(scheduler)
    scheduler.set_timesteps(50)
    # Their timesteps are rounded to integers, and the largest σ·T = 1000 with them.
    sigma = levels.sigma(scheduler.timesteps)
    torch.testing.assert_close(sigma, scheduler.sigmas[:-1].double(), rtol=0, atol=1 / T)
    assert (levels.prediction_type, levels.timesteps[-1]) == ("flow", T)


def test_flow_is_exact_at_both_ends_of_time_and_below_its_first_timestep():
    levels = NoiseLevels(make("FlowMatchEulerDiscrete"))
    ends = torch.tensor([0.0, 1000.0])
    clean, noise = noise_pair(2)
    noisy = levels.add_noise(clean, noise, ends)
    torch.testing.assert_close(noisy, torch.stack([clean[0], noise[1]]), rtol=0, atol=0)
    predicted = levels.predict_clean(levels.target(clean, noise, ends), noisy, ends)
    torch.testing.assert_close(predicted, clean, rtol=0, atol=1e-6)
    assert levels.snr(ends).tolist() == [math.inf, 0.0]
    shifted = NoiseLevels(make("FlowMatchEulerDiscrete", shift=3.0))
    assert shifted.sigma(torch.tensor([0.0, 0.5, 1000.0])).tolist() == [0, 0.0005, 1]
