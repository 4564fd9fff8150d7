"""The noise levels of every scheduler family, against the scheduler's own methods."""

import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from diffusers_dtr.noise_levels import NoiseLevels, is_discrete, uses_learned_variance


T = 1000
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


def make(name, **config):
    return getattr(diffusers, f"{name}Scheduler")(**config)


def noise_pair(batch, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, 4, 4, generator=generator, dtype=dtype) for _ in range(2))


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


# --- all processes ---------------------------------------------------------------------------------------------------

PROCESSES = {
    **{f"ddpm-{kind}": ("DDPM", {"prediction_type": kind}) for kind in ("epsilon", "sample", "v_prediction")},
    **{f"euler-{kind}": ("EulerDiscrete", {"prediction_type": kind}) for kind in ("epsilon", "v_prediction")},
    **{f"edm-{kind}": ("EDMEuler", {"prediction_type": kind}) for kind in ("epsilon", "v_prediction")},
    "continuous": ("EulerDiscrete", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    "flow": ("FlowMatchEulerDiscrete", {}),
    "flow-epsilon": ("UniPCMultistep", {"use_flow_sigmas": True, "prediction_type": "epsilon"}),
    "zero-snr-epsilon": ("DDPM", {"rescale_betas_zero_snr": True}),
    "zero-snr-v": ("DDPM", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
}
LEVELS = {key: NoiseLevels(make(name, **config)) for key, (name, config) in PROCESSES.items()}
every_process = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS.keys())


@settings(max_examples=30, deadline=None)
@given(key=st.sampled_from(sorted(LEVELS)), where=st.floats(0, 0.98), seed=st.integers(0, 2**16))
def test_prediction_of_the_target_recovers_the_clean_sample(key, where, seed):
    levels = LEVELS[key]
    low, high = levels.timestep_range
    timesteps = torch.tensor([low + where * (high - low)], dtype=torch.float64)
    clean, noise = noise_pair(1, torch.float64, seed)
    noisy = levels.add_noise(clean, noise, timesteps)
    predicted = levels.predict_clean(levels.target(clean, noise, timesteps), noisy, timesteps)
    torch.testing.assert_close(predicted, clean, rtol=0, atol=1e-8)


@every_process
def test_gains_measure_how_output_errors_become_clean_and_noise_errors(levels):
    timesteps = levels.timesteps[[1, 300, 900]]
    noisy, model_output = noise_pair(3, torch.float64)
    difference = levels.predict_clean(model_output + 1, noisy, timesteps)
    difference = (difference - levels.predict_clean(model_output, noisy, timesteps))[:, 0, 0, 0]
    torch.testing.assert_close(levels.clean_gain(timesteps), difference**2, rtol=1e-6, atol=0)
    noise_difference = levels.alpha(timesteps) * difference / levels.sigma(timesteps)
    torch.testing.assert_close(levels.noise_gain(timesteps), noise_difference**2, rtol=1e-6, atol=0)


@every_process
def test_grid_ascends_in_noise_level_and_snr_is_the_ratio_of_squared_shares(levels):
    grid = levels.timesteps
    assert grid.dtype == torch.float64
    assert len(grid) == levels.num_train_timesteps == T
    assert (grid.diff() > 0).all()
    assert (levels.log_snr(grid).diff() < 0).all()
    assert levels.timestep_range == (grid.min().item(), grid.max().item())
    timesteps = grid[[0, 400, 998]]
    expected = levels.alpha(timesteps) ** 2 / levels.sigma(timesteps) ** 2
    torch.testing.assert_close(levels.snr(timesteps), expected)
    torch.testing.assert_close(levels.log_snr(timesteps), expected.log())


@every_process
def test_everything_is_finite_at_both_ends_of_the_grid(levels):
    ends = levels.timesteps[[0, -1]]
    clean, noise = noise_pair(2)
    noisy = levels.add_noise(clean, noise, ends)
    results = [noisy, levels.model_input(noisy, ends), levels.target(clean, noise, ends)]
    results += [levels.predict_clean(noise, noisy, ends), levels.clean_gain(ends), levels.noise_gain(ends)]
    assert all(result.isfinite().all() for result in results)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = ends.to(dtype)
        if not is_discrete(levels.timesteps) or rounded[1] < T:  # 999 is 1000 in bfloat16
            assert levels.sigma(rounded).isfinite().all()


@every_process
def test_half_precision_samples_are_computed_in_float32(levels):
    timesteps = levels.timesteps[[3, 500]]
    clean, noise = noise_pair(2, torch.bfloat16)
    for method in (levels.add_noise, levels.target, levels.predict_clean):
        result = method(clean, noise, timesteps)
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, method(clean.float(), noise.float(), timesteps).bfloat16())
    assert levels.model_input(clean, timesteps).dtype == torch.bfloat16


@every_process
def test_no_value_is_read_back_from_the_device(levels):
    # A meta tensor has no values: whatever waits for one of a GPU's raises here.
    timesteps = torch.empty(2, device="meta", dtype=torch.float64)
    clean, noise = (torch.empty(2, 3, 4, 4, device="meta") for _ in range(2))
    noisy = levels.add_noise(clean, noise, timesteps)
    assert levels.predict_clean(levels.target(clean, noise, timesteps), noisy, timesteps).shape == clean.shape
    assert levels.model_input(noisy, timesteps).shape == clean.shape
    assert levels.noise_gain(timesteps).shape == levels.log_snr(timesteps).shape == (2,)


@pytest.mark.parametrize(("name", "config"), [("EulerDiscrete", {"use_karras_sigmas": True}), PROCESSES["flow"]])
def test_sampling_state_of_the_scheduler_does_not_change_its_levels(name, config):
    scheduler = make(name, **config)
    before = NoiseLevels(scheduler)
    scheduler.set_timesteps(4)
    after = NoiseLevels(scheduler)
    assert torch.equal(before.timesteps, after.timesteps)
    assert torch.equal(before.sigma(before.timesteps), after.sigma(before.timesteps))


@pytest.mark.parametrize(
    ("name", "of_another_class"),
    [
        ("DDPM", {"use_flow_sigmas": True, "flow_shift": 3.0}),
        ("EulerAncestralDiscrete", {"timestep_type": "continuous"}),
        ("FlowMatchEulerDiscrete", {"prediction_type": "epsilon"}),
    ],
)
def test_settings_that_a_scheduler_only_keeps_for_another_class_do_not_change_its_levels(name, of_another_class):
    own = {} if name.startswith("Flow") else {"prediction_type": "v_prediction"}
    expected = NoiseLevels(make(name, **own))
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config({**own, **of_another_class})
    assert scheduler.config.items() >= of_another_class.items()
    levels = NoiseLevels(scheduler)
    assert levels.prediction_type == expected.prediction_type
    assert torch.equal(levels.timesteps, expected.timesteps)
    assert torch.equal(levels.log_snr(levels.timesteps), expected.log_snr(levels.timesteps))


# --- the variational bound -------------------------------------------------------------------------------------------


def bound_by_distributions(scheduler, prediction, variance_values, clean, noisy, t):
    """Equations 6 and 7 of DDPM and 15 of Improved DDPM, one timestep at a time."""
    alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    beta, now, before = scheduler.betas[t].double(), alphas_cumprod[t], alphas_cumprod[t - 1]
    variance = beta * (1 - before) / (1 - now)
    predicted_clean = (noisy - (1 - now).sqrt() * prediction) / now.sqrt()

    def mean(x_0):
        return before.sqrt() * beta / (1 - now) * x_0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * noisy

    share = (variance_values + 1) / 2
    deviation = (0.5 * (share * beta.log() + (1 - share) * variance.log())).exp()
    divergence = kl_divergence(Normal(mean(clean), variance.sqrt()), Normal(mean(predicted_clean), deviation))
    return divergence.mean() / math.log(2)


def bound_of(levels, timesteps, dtype=torch.float32):
    """The bound of random samples, and the output of a denoiser that it is of."""
    clean, noise = noise_pair(len(timesteps), dtype)
    model_output = torch.cat(noise_pair(len(timesteps), dtype, seed=1), 1).requires_grad_()
    noisy = levels.add_noise(clean, noise, timesteps)
    return levels.variational_bound(model_output, clean, noisy, timesteps), model_output, clean, noisy


@pytest.mark.parametrize("t", [1, 2, 400, 999])
def test_bound_is_the_divergence_of_the_two_posteriors(t):
    scheduler = make("DDPM")
    bound, model_output, clean, noisy = bound_of(NoiseLevels(scheduler), torch.tensor([t]), torch.float64)
    expected = bound_by_distributions(scheduler, *model_output.chunk(2, 1), clean, noisy, t)
    torch.testing.assert_close(bound[0], expected, rtol=1e-6, atol=0)


def test_decoder_probabilities_of_all_256_levels_sum_to_one():
    levels = NoiseLevels(make("DDPM"))
    clean = torch.linspace(-1, 1, 256, dtype=torch.float64).view(256, 1, 1)  # one level per sample
    noisy = torch.full_like(clean, 0.3)
    model_output = torch.tensor([[0.2], [0.5]], dtype=torch.float64).expand(256, 2, 1)
    probabilities = 2 ** -levels.variational_bound(model_output, clean, noisy, torch.zeros(256, dtype=torch.int64))
    # Levels out of reach count as 1e-12 each.
    assert probabilities.sum().item() == pytest.approx(1, abs=256e-12)
    predicted = levels.predict_clean(model_output[:1, :1], noisy[:1], torch.tensor([0])).item()
    assert clean[probabilities.argmax()].item() == pytest.approx(predicted, abs=1 / 255)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_bound_is_finite_at_zero_snr_and_trains_the_variance_but_not_the_mean(prediction_type):
    levels = NoiseLevels(make("DDPM", rescale_betas_zero_snr=True, prediction_type=prediction_type))
    bound, model_output, *_ = bound_of(levels, torch.tensor([0, 500, 998, 999]))
    bound.sum().backward()
    assert bound.isfinite().all()
    assert model_output.grad.isfinite().all()
    assert not model_output.grad[:, :3].any()
    assert model_output.grad[:, 3:].flatten(1).any(1).all()


def test_bound_is_the_same_for_preserved_and_exploding_variance():
    bounds = [bound_of(LEVELS[f"{name}-epsilon"], torch.tensor([0, 300, 900]))[0] for name in ("ddpm", "euler")]
    torch.testing.assert_close(*bounds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (LEVELS["flow"], "FlowMatchEulerDiscreteScheduler has no betas"),
        (NoiseLevels(make("DDPM", variance_type="learned")), "learned_range"),
    ],
)
def test_bound_needs_betas_and_variance_values_that_are_a_range(levels, message):
    with pytest.raises(ValueError, match=message):
        bound_of(levels, torch.tensor([3]))


@pytest.mark.parametrize(
    ("name", "variance_type", "expected"),
    [
        *(("DDPM", "learned", True), ("DDPM", "fixed_small", False), ("DDPMParallel", "learned_range", True)),
        *(("UnCLIP", "learned_range", True), ("UnCLIP", "fixed_small_log", False)),
        *(("DPMSolverMultistep", "learned_range", False), ("FlowMatchEulerDiscrete", None, False)),
    ],
)
def test_learned_variance_is_used_only_where_a_step_samples_with_it(name, variance_type, expected):
    config = {"variance_type": variance_type} if variance_type else {}
    assert uses_learned_variance(make(name, **config)) is expected


# --- what is refused -------------------------------------------------------------------------------------------------


class CosineTime(diffusers.EDMEulerScheduler):
    """EDM preconditioning with another timestep, as CosineDPMSolverMultistepScheduler (which needs torchsde) has."""

    def precondition_noise(self, sigma):
        return torch.atan(sigma) / math.pi * 2


@pytest.mark.parametrize(
    ("scheduler", "missing"),
    [
        (make("DDIMInverse"), "add_noise"),
        (make("IPNDM"), "add_noise"),
        (make("RePaint"), "prediction_type"),
        (make("ScoreSdeVe"), "alphas_cumprod"),
        (make("CMStochasticIterative"), "alphas_cumprod"),
        (make("DDPM", prediction_type="flow"), "prediction_type"),
        (make("EDMDPMSolverMultistep", prediction_type="sample"), "prediction_type"),
        (make("DPMSolverMultistep", prediction_type="flow_prediction"), "prediction_type"),
        (make("FlowMatchEulerDiscrete", invert_sigmas=True), "invert_sigmas"),
        (CosineTime(), "precondition_noise"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_unserved_schedulers_are_named_with_what_they_lack(scheduler, missing):
    with pytest.raises(TypeError, match=rf"{type(scheduler).__name__} lacks .*`{missing}`"):
        NoiseLevels(scheduler)


OUTSIDE = {
    "ddpm-epsilon": (-1, 999.5, math.nan),
    "euler-epsilon": (-0.5, 1000),
    "edm-epsilon": (-50, 1.2, math.inf),
    "flow": (-1e-3, 1000.1),
}


@pytest.mark.parametrize(("key", "outside"), [(key, value) for key, values in OUTSIDE.items() for value in values])
def test_timesteps_outside_the_schedule_are_refused_by_all_that_takes_timesteps(key, outside):
    levels = LEVELS[key]
    timesteps = torch.tensor([levels.timesteps[5], outside])
    clean, noise = noise_pair(2)
    calls = {
        **dict.fromkeys(("add_noise", "target", "predict_clean"), (clean, noise, timesteps)),
        **dict.fromkeys(("alpha", "sigma", "snr", "log_snr", "clean_gain", "noise_gain"), (timesteps,)),
        "model_input": (clean, timesteps),
    }
    for method, arguments in calls.items():
        with pytest.raises(ValueError, match=r"`timesteps` must lie in \[-?[\d.]+, [\d.]+\], got"):
            getattr(levels, method)(*arguments)


@pytest.mark.parametrize(
    ("num_noise", "timesteps", "message"),
    [
        (2, 5, "`timesteps` must be a tensor of shape"),
        (2, torch.tensor(5), "`timesteps` must be a tensor of shape"),
        (2, torch.tensor([[5, 6]]), "`timesteps` must be a tensor of shape"),
        (1, torch.tensor([1, 2]), "`noise` must have the shape of `clean`"),
        (2, torch.tensor([1]), "one value per sample"),
    ],
)
def test_samples_and_timesteps_that_do_not_fit_are_refused(num_noise, timesteps, message):
    clean, noise = noise_pair(2)
    with pytest.raises(ValueError, match=message):
        LEVELS["ddpm-epsilon"].add_noise(clean, noise[:num_noise], timesteps)


def test_something_else_than_a_scheduler_is_refused():
    with pytest.raises(TypeError, match="`scheduler` must be a diffusers scheduler, got int"):
        NoiseLevels(1000)
