import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dtr.objective import ClusterLosses, ContinuousUncertainty, UncertaintyWeighting, UniformBalancing


def cluster_losses(per_sample, clusters, num_clusters=3, log_snr=None):
    per_sample = torch.as_tensor(per_sample)
    log_snr = torch.zeros(len(per_sample), dtype=torch.float64) if log_snr is None else log_snr
    return ClusterLosses(per_sample, torch.tensor(clusters), log_snr, num_clusters)


def uncertainty(log_variance):
    balancing = UncertaintyWeighting(len(log_variance))
    balancing.load_state_dict({"log_variance": torch.as_tensor(log_variance)})
    return balancing


def continuous(**options):
    """With random weights."""
    balancing = ContinuousUncertainty(**options)
    torch.nn.init.normal_(balancing.weight, generator=torch.Generator().manual_seed(0))
    return balancing


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100, width=32), st.integers(0, 4)), min_size=1, max_size=20))
def test_contributions_counts_and_means_are_those_of_a_loop(samples):
    losses, clusters = zip(*samples, strict=True)
    result = cluster_losses(torch.tensor(losses, dtype=torch.float64), clusters, num_clusters=5)
    for cluster in range(5):
        own = [loss for loss, where in samples if where == cluster]
        assert result.counts[cluster] == len(own)
        assert result.contributions[cluster].item() == pytest.approx(sum(own) / len(samples))
        assert result.means[cluster].item() == pytest.approx(sum(own) / len(own) if own else 0.0)


def test_a_loss_that_is_not_finite_stays_in_its_cluster():
    means = cluster_losses([1.0, math.nan, 3.0], [0, 1, 2]).means
    assert means.isnan().tolist() == [False, True, False]
    assert means[[0, 2]].tolist() == [1.0, 3.0]


@pytest.mark.parametrize("balancing", [UniformBalancing(), ContinuousUncertainty()])
def test_the_mean_over_samples_is_uniform_balancing_and_the_start_of_continuous_uncertainty(balancing):
    losses = cluster_losses([1.0, 2.0, 6.0], [0, 0, 2], log_snr=torch.tensor([-4.0, 0.0, 4.0]))
    assert balancing(losses).item() == 3.0


def test_log_variances_rest_where_they_equal_the_log_contributions():
    balancing = uncertainty(torch.tensor([1.0, 8.0, 4.0]).div(4).log())
    balancing(cluster_losses([1.0, 2.0, 6.0, 4.0], [0, 1, 1, 2])).backward()
    torch.testing.assert_close(balancing.log_variance.grad, torch.zeros(3))


def test_samples_of_certain_clusters_count_more_and_an_empty_one_adds_only_its_log_variance():
    balancing, per_sample = uncertainty([0.0, 5.0, 1.0]), torch.tensor([2.0, 4.0], requires_grad=True)
    loss = balancing(cluster_losses(per_sample, [0, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (1 + 2 * math.exp(-1) + 0 + 5 + 1))
    assert per_sample.grad.tolist() == pytest.approx([1 / 4, math.exp(-1) / 4])
    assert balancing.log_variance.grad.tolist() == pytest.approx([0.0, 0.5, 0.5 * (1 - 2 * math.exp(-1))])


@pytest.mark.parametrize("balancing", [UniformBalancing(), uncertainty([0.3, -1.0, 2.0]), continuous()])
def test_autocast_rounds_nothing(balancing):
    per_sample = torch.rand(32, generator=torch.Generator().manual_seed(0))
    losses = per_sample, [i % 3 for i in range(32)], 3, torch.linspace(-5, 5, 32, dtype=torch.float64)
    expected = balancing(cluster_losses(*losses))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = balancing(cluster_losses(*losses))
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()


def test_continuous_uncertainty_learns_the_log_loss_of_each_noise_level():
    log_snr = torch.linspace(-8, 8, 64, dtype=torch.float64)
    expected = torch.sigmoid(-log_snr / 2).mul(2).add(0.05).log().float()
    balancing = ContinuousUncertainty()
    optimizer = torch.optim.Adam(balancing.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        balancing(cluster_losses(expected.exp(), [0] * 64, 1, log_snr)).backward()
        optimizer.step()
    torch.testing.assert_close(balancing.log_uncertainty(log_snr), expected, rtol=0, atol=0.25)  # of 3.7


def test_continuous_uncertainty_divides_losses_by_its_exponential():
    balancing, log_snr = continuous(), torch.tensor([-3.0, 5.0])
    per_sample = torch.ones(2, requires_grad=True)
    u = balancing.log_uncertainty(log_snr).detach()
    loss = balancing(cluster_losses(per_sample, [0, 1], log_snr=log_snr))
    loss.backward()
    torch.testing.assert_close(loss, ((-u).exp() + u).mean())
    torch.testing.assert_close(per_sample.grad, (-u).exp() / 2)


def test_continuous_uncertainty_is_finite_for_pure_noise_and_pure_signal():
    u = continuous().log_uncertainty(torch.tensor([-math.inf, -20.0, 20.0, math.inf]))
    assert u.isfinite().all()
    assert (u[0], u[3]) == (u[1], u[2])


def test_the_seed_and_the_number_of_features_choose_the_features():
    one, same, other = (continuous(seed=seed).log_uncertainty(torch.linspace(-5, 5, 9)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert ContinuousUncertainty(7).weight.shape == (7,)


def test_continuous_uncertainty_without_features_is_refused():
    with pytest.raises(ValueError, match="`num_features` must be an integer >= 1, got 0"):
        ContinuousUncertainty(0)
