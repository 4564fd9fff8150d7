import math

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import LogisticNormal

from diffusers_dtr.noise_levels import NoiseLevels
from diffusers_dtr.objective import P2, LogitNormal, MinSNR, SoftMinSNR
from diffusers_dtr.objective.weighting import WEIGHTINGS, make_weighting


NAMES = [name for name in WEIGHTINGS if name != "logit_normal"]
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
DDPM = {kind: NoiseLevels(DDPMScheduler(prediction_type=kind)) for kind in PREDICTION_TYPES}
FLOW = NoiseLevels(FlowMatchEulerDiscreteScheduler())
TIMESTEPS = torch.tensor([0, 3, 250, 600, 999])

# The published weights, per squared error of each prediction type, as functions of the SNR s.
PUBLISHED = {
    ("min_snr", "epsilon"): lambda s: torch.clamp(s, max=5.0) / s,
    ("min_snr", "sample"): lambda s: torch.clamp(s, max=5.0),
    ("min_snr", "v_prediction"): lambda s: torch.clamp(s, max=5.0) / (s + 1),
    ("soft_min_snr", "epsilon"): lambda s: 5 / (s + 5),
    ("soft_min_snr", "sample"): lambda s: 5 * s / (s + 5),
    ("soft_min_snr", "v_prediction"): lambda s: 5 * s / ((s + 5) * (s + 1)),
    ("p2", "epsilon"): lambda s: 1 / (1 + s),
    ("p2", "sample"): lambda s: s / (1 + s),
    ("p2", "v_prediction"): lambda s: s / (1 + s) ** 2,
    ("debiased", "epsilon"): lambda s: s**-0.5,
    ("debiased", "sample"): lambda s: s**0.5,
    ("debiased", "v_prediction"): lambda s: s**0.5 / (1 + s),
    ("edm", "epsilon"): lambda s: 1 + 1 / s,
    ("edm", "sample"): lambda s: s + 1,
    ("edm", "v_prediction"): lambda s: torch.ones_like(s),
}


@pytest.mark.parametrize(("weighting", "prediction_type"), PUBLISHED)
def test_weights_are_the_published_ones(weighting, prediction_type):
    levels = DDPM[prediction_type]
    weights = make_weighting(weighting)(levels, TIMESTEPS)
    expected = PUBLISHED[weighting, prediction_type](levels.snr(TIMESTEPS))
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("levels", [*DDPM.values(), FLOW], ids=[*DDPM, "flow"])
def test_constant_is_one_for_every_prediction_type(levels):
    assert torch.equal(make_weighting("constant")(levels, TIMESTEPS), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("weighting", NAMES[1:])
def test_weighted_loss_is_the_same_whatever_the_denoiser_predicts(weighting):
    # The same error of the clean sample, made by denoisers of four prediction types in one flow.
    timesteps = torch.tensor([0.5, 300.0, 990.0], dtype=torch.float64)
    losses = []
    for kind in ("flow_prediction", "epsilon", "sample"):
        levels = NoiseLevels(UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type=kind))
        squared_error = 1 / levels.clean_gain(timesteps)
        losses.append(make_weighting(weighting)(levels, timesteps) * squared_error)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)


@given(gamma=st.floats(1e-3, 1e3), index=st.integers(0, 999))
def test_min_snr_never_exceeds_gamma_nor_snr_on_the_clean_sample(gamma, index):
    levels, timesteps = DDPM["sample"], torch.tensor([index])
    hard = MinSNR(gamma)(levels, timesteps).item()
    soft = SoftMinSNR(gamma)(levels, timesteps).item()
    assert hard == pytest.approx(min(gamma, levels.snr(timesteps).item()))
    assert hard / 2 * (1 - 1e-9) <= soft <= hard * (1 + 1e-9)


@given(k=st.floats(0.1, 10), gamma=st.floats(0, 3))
def test_p2_takes_both_its_numbers(k, gamma):
    levels = DDPM["epsilon"]
    weights = P2(k, gamma)(levels, TIMESTEPS)
    torch.testing.assert_close(weights, (k + levels.snr(TIMESTEPS)) ** -gamma)


def test_edm_weight_undoes_the_preconditioning():
    # Karras et al. choose λ(σ) = 1/c_out², so the network's own error counts the same at every noise level.
    levels = NoiseLevels(EDMEulerScheduler(sigma_data=0.7))
    weights = make_weighting("edm")(levels, levels.timesteps[::100])
    torch.testing.assert_close(weights, torch.ones_like(weights))


ENDS = {
    # At SNR 0: limits of PUBLISHED for s → 0; the infinite ones count s as 2⁻²⁴.
    ("min_snr", "epsilon"): 1,
    ("min_snr", "sample"): 0,
    ("min_snr", "v_prediction"): 0,
    ("soft_min_snr", "epsilon"): 1,
    ("soft_min_snr", "sample"): 0,
    ("soft_min_snr", "v_prediction"): 0,
    ("p2", "epsilon"): 1,
    ("p2", "sample"): 0,
    ("p2", "v_prediction"): 0,
    ("debiased", "epsilon"): 2**12,
    ("debiased", "sample"): 0,
    ("debiased", "v_prediction"): 0,
    ("edm", "epsilon"): 1 + 2**24,
    ("edm", "sample"): 1,
    ("edm", "v_prediction"): 1,
}


@pytest.mark.parametrize(("weighting", "prediction_type"), ENDS)
def test_weights_at_zero_snr(weighting, prediction_type):
    levels = NoiseLevels(DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type))
    last = torch.tensor([999])
    assert levels.snr(last).item() == 0
    expected = ENDS[weighting, prediction_type]
    assert make_weighting(weighting)(levels, last).item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("weighting", [*NAMES, *(P2(gamma=gamma) for gamma in (0.0, 0.5, 2.0))], ids=str)
def test_weights_are_finite_at_both_ends_of_a_flow(weighting, prediction_type):
    levels = NoiseLevels(UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type=prediction_type))
    weights = make_weighting(weighting)(levels, torch.tensor([0.0, 1000.0]))
    assert weights.isfinite().all()
    assert (weights >= 0).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.3), (1.0, 2.0)])
def test_logit_normal_is_the_density_of_sigma(mean, std):
    timesteps = torch.tensor([1.0, 37.0, 500.0, 990.0], dtype=torch.float64)
    sigma = timesteps / 1000
    weights = LogitNormal(mean, std)(FLOW, timesteps)
    distribution = LogisticNormal(torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64))
    # Its simplex is (σ, 1 − σ).
    expected = distribution.log_prob(torch.stack([sigma, 1 - sigma], 1)).exp()
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-300)


def test_logit_normal_vanishes_at_both_ends():
    assert LogitNormal()(FLOW, torch.tensor([0.0, 1000.0])).tolist() == [0, 0]


@given(st.integers(1, 300), st.floats(-30, 30), st.floats(0.01, 30))
def test_logit_normal_is_a_distribution_that_mirrors_with_its_mean(num_timesteps, mean, std):
    probabilities = LogitNormal(mean, std).probabilities(num_timesteps)
    assert (probabilities > 0).all()
    assert probabilities.sum().item() == pytest.approx(1)
    torch.testing.assert_close(LogitNormal(-mean, std).probabilities(num_timesteps).flip(0), probabilities)


def test_logit_normal_draws_the_places_that_a_logit_normal_variable_falls_on():
    u = torch.sigmoid(0.5 + 0.8 * torch.randn(10**6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    observed = (u * 20).long().bincount(minlength=20) / 10**6
    torch.testing.assert_close(LogitNormal(0.5, 0.8).probabilities(20), observed.double(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_weighting_by_a_logit_normal_is_drawing_from_it(shift):
    levels, distribution = NoiseLevels(FlowMatchEulerDiscreteScheduler(shift=shift)), LogitNormal(0.5, 0.8)
    weights = distribution(levels, levels.timesteps)
    # The density in the middle of two timesteps is their probability times T, but for the curvature.
    middles = (weights[1:] + weights[:-1]) / 2
    torch.testing.assert_close(middles, 1000 * distribution.probabilities(1000)[1:], rtol=0, atol=2e-4)


def test_a_grid_without_timesteps_has_no_probabilities():
    with pytest.raises(ValueError, match="`num_timesteps` must be an integer >= 1"):
        LogitNormal().probabilities(0)


def test_logit_normal_is_for_flow_prediction():
    with pytest.raises(ValueError, match='"logit_normal"` is defined for flow prediction, got "epsilon"'):
        LogitNormal()(DDPM["epsilon"], TIMESTEPS)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r'`weighting` must be one of "constant", "min_snr", .* got \'min_snr_5\''):
        make_weighting("min_snr_5")


@pytest.mark.parametrize(
    ("weighting", "numbers"),
    [
        (MinSNR, {"gamma": 0.0}),
        (SoftMinSNR, {"gamma": math.nan}),
        (P2, {"k": -1.0}),
        (P2, {"gamma": -0.1}),
        (LogitNormal, {"std": 0.0}),
        (LogitNormal, {"mean": math.nan}),
    ],
)
def test_numbers_out_of_range_are_named(weighting, numbers):
    with pytest.raises(ValueError, match=f"`{next(iter(numbers))}` must be"):
        weighting(**numbers)


def test_no_value_is_read_back_from_the_device():
    timesteps = torch.empty(4, device="meta")  # has no values: reading one raises
    for weighting in WEIGHTINGS:
        assert make_weighting(weighting)(FLOW, timesteps).shape == (4,)
