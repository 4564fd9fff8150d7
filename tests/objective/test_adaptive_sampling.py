import io

import pytest
import torch

from diffusers_dtr.objective.adaptive_sampling import AdaptiveTimestepSampler
from diffusers_dtr.objective.clusters import TimestepClusters


CLUSTERS = TimestepClusters([0, 100, 400, 1000])
DEVIATIONS = 5  # A right sampler exceeds these with a chance below 1e-6; seeds are fixed.


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
    timesteps = torch.tensor([CLUSTERS[i].start for i in clusters])
    sampler.update(timesteps, torch.tensor(losses))
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
    assert sampler.density(torch.tensor([0, 100, 400])).tolist() == pytest.approx(density.tolist())
    assert sampler.shares.tolist() == pytest.approx((density * widths / 1000).tolist())


@pytest.mark.parametrize("statistic", ["mean", "second_moment", "variance"])
def test_no_cluster_starves(statistic):
    sampler = one_update([[0.0, 0.0], [0.0, 0.0], [1.0, 9.0]], statistic=statistic, floor=0.05)
    assert sampler.density(torch.arange(1000)).min().item() == pytest.approx(0.05)
    assert sampler.weights(torch.arange(1000)).max().item() == pytest.approx(20)


@pytest.mark.parametrize("losses", [[[0.0], [0.0], [0.0]], [[-1.0], [-2.0], [-3.0]]])
def test_losses_that_prefer_no_cluster_leave_draws_uniform(losses):
    assert one_update(losses, statistic="mean").shares.tolist() == pytest.approx([0.1, 0.3, 0.6])


def test_a_cluster_of_negative_mean_loss_is_left_at_the_floor():
    sampler = one_update([[-5.0], [1.0], [1.0]], statistic="mean", floor=0.1)
    assert sampler.density(torch.tensor([0, 100])).tolist() == pytest.approx([0.1, 1.1])


def test_old_losses_fade():
    sampler = AdaptiveTimestepSampler(CLUSTERS, statistic="mean", decay=0.5, floor=1e-9, interval=1)
    starts = torch.tensor([cluster.start for cluster in CLUSTERS])
    sampler.update(starts, torch.tensor([8.0, 1.0, 1.0]))
    sampler.update(starts, torch.tensor([2.0, 1.0, 1.0]))
    # The mean of cluster 0 is (0.5·8 + 2) / 1.5 = 4.
    assert sampler.shares.tolist() == pytest.approx([0.4 / 1.3, 0.3 / 1.3, 0.6 / 1.3])


def test_losses_enter_every_interval_updates():
    sampler = AdaptiveTimestepSampler(CLUSTERS, interval=3)
    starts = torch.tensor([cluster.start for cluster in CLUSTERS])
    seen = []
    for _ in range(6):
        sampler.update(starts, torch.tensor([float(len(seen) + 1), 1.0, 1.0]))
        seen.append(sampler.shares[0].item())
    assert seen[0] == seen[1] == pytest.approx(0.1)
    assert seen[1] < seen[2] == seen[3] == seen[4] < seen[5]


def test_losses_that_are_not_finite_are_not_observed():
    with_gaps = one_update([[1.0, torch.nan], [2.0, torch.inf], [3.0]])
    assert with_gaps.shares.tolist() == one_update([[1.0], [2.0], [3.0]]).shares.tolist()
    assert one_update([[1.0], [2.0], [torch.nan]]).shares.tolist() == pytest.approx([0.1, 0.3, 0.6])


def test_batches_follow_the_shares():
    sampler = one_update([[6.0], [1.0], [1.0]], statistic="mean")
    counts = CLUSTERS.assign(sampler.sample(50, generator=seeded())).bincount(minlength=3)
    parts = 50 * sampler.shares
    assert ((counts >= parts.floor()) & (counts <= parts.ceil())).all()
    assert counts[0] > 10


@pytest.mark.parametrize("statistic", ["mean", "second_moment", "variance"])
def test_corrected_loss_has_the_expectation_of_uniform_timesteps(statistic):
    sampler, generator, repeats = trained_sampler(statistic=statistic), seeded(1), 1500
    assert (sampler.density(torch.arange(1000)) - 1).abs().max() > 0.2
    means = []
    for _ in range(repeats):
        timesteps = sampler.sample(7, generator=generator)
        means.append((sampler.weights(timesteps) * noisy_losses(timesteps, generator)).mean())
    means = torch.stack(means).double()
    uniform = (3 - torch.arange(1000) / 500).double().mean()
    assert (means.mean() - uniform).abs() <= DEVIATIONS * means.std() / repeats**0.5


@pytest.mark.parametrize(("statistic", "batch_size"), [("second_moment", 20), ("variance", 2000)])
def test_fitted_draws_estimate_the_mean_loss_better_than_uniform_ones(statistic, batch_size):
    # Nearly all of the loss, and of its spread, is in the first tenth of the timesteps.
    def losses(timesteps, generator):
        return 0.1 + (timesteps < 100) * torch.randn(timesteps.shape, generator=generator).abs()

    generator, fitted = seeded(), AdaptiveTimestepSampler(CLUSTERS, statistic=statistic, interval=1)
    timesteps = fitted.sample(512, generator=generator)
    fitted.update(timesteps, losses(timesteps, generator))
    spread = {}
    for name, sampler in {"fitted": fitted, "uniform": AdaptiveTimestepSampler(CLUSTERS)}.items():
        means = []
        for _ in range(300):
            timesteps = sampler.sample(batch_size, generator=generator)
            means.append((sampler.weights(timesteps) * losses(timesteps, generator)).mean())
        spread[name] = torch.stack(means).std()
    assert spread["fitted"] < 0.7 * spread["uniform"]


def test_processes_that_were_updated_alike_draw_one_global_batch():
    sampler = trained_sampler()
    parts = [sampler.sample(4, generator=seeded(3), process_index=i, num_processes=3) for i in range(3)]
    assert torch.equal(torch.cat(parts), sampler.sample(12, generator=seeded(3)))


@pytest.mark.parametrize("steps", [10, 13])  # Between intervals, and within one.
def test_a_resumed_run_draws_what_the_uninterrupted_one_does(steps):
    uninterrupted = trained_sampler(steps)
    file = io.BytesIO()
    torch.save(uninterrupted.state_dict(), file)
    resumed = AdaptiveTimestepSampler(CLUSTERS, interval=5)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(7):
        timesteps = uninterrupted.sample(16, generator=seeded(step))
        assert torch.equal(resumed.sample(16, generator=seeded(step)), timesteps)
        assert torch.equal(resumed.shares, uninterrupted.shares)
        for sampler in (uninterrupted, resumed):
            sampler.update(timesteps, noisy_losses(timesteps, seeded(step)))


def test_a_saved_state_does_not_change_with_the_sampler():
    sampler = trained_sampler(13)
    state = sampler.state_dict()
    before = {key: state[key].clone() for key in ("moments", "pending")}
    for _ in range(10):
        sampler.update(torch.tensor([5]), torch.tensor([1.0]))
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_states_of_other_clusters_or_other_things_are_refused():
    state = trained_sampler().state_dict()
    with pytest.raises(ValueError, match=r"boundaries \[0, 500, 1000\]"):
        AdaptiveTimestepSampler(TimestepClusters([0, 500, 1000])).load_state_dict(state)
    with pytest.raises(ValueError, match="`state_dict` must have the keys"):
        AdaptiveTimestepSampler(CLUSTERS).load_state_dict({"moments": state["moments"]})


@pytest.mark.parametrize(
    "arguments",
    [
        {"statistic": "median"},
        {"decay": 1.0},
        {"decay": -0.1},
        {"floor": 0.0},
        {"floor": 1.1},
        {"floor": float("nan")},
        {"interval": 0},
        {"interval": 2.5},
    ],
)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        AdaptiveTimestepSampler(CLUSTERS, **arguments)


@pytest.mark.parametrize("shapes", [((4,), (3,)), ((4,), (4, 1)), ((), ())])
def test_losses_must_be_one_per_timestep(shapes):
    timesteps, losses = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="`timesteps` and `losses`"):
        AdaptiveTimestepSampler(CLUSTERS).update(timesteps, losses)


def test_gradients_are_not_followed():
    losses = torch.ones(3, requires_grad=True)
    sampler = AdaptiveTimestepSampler(CLUSTERS, interval=1)
    sampler.update(torch.tensor([0, 100, 400]), losses)
    assert not sampler.shares.requires_grad


def test_half_precision_losses_are_summed_in_full():
    sampler = AdaptiveTimestepSampler(CLUSTERS, statistic="second_moment", interval=1)
    timesteps = torch.tensor([0, 100, 400]).repeat(1000)
    sampler.update(timesteps, torch.tensor([300.0, 300.0, 600.0], dtype=torch.float16).repeat(1000))
    reference = one_update([[300.0], [300.0], [600.0]])
    assert sampler.shares.tolist() == pytest.approx(reference.shares.tolist())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_updates_between_intervals_do_not_wait_for_the_device():
    sampler, generator = AdaptiveTimestepSampler(CLUSTERS, interval=100), seeded()
    timesteps = sampler.sample(8, generator=generator, device="cuda")
    losses = torch.rand(8, device="cuda")
    sampler.update(timesteps, losses)  # Tables and sums move to the device once.
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.update(timesteps, losses)
        sampler.weights(sampler.sample(8, generator=generator, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
