import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffusers_dtr.objective.balancing import (
    ClusterLosses,
    ContinuousUncertainty,
    UncertaintyWeighting,
    UniformBalancing,
    make_balancing,
)


REFERENCE = load_file(Path(__file__).parents[1] / "fixtures" / "losses.safetensors")


def cluster_losses(per_sample, clusters, num_clusters=3, log_snr=None):
    per_sample = torch.as_tensor(per_sample)
    log_snr = torch.zeros(len(per_sample), dtype=torch.float64) if log_snr is None else log_snr
    return ClusterLosses(per_sample, torch.tensor(clusters), log_snr, num_clusters)


@settings(max_examples=50, deadline=None)
@given(
    samples=st.lists(st.tuples(st.floats(0, 100, width=32), st.integers(0, 4)), min_size=1, max_size=20),
)
def test_contributions_counts_and_means_are_those_of_a_loop(samples):
    losses, clusters = zip(*samples, strict=True)
    result = cluster_losses(torch.tensor(losses, dtype=torch.float64), clusters, num_clusters=5)
    for cluster in range(5):
        own = [loss for loss, where in samples if where == cluster]
        assert result.counts[cluster] == len(own)
        assert result.contributions[cluster].item() == pytest.approx(sum(own) / len(samples))
        assert result.means[cluster].item() == pytest.approx(sum(own) / len(own) if own else 0.0)


def test_a_loss_that_is_not_finite_stays_in_its_cluster():
    result = cluster_losses([1.0, math.nan, 3.0], [0, 1, 2])
    assert result.means.isnan().tolist() == [False, True, False]
    assert result.means[[0, 2]].tolist() == [1.0, 3.0]


def test_uniform_balancing_is_the_mean_over_samples():
    assert UniformBalancing()(cluster_losses([1.0, 2.0, 6.0], [0, 0, 2])).item() == 3.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_uncertainty_weighting_equals_that_of_the_authors(schedule):
    per_sample = REFERENCE[f"{schedule}.constant.loss"]
    balancing = UncertaintyWeighting(8)
    balancing.load_state_dict({"log_variance": REFERENCE[f"{schedule}.uw.log_variance"]})
    loss = balancing(cluster_losses(per_sample, [i // 2 for i in range(16)], 8))
    torch.testing.assert_close(loss, REFERENCE[f"{schedule}.uw.loss"], rtol=1e-5, atol=1e-5)


def test_log_variances_rest_where_they_equal_the_log_contributions():
    losses = cluster_losses([1.0, 2.0, 6.0, 4.0], [0, 1, 1, 2])
    balancing = UncertaintyWeighting(3)
    balancing.load_state_dict({"log_variance": torch.tensor([1.0, 8.0, 4.0]).div(4).log()})
    balancing(losses).backward()
    torch.testing.assert_close(balancing.log_variance.grad, torch.zeros(3))


def test_samples_of_certain_clusters_count_more():
    per_sample = torch.ones(3, requires_grad=True)
    balancing = UncertaintyWeighting(3)
    balancing.load_state_dict({"log_variance": torch.tensor([0.0, 1.0, 2.0])})
    balancing(cluster_losses(per_sample, [0, 1, 2])).backward()
    torch.testing.assert_close(per_sample.grad, torch.tensor([1.0, math.exp(-1), math.exp(-2)]) / 6)


def test_a_cluster_without_samples_adds_only_its_log_variance():
    balancing = UncertaintyWeighting(3)
    balancing.load_state_dict({"log_variance": torch.tensor([0.0, 5.0, 0.0])})
    loss = balancing(cluster_losses([2.0, 4.0], [0, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (1 + 2 + 5))
    assert balancing.log_variance.grad.tolist() == pytest.approx([0.5 * (1 - 1), 0.5, 0.5 * (1 - 2)])


@pytest.mark.parametrize("balancing", [UniformBalancing(), UncertaintyWeighting(3), ContinuousUncertainty()])
def test_autocast_rounds_nothing(balancing):
    torch.manual_seed(0)
    for parameter in balancing.parameters():
        torch.nn.init.normal_(parameter)
    losses = torch.rand(32), [i % 3 for i in range(32)], 3, torch.linspace(-5, 5, 32, dtype=torch.float64)
    expected = balancing(cluster_losses(*losses))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = balancing(cluster_losses(*losses))
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()


def test_continuous_uncertainty_starts_as_the_plain_mean():
    losses = cluster_losses([1.0, 2.0, 6.0], [0, 1, 2], log_snr=torch.tensor([-4.0, 0.0, 4.0]))
    assert ContinuousUncertainty()(losses).item() == 3.0


def test_continuous_uncertainty_learns_the_log_loss_of_each_noise_level():
    log_snr = torch.linspace(-8, 8, 64, dtype=torch.float64)
    expected = torch.sigmoid(-log_snr / 2).mul(2).add(0.05).log().float()
    balancing = ContinuousUncertainty()
    optimizer = torch.optim.Adam(balancing.parameters(), lr=0.025)
    for _ in range(2000):
        optimizer.zero_grad()
        balancing(cluster_losses(expected.exp(), [0] * 64, 1, log_snr)).backward()
        optimizer.step()
    torch.testing.assert_close(balancing.log_uncertainty(log_snr), expected, rtol=0, atol=0.15)  # of 3.7


def test_continuous_uncertainty_divides_losses_by_its_exponential():
    per_sample = torch.ones(2, requires_grad=True)
    log_snr = torch.tensor([-3.0, 5.0])
    balancing = ContinuousUncertainty()
    torch.nn.init.normal_(balancing.weight, generator=torch.Generator().manual_seed(0))
    u = balancing.log_uncertainty(log_snr).detach()
    loss = balancing(cluster_losses(per_sample, [0, 1], log_snr=log_snr))
    loss.backward()
    torch.testing.assert_close(loss, ((-u).exp() + u).mean())
    torch.testing.assert_close(per_sample.grad, (-u).exp() / 2)


def test_continuous_uncertainty_is_finite_for_pure_noise_and_pure_signal():
    balancing = ContinuousUncertainty()
    torch.nn.init.ones_(balancing.weight)
    log_snr = torch.tensor([-math.inf, -20.0, 20.0, math.inf])
    u = balancing.log_uncertainty(log_snr)
    assert u.isfinite().all()
    assert (u[0], u[3]) == (u[1], u[2])


def test_the_seed_and_the_number_of_features_choose_the_features():
    def function(**arguments):
        balancing = ContinuousUncertainty(**arguments)
        torch.nn.init.ones_(balancing.weight)
        return balancing.log_uncertainty(torch.linspace(-5, 5, 9))

    assert torch.equal(function(seed=1), function(seed=1))
    assert not torch.allclose(function(seed=1), function(seed=2))
    assert ContinuousUncertainty(7).weight.shape == (7,)
    with pytest.raises(ValueError, match="`num_features` must be an integer >= 1, got 0"):
        ContinuousUncertainty(0)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"`balancing` must be one of uniform, uncertainty, .* got 'pcgrad'"):
        make_balancing("pcgrad", 8)
