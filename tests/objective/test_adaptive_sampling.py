import io

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_dtr import NoiseLevels
from diffusers_dtr.objective import AdaptiveTimestepSampler, TimestepClusters


CLUSTERS = TimestepClusters([0, 100, 400, 1000])
STARTS = torch.tensor([0, 100, 400])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy_losses(timesteps, generator):
    """Losses whose mean and spread both depend on the timestep."""
    return (3 - timesteps / 500) + torch.exp(-timesteps / 300) * torch.randn(timesteps.shape, generator=generator)


def trained_sampler(steps=60, **settings):
    sampler, generator = AdaptiveTimestepSampler(CLUSTERS, interval=5, **settings), seeded()
    for _ in range(steps):
        timesteps = sampler.sample(16, generator=generator)
        sampler.update(timesteps, noisy_losses(timesteps, generator))
    return sampler


def one_update(losses_per_cluster, **settings):
    sampler = AdaptiveTimestepSampler(CLUSTERS, interval=1, **settings)
    clusters, losses = zip(*[(i, loss) for i, row in enumerate(losses_per_cluster) for loss in row], strict=True)
    sampler.update(STARTS[list(clusters)], torch.tensor(losses, requires_grad=True))
    return sampler


def test_draws_are_uniform_until_each_cluster_is_observed():
    sampler = one_update([[1.0], [5.0], []])
    assert sampler.shares.tolist() == pytest.approx([0.1, 0.3, 0.6])
    torch.testing.assert_close(sampler.weights(torch.arange(1000)), torch.ones(1000))
    sampler.update(torch.tensor([999]), torch.tensor([9.0]))
    assert sampler.shares[2] > 0.7


@pytest.mark.parametrize(
    ("statistic", "expected"), [("mean", [1, 2, 5]), ("second_moment", [2**0.5, 2, 34**0.5]), ("variance", [1, 0, 3])]
)
def test_density_is_a_floor_and_the_statistic_of_the_losses(statistic, expected):
    sampler = one_update([[0.0, 2.0], [2.0, 2.0], [2.0, 8.0]], statistic=statistic, floor=0.25)
    expected, widths = torch.tensor(expected, dtype=torch.float64), torch.tensor([100, 300, 600])
    density = 0.25 + 0.75 * expected / ((widths * expected).sum() / 1000)
    assert sampler.density(STARTS).tolist() == pytest.approx(density.tolist())
    torch.testing.assert_close(sampler.weights(STARTS), (1 / density).float())
    assert sampler.shares.tolist() == pytest.approx((density * widths / 1000).tolist())
    assert not sampler.shares.requires_grad
    # Batches follow the shares, rounded down or up.
    counts, parts = CLUSTERS.assign(sampler.sample(50, generator=seeded())).bincount(minlength=3), 50 * sampler.shares
    assert ((counts >= parts.floor()) & (counts <= parts.ceil())).all()


@pytest.mark.parametrize(
    ("losses", "density"),
    [
        ([[0.0], [0.0], [0.0]], [1, 1, 1]),
        ([[-1.0], [-2.0], [-3.0]], [1, 1, 1]),
        ([[-5.0], [1.0], [1.0]], [0.1, 1.1, 1.1]),
        ([[1.0], [2.0], [torch.nan]], [1, 1, 1]),  # as good as not observed
    ],
)
def test_losses_without_a_positive_mean_prefer_no_cluster(losses, density):
    sampler = one_update(losses, statistic="mean", floor=0.1)
    assert sampler.density(STARTS).tolist() == pytest.approx(density)


def test_losses_that_are_not_finite_are_not_observed():
    with_gaps = one_update([[1.0, torch.nan], [2.0, torch.inf], [3.0]])
    assert with_gaps.shares.tolist() == one_update([[1.0], [2.0], [3.0]]).shares.tolist()


def test_half_precision_losses_are_summed_in_full():
    sampler = AdaptiveTimestepSampler(CLUSTERS, interval=1)
    sampler.update(STARTS.repeat(1000), torch.tensor([300.0, 300.0, 600.0], dtype=torch.float16).repeat(1000))
    assert sampler.shares.tolist() == pytest.approx(one_update([[300.0], [300.0], [600.0]]).shares.tolist())


def test_fitted_timesteps_estimate_the_mean_loss_with_less_variance_than_uniform_ones():
    generator, fitted = seeded(), AdaptiveTimestepSampler(CLUSTERS, statistic="variance", interval=1)

    def losses(timesteps):
        spread = torch.where(timesteps < 100, 5.0, 0.1)
        return 1 + spread * torch.randn(timesteps.shape, generator=generator)

    def estimates(sampler):
        draws = (sampler.sample(16, generator=generator) for _ in range(500))
        return torch.stack([(sampler.weights(draw) * losses(draw)).mean() for draw in draws])

    for _ in range(100):
        timesteps = fitted.sample(16, generator=generator)
        fitted.update(timesteps, losses(timesteps))
    uniform, fitted = estimates(AdaptiveTimestepSampler(CLUSTERS)), estimates(fitted)
    torch.testing.assert_close(fitted.mean(), torch.tensor(1.0), rtol=0, atol=0.03)
    assert fitted.var() < 0.5 * uniform.var()


def test_old_losses_fade():
    sampler = AdaptiveTimestepSampler(CLUSTERS, statistic="mean", decay=0.5, floor=1e-9, interval=1)
    sampler.update(STARTS, torch.tensor([8.0, 1.0, 1.0]))
    sampler.update(STARTS, torch.tensor([2.0, 1.0, 1.0]))
    # The mean of cluster 0 is (0.5·8 + 2) / 1.5 = 4.
    assert sampler.shares.tolist() == pytest.approx([0.4 / 1.3, 0.3 / 1.3, 0.6 / 1.3])


def test_losses_enter_every_interval_updates():
    sampler, seen = AdaptiveTimestepSampler(CLUSTERS, interval=3), []
    for step in range(6):
        sampler.update(STARTS, torch.tensor([step + 1.0, 1.0, 1.0]))
        seen.append(sampler.shares[0].item())
    assert seen[0] == seen[1] == pytest.approx(0.1)
    assert seen[1] < seen[2] == seen[3] == seen[4] < seen[5]


@pytest.mark.parametrize("steps", [10, 13])  # Between intervals, and within one.
def test_a_resumed_run_draws_what_the_uninterrupted_one_does(steps):
    uninterrupted, file = trained_sampler(steps), io.BytesIO()
    state = uninterrupted.state_dict()
    torch.save(state, file)
    resumed = AdaptiveTimestepSampler(CLUSTERS, interval=5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved)
    for step in range(7):
        timesteps = uninterrupted.sample(16, generator=seeded(step))
        assert torch.equal(resumed.sample(16, generator=seeded(step)), timesteps)
        assert torch.equal(resumed.shares, uninterrupted.shares)
        for sampler in (uninterrupted, resumed):
            sampler.update(timesteps, noisy_losses(timesteps, seeded(step)))
    # What was handed out does not change with the sampler.
    assert all(torch.equal(state[key], torch.as_tensor(saved[key])) for key in ("moments", "pending"))


def test_states_of_other_clusters_or_other_things_are_refused():
    state = trained_sampler().state_dict()
    with pytest.raises(ValueError, match=r"boundaries \[0, 500, 1000\]"):
        AdaptiveTimestepSampler(TimestepClusters([0, 500, 1000])).load_state_dict(state)
    with pytest.raises(ValueError, match="`state_dict` must have the keys"):
        AdaptiveTimestepSampler(CLUSTERS).load_state_dict({"moments": state["moments"]})


@pytest.mark.parametrize(
    ("name", "value"),
    [("statistic", "median"), ("decay", 1.0), ("decay", -0.1), ("floor", 0.0), ("interval", 0)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        AdaptiveTimestepSampler(CLUSTERS, **{name: value})


@pytest.mark.parametrize("shapes", [((4,), (3,)), ((), ())])
def test_losses_must_be_one_per_timestep(shapes):
    with pytest.raises(ValueError, match="`timesteps` and `losses`"):
        AdaptiveTimestepSampler(CLUSTERS).update(*map(torch.zeros, shapes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_does_not_wait_for_the_device():
    """From the draw of timesteps to the update, once tables and sums have moved there, and between two intervals."""
    sampler, levels = AdaptiveTimestepSampler(CLUSTERS, interval=100), NoiseLevels(DDPMScheduler())
    clean, noise = torch.randn(2, 8, 3, device="cuda")
    losses = torch.rand(8, device="cuda")

    def step():
        timesteps = sampler.sample(8, generator=seeded(), device="cuda")
        noisy, weights = levels.add_noise(clean, noise, timesteps), sampler.weights(timesteps)
        sampler.update(timesteps, losses)
        return timesteps, CLUSTERS.assign(timesteps), weights, noisy

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    timesteps, assigned, weights, noisy = (part.cpu() for part in found)
    assert torch.equal(assigned, CLUSTERS.assign(timesteps))
    torch.testing.assert_close(weights, sampler.weights(timesteps))
    torch.testing.assert_close(noisy, levels.add_noise(clean.cpu(), noise.cpu(), timesteps))
