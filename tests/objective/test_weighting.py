import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import LogisticNormal

from diffusers_dtr.noise_levels import NoiseLevels
from diffusers_dtr.objective import P2, WEIGHTINGS, LogitNormal, MinSNR, SoftMinSNR
from diffusers_dtr.objective.weighting import make_weighting


NAMES = [name for name in WEIGHTINGS if name != "logit_normal"]
DDPM = {
    kind: NoiseLevels(DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=kind))
    for kind in ("epsilon", "sample", "v_prediction")
}
FLOWS = {
    kind: NoiseLevels(UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type=kind))
    for kind in ("flow_prediction", "epsilon", "sample")
}
FLOW = NoiseLevels(FlowMatchEulerDiscreteScheduler())
TIMESTEPS = torch.tensor([0, 3, 250, 600, 998])

# The published weights, per squared error of each prediction type, as functions of the SNR s; and their limits for
# s → 0, of which the infinite ones count s as 2⁻²⁴.
PUBLISHED = {
    ("constant", "epsilon"): (torch.ones_like, 1),
    ("constant", "sample"): (torch.ones_like, 1),
    ("constant", "v_prediction"): (torch.ones_like, 1),
    ("min_snr", "epsilon"): (lambda s: torch.clamp(s, max=5.0) / s, 1),
    ("min_snr", "sample"): (lambda s: torch.clamp(s, max=5.0), 0),
    ("min_snr", "v_prediction"): (lambda s: torch.clamp(s, max=5.0) / (s + 1), 0),
    ("soft_min_snr", "epsilon"): (lambda s: 5 / (s + 5), 1),
    ("soft_min_snr", "sample"): (lambda s: 5 * s / (s + 5), 0),
    ("soft_min_snr", "v_prediction"): (lambda s: 5 * s / ((s + 5) * (s + 1)), 0),
    ("p2", "epsilon"): (lambda s: 1 / (1 + s), 1),
    ("p2", "sample"): (lambda s: s / (1 + s), 0),
    ("p2", "v_prediction"): (lambda s: s / (1 + s) ** 2, 0),
    ("debiased", "epsilon"): (lambda s: s**-0.5, 2**12),
    ("debiased", "sample"): (lambda s: s**0.5, 0),
    ("debiased", "v_prediction"): (lambda s: s**0.5 / (1 + s), 0),
    ("edm", "epsilon"): (lambda s: 1 + 1 / s, 1 + 2**24),
    ("edm", "sample"): (lambda s: s + 1, 1),
    ("edm", "v_prediction"): (torch.ones_like, 1),
}


@pytest.mark.parametrize(("weighting", "prediction_type"), PUBLISHED)
def test_weights_are_the_published_ones(weighting, prediction_type):
    levels, weight = DDPM[prediction_type], make_weighting(weighting)
    published, at_zero_snr = PUBLISHED[weighting, prediction_type]
    torch.testing.assert_close(weight(levels, TIMESTEPS), published(levels.snr(TIMESTEPS)), rtol=1e-9, atol=0)
    last = torch.tensor([999])
    assert levels.snr(last).item() == 0
    assert weight(levels, last).item() == pytest.approx(at_zero_snr, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("weighting", NAMES[1:])
def test_weighted_loss_is_the_same_whatever_the_denoiser_predicts(weighting):
    # The same error of the clean sample, made by denoisers of three prediction types in one flow.
    timesteps, weight = torch.tensor([0.5, 300.0, 990.0], dtype=torch.float64), make_weighting(weighting)
    losses = [weight(levels, timesteps) / levels.clean_gain(timesteps) for levels in FLOWS.values()]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-6, atol=0)


@given(gamma=st.floats(1e-3, 1e3), index=st.integers(0, 999))
def test_min_snr_never_exceeds_gamma_nor_snr_on_the_clean_sample(gamma, index):
    levels, timesteps = DDPM["sample"], torch.tensor([index])
    hard, soft = (weighting(gamma)(levels, timesteps).item() for weighting in (MinSNR, SoftMinSNR))
    assert hard == pytest.approx(min(gamma, levels.snr(timesteps).item()))
    assert hard / 2 * (1 - 1e-9) <= soft <= hard * (1 + 1e-9)


@given(k=st.floats(0.1, 10), gamma=st.floats(0, 3))
def test_p2_takes_both_its_numbers(k, gamma):
    levels = DDPM["epsilon"]
    torch.testing.assert_close(P2(k, gamma)(levels, TIMESTEPS), (k + levels.snr(TIMESTEPS)) ** -gamma)


def test_edm_weight_undoes_the_preconditioning():
    # Karras et al. choose λ(σ) = 1/c_out², so the network's own error counts the same at every noise level.
    levels = NoiseLevels(EDMEulerScheduler(sigma_data=0.7))
    weights = make_weighting("edm")(levels, levels.timesteps[::100])
    torch.testing.assert_close(weights, torch.ones_like(weights))


@pytest.mark.parametrize("levels", FLOWS.values(), ids=FLOWS.keys())
@pytest.mark.parametrize("weighting", [*NAMES, *(P2(gamma=gamma) for gamma in (0.0, 0.5, 2.0))], ids=str)
def test_weights_are_finite_at_both_ends_of_a_flow(weighting, levels):
    weights = make_weighting(weighting)(levels, torch.tensor([0.0, 1000.0]))
    assert weights.isfinite().all()
    assert (weights >= 0).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.3), (1.0, 2.0)])
def test_logit_normal_is_the_density_of_sigma(mean, std):
    sigma = torch.tensor([0.001, 0.037, 0.5, 0.99], dtype=torch.float64)
    distribution = LogisticNormal(torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64))
    # Its simplex is (σ, 1 − σ).
    expected = distribution.log_prob(torch.stack([sigma, 1 - sigma], 1)).exp()
    torch.testing.assert_close(LogitNormal(mean, std)(FLOW, 1000 * sigma), expected, rtol=1e-9, atol=1e-300)
    assert LogitNormal(mean, std)(FLOW, torch.tensor([0.0, 1000.0])).tolist() == [0, 0]


@given(st.integers(1, 300), st.floats(-30, 30), st.floats(0.01, 30))
def test_logit_normal_is_a_distribution_that_mirrors_with_its_mean(num_timesteps, mean, std):
    probabilities = LogitNormal(mean, std).probabilities(num_timesteps)
    assert (probabilities > 0).all()
    assert probabilities.sum().item() == pytest.approx(1)
    torch.testing.assert_close(LogitNormal(-mean, std).probabilities(num_timesteps).flip(0), probabilities)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_weighting_by_a_logit_normal_is_drawing_from_it(shift):
    levels, distribution = NoiseLevels(FlowMatchEulerDiscreteScheduler(shift=shift)), LogitNormal(0.5, 0.8)
    weights = distribution(levels, levels.timesteps)
    # The density in the middle of two timesteps is their probability times T, but for the curvature.
    middles = (weights[1:] + weights[:-1]) / 2
    torch.testing.assert_close(middles, 1000 * distribution.probabilities(1000)[1:], rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSNR(gamma=0.0), "`gamma` must be"),
        (lambda: P2(k=-1.0), "`k` must be"),
        (lambda: P2(gamma=-0.1), "`gamma` must be"),
        (lambda: LogitNormal(std=0.0), "`std` must be"),
        (lambda: LogitNormal().probabilities(0), "`num_timesteps` must be an integer >= 1"),
        (lambda: LogitNormal()(DDPM["epsilon"], TIMESTEPS), 'is defined for flow prediction, got "epsilon"'),
        (lambda: make_weighting("min_snr_5"), r'must be one of "constant", "min_snr", .* got \'min_snr_5\''),
    ],
)
def test_weightings_that_are_not_defined_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_value_is_read_back_from_the_device(weighting):
    timesteps = torch.empty(4, device="meta")  # has no values: reading one raises
    assert make_weighting(weighting)(FLOW, timesteps).shape == (4,)
