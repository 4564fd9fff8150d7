import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dtr.objective import timestep_sampling
from diffusers_dtr.objective.clusters import TimestepClusters
from diffusers_dtr.objective.timestep_sampling import draw_stratified, stratified_density


# A frequency further than this many standard deviations from its probability has a chance below 1e-6 under a right
# sampler. Seeds are fixed, so a test that passes passes always.
DEVIATIONS = 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def counts_per_cluster(clusters, timesteps):
    return clusters.assign(timesteps).bincount(minlength=len(clusters))


def assert_frequencies(frequencies, probabilities, num_draws):
    deviation = (probabilities * (1 - probabilities) / num_draws).sqrt()
    assert ((frequencies - probabilities).abs() <= DEVIATIONS * deviation + 1e-12).all()


clusterings = st.sets(st.integers(1, 60), min_size=1, max_size=9).map(
    lambda edges: TimestepClusters([0, *sorted(edges)])
)


@settings(deadline=None)
@given(clusterings, st.integers(1, 40), st.integers(0, 2**31))
def test_every_cluster_gets_its_part_rounded_down_or_up(clusters, batch_size, seed):
    timesteps = clusters.sample(batch_size, generator=seeded(seed))
    assert timesteps.dtype == torch.int64
    assert timesteps.shape == (batch_size,)
    assert timesteps.min() >= 0
    assert timesteps.max() < clusters.num_train_timesteps
    part = batch_size / len(clusters)
    counts = counts_per_cluster(clusters, timesteps)
    assert counts.min() >= math.floor(part)
    assert counts.max() <= math.ceil(part)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), st.integers(1, 40), st.integers(0, 2**31))
def test_unequal_shares_are_rounded_down_or_up(shares, batch_size, seed):
    clusters = TimestepClusters(range(0, 4 * len(shares) + 1, 4))
    counts = counts_per_cluster(clusters, clusters.sample(batch_size, shares=shares, generator=seeded(seed)))
    parts = torch.tensor(shares, dtype=torch.float64) * batch_size / sum(shares)
    assert ((counts >= (parts - 1e-9).floor()) & (counts <= (parts + 1e-9).ceil())).all()


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_the_remainder_goes_to_each_cluster_alike(batch_size):
    clusters, generator, repeats = TimestepClusters([0, 1, 5, 6, 40]), seeded(), 4000
    timesteps = torch.cat([clusters.sample(batch_size, generator=generator) for _ in range(repeats)])
    extra = counts_per_cluster(clusters, timesteps) / repeats - batch_size // 4
    assert_frequencies(extra, torch.full((4,), batch_size % 4 / 4), repeats)


@pytest.mark.parametrize(
    ("shares", "importance"),
    [
        (None, None),
        ([1.0, 0.0, 2.5], None),
        (None, [1.0, 3.0, 2.0, 0.0, 5.0, 0.0, 0.5, 0.5, 0.0]),
        ([3.0, 1.0, 1.0], torch.arange(1, 10)),
    ],
)
def test_timesteps_are_as_frequent_as_their_density_says(shares, importance):
    clusters, num_draws = TimestepClusters([0, 2, 6, 9]), 12_000
    # Single draws rather than one large batch, so that they are independent.
    generator = seeded()
    drawn = torch.cat(
        [clusters.sample(4, shares=shares, importance=importance, generator=generator) for _ in range(num_draws // 4)]
    )
    density = clusters.density(torch.arange(9), shares=shares, importance=importance)
    assert density.mean().item() == pytest.approx(1, abs=1e-6)
    assert_frequencies(drawn.bincount(minlength=9) / num_draws, density / 9, num_draws)
    assert set(drawn.tolist()) == set(density.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("fraction", [0, 1 - 2**-32])
def test_extreme_fractions_stay_where_they_belong(monkeypatch, fraction):
    # Generators come up with these once in 2**32 draws. Widths and shares are such that no sum of them is exact.
    fractions = torch.tensor([fraction], dtype=torch.float64)
    monkeypatch.setattr(timestep_sampling, "_random_fractions", lambda count, generator: fractions.expand(count))
    clusters = TimestepClusters(range(0, 17 * 49 + 1, 49))
    importance = torch.tensor([0.0, *[1.0] * 47, 0.0]).repeat(17)
    timesteps = clusters.sample(17 * 5, importance=importance, generator=seeded())
    assert counts_per_cluster(clusters, timesteps).tolist() == [5] * 17
    assert (timesteps % 49).unique().tolist() == [1 if fraction == 0 else 47]


def test_density_is_the_share_spread_over_the_width():
    clusters = TimestepClusters([0, 250, 1000])
    assert clusters.density(torch.tensor([0, 249, 250, 999])).tolist() == pytest.approx([2, 2, 2 / 3, 2 / 3])
    widths = [len(cluster) for cluster in clusters]
    assert clusters.density(torch.tensor([0, 999]), shares=widths).tolist() == pytest.approx([1, 1])


def test_density_of_equal_clusters_is_one():
    density = TimestepClusters(range(0, 1001, 125)).density(torch.arange(1000))
    assert density.dtype == torch.float32
    torch.testing.assert_close(density, torch.ones(1000))


def test_density_follows_real_valued_timesteps():
    clusters = TimestepClusters([0, 1, 3], timesteps=[-1.5, -0.5, 1.0])
    importance = [1.0, 1.0, 3.0]
    density = clusters.density(torch.tensor([-1.6, -0.4, 1.0]), importance=importance)
    assert density.tolist() == pytest.approx([1.5, 0.375, 1.125])


def loss_of(timesteps):
    return torch.cos(timesteps / 70) + (timesteps / 500) ** 2


@pytest.mark.parametrize(
    ("boundaries", "corrected"), [(range(0, 1001, 125), False), ([0, 67, 188, 341, 496, 639, 768, 887, 1000], True)]
)
def test_expected_loss_is_that_of_uniform_timesteps(boundaries, corrected):
    clusters, generator, repeats = TimestepClusters(boundaries), seeded(), 2000
    means = []
    for _ in range(repeats):
        timesteps = clusters.sample(12, generator=generator)
        losses = loss_of(timesteps) / (clusters.density(timesteps) if corrected else 1)
        means.append(losses.mean())
    means = torch.stack(means).double()
    uniform = loss_of(torch.arange(1000)).double().mean()
    # Within five standard errors: a chance below 1e-6 of failing for a right estimator.
    assert (means.mean() - uniform).abs() <= DEVIATIONS * means.std() / repeats**0.5


def test_unequal_clusters_without_correction_count_every_cluster_alike():
    clusters, generator, repeats = TimestepClusters([0, 67, 1000]), seeded(), 2000
    means = torch.stack([loss_of(clusters.sample(4, generator=generator)).mean() for _ in range(repeats)]).double()
    of_clusters = [loss_of(torch.arange(cluster.start, cluster.stop)).double().mean() for cluster in clusters]
    assert (means.mean() - sum(of_clusters) / 2).abs() <= DEVIATIONS * means.std() / repeats**0.5


def test_stratified_batches_vary_less_than_uniform_ones():
    clusters, generator = TimestepClusters(range(0, 1001, 125)), seeded()
    stratified = torch.stack([loss_of(clusters.sample(16, generator=generator)).mean() for _ in range(300)])
    uniform = torch.stack([loss_of(torch.randint(1000, (16,), generator=generator)).mean() for _ in range(300)])
    assert stratified.std() < 0.5 * uniform.std()


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 12])
def test_any_number_of_processes_draws_the_same_global_batch(num_processes):
    clusters = TimestepClusters([0, 67, 188, 341, 1000])
    per_process = 12 // num_processes
    parts = [
        clusters.sample(per_process, generator=seeded(7), process_index=index, num_processes=num_processes)
        for index in range(num_processes)
    ]
    assert torch.equal(torch.cat(parts), clusters.sample(12, generator=seeded(7)))


def test_processes_stay_together_over_steps():
    clusters, generators = TimestepClusters([0, 3, 10]), [seeded(1), seeded(1)]
    for index, generator in enumerate(generators):
        for _ in range(3):
            clusters.sample(4, generator=generator, process_index=index, num_processes=2)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_a_part_of_the_batch_is_not_one_cluster():
    clusters = TimestepClusters([0, 500, 1000])
    first_halves = [clusters.assign(clusters.sample(32, generator=seeded(seed))[:16]).sum() for seed in range(200)]
    # Of a shuffled batch each half has 8 of either cluster on average, with a standard deviation of √(16/4·16/31).
    mean = torch.stack(first_halves).double().mean()
    assert abs(mean - 8) <= DEVIATIONS * (4 * 16 / 31 / 200) ** 0.5


def test_without_a_generator_torch_seeds_decide():
    clusters = TimestepClusters([0, 500, 1000])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = clusters.sample(8)
        assert not torch.equal(clusters.sample(8), first)
        torch.manual_seed(5)
        assert torch.equal(clusters.sample(8), first)


def test_a_global_batch_needs_a_generator():
    with pytest.raises(ValueError, match="`generator` must be given when 2 processes"):
        TimestepClusters([0, 4]).sample(2, num_processes=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_generator_of_a_device_is_refused():
    with pytest.raises(ValueError, match="must be on the CPU"):
        TimestepClusters([0, 4]).sample(2, generator=torch.Generator("cuda"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size`"),
        ({"batch_size": 2.0}, "`batch_size`"),
        ({"num_processes": 0}, "`num_processes`"),
        ({"process_index": 1}, r"`process_index` must be in \[0, 1\)"),
        ({"process_index": -1}, "`process_index`"),
        ({"shares": [1.0]}, r"`shares` must have the shape \(2,\)"),
        ({"shares": [1.0, -1.0]}, "`shares`.* >= 0, got -1.0 at index 1"),
        ({"shares": [torch.nan, 1.0]}, "`shares`.*finite"),
        ({"shares": [0.0, 0.0]}, "`shares` must have a positive sum"),
        ({"importance": [1.0] * 3}, r"`importance` must have the shape \(4,\)"),
        ({"importance": [1.0, 1.0, 0.0, 0.0]}, "`importance`.*cluster 1"),
        ({"importance": [1.0, torch.inf, 1.0, 1.0]}, "`importance`.*inf at index 1"),
    ],
)
def test_arguments_that_define_no_draw_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_stratified((0, 2, 4), **{"batch_size": 4, **arguments}, generator=seeded())


def test_tiny_importances_stay_in_their_cluster():
    importance = torch.tensor([1e12, 1e12, 1e-12, 3e-12], dtype=torch.float64)
    drawn = draw_stratified((0, 2, 4), 20_000, importance=importance, generator=seeded())
    assert (drawn >= 2).sum() == 10_000
    assert (drawn == 3).sum() / 10_000 == pytest.approx(0.75, abs=DEVIATIONS * (0.75 * 0.25 / 10_000) ** 0.5)
    assert stratified_density((0, 2, 4), importance=importance).tolist() == pytest.approx([1, 1, 0.5, 1.5])
