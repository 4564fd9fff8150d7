"""The variational bound, and which schedulers sample with a learned variance."""

import math

import pytest
import torch
from noise_processes import LEVELS, make, noise_pair
from torch.distributions import Normal, kl_divergence

from diffusers_dtr.noise_levels import NoiseLevels, uses_learned_variance


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
