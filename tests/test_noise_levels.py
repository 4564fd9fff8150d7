"""What holds for the noise levels of every process, and what has none."""

import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noise_processes import LEVELS, PROCESSES, T, every_process, make, noise_pair

from diffusers_dtr.noise_levels import NoiseLevels, is_discrete


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
