import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dtr.objective import TimestepClusters, clusters


# A frequency further than this many standard deviations from its probability has a chance below 1e-6 under a right
# sampler. Seeds are fixed, so a test that passes passes always.
DEVIATIONS = 5
UNEQUAL = TimestepClusters([0, 67, 188, 341, 1000])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def counts_per_cluster(clusters, timesteps):
    return clusters.assign(timesteps).bincount(minlength=len(clusters))


def assert_frequencies(frequencies, probabilities, num_draws):
    deviation = (probabilities * (1 - probabilities) / num_draws).sqrt()
    assert ((frequencies - probabilities).abs() <= DEVIATIONS * deviation + 1e-12).all()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=9),
    st.booleans(),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_every_cluster_gets_its_share_rounded_down_or_up(clusters, alike, batch_size, seed):
    widths, shares = (torch.tensor(values) for values in zip(*clusters, strict=True))
    shares = None if alike or not shares.any() else shares
    clusters = TimestepClusters([0, *widths.cumsum(0).tolist()])
    timesteps = clusters.sample(batch_size, shares=shares, generator=seeded(seed))
    assert (timesteps.dtype, timesteps.shape) == (torch.int64, (batch_size,))
    assert 0 <= timesteps.min() <= timesteps.max() < clusters.num_train_timesteps
    shares = torch.ones(len(clusters)) if shares is None else shares
    parts, counts = batch_size * shares.double() / shares.sum(), counts_per_cluster(clusters, timesteps)
    assert ((counts >= (parts - 1e-9).floor()) & (counts <= (parts + 1e-9).ceil())).all()


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
    clusters, num_draws, generator = TimestepClusters([0, 2, 6, 9]), 6_000, seeded()
    weights = {"shares": shares, "importance": importance}
    # Small draws rather than one large batch, so that they are independent.
    drawn = torch.cat([clusters.sample(4, **weights, generator=generator) for _ in range(num_draws // 4)])
    density = clusters.density(torch.arange(9), **weights)
    assert density.mean().item() == pytest.approx(1, abs=1e-6)
    assert_frequencies(drawn.bincount(minlength=9) / num_draws, density / 9, num_draws)
    assert set(drawn.tolist()) == set(density.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("fraction", [0, 1 - 2**-32])
def test_extreme_fractions_stay_where_they_belong(monkeypatch, fraction):
    # Generators come up with these once in 2**32 draws. Widths and shares are such that no sum of them is exact.
    fractions = torch.tensor([fraction], dtype=torch.float64)
    monkeypatch.setattr(clusters, "_random_fractions", lambda count, generator: fractions.expand(count))
    tiling = TimestepClusters(range(0, 17 * 49 + 1, 49))
    importance = torch.tensor([0.0, *[1.0] * 47, 0.0]).repeat(17)
    timesteps = tiling.sample(17 * 5, importance=importance, generator=seeded())
    assert counts_per_cluster(tiling, timesteps).tolist() == [5] * 17
    assert (timesteps % 49).unique().tolist() == [1 if fraction == 0 else 47]


def test_tiny_importances_stay_in_their_cluster():
    importance = torch.tensor([1e12, 1e12, 1e-12, 3e-12], dtype=torch.float64)
    halves = TimestepClusters([0, 2, 4])
    drawn = halves.sample(20_000, importance=importance, generator=seeded())
    assert (drawn >= 2).sum() == 10_000
    assert (drawn == 3).sum() / 10_000 == pytest.approx(0.75, abs=DEVIATIONS * (0.75 * 0.25 / 10_000) ** 0.5)
    assert halves.density(torch.arange(4), importance=importance).tolist() == pytest.approx([1, 1, 0.5, 1.5])


def test_density_is_the_share_spread_over_the_width():
    clusters = TimestepClusters([0, 250, 1000])
    assert clusters.density(torch.tensor([0, 249, 250, 999])).tolist() == pytest.approx([2, 2, 2 / 3, 2 / 3])
    assert clusters.density(torch.tensor([0, 999]), shares=[250, 750]).tolist() == pytest.approx([1, 1])
    real = TimestepClusters([0, 1, 3], timesteps=[-1.5, -0.5, 1.0])
    density = real.density(torch.tensor([-1.6, -0.4, 1.0]), importance=[1.0, 1.0, 3.0])
    assert density.dtype == torch.float32
    assert density.tolist() == pytest.approx([1.5, 0.375, 1.125])


@pytest.mark.parametrize("num_processes", [2, 12])
def test_any_number_of_processes_draws_the_same_global_batches(num_processes):
    alone, generators = seeded(7), [seeded(7) for _ in range(num_processes)]
    for _ in range(2):
        parts = [
            UNEQUAL.sample(12 // num_processes, generator=one, process_index=index, num_processes=num_processes)
            for index, one in enumerate(generators)
        ]
        assert torch.equal(torch.cat(parts), UNEQUAL.sample(12, generator=alone))


def test_a_part_of_the_batch_is_not_one_cluster():
    clusters = TimestepClusters([0, 500, 1000])
    first_halves = [clusters.assign(clusters.sample(32, generator=seeded(seed))[:16]).sum() for seed in range(200)]
    # Of a shuffled batch each half has 8 of either cluster on average, with a standard deviation of √(16/4·16/31).
    mean = torch.stack(first_halves).double().mean()
    assert abs(mean - 8) <= DEVIATIONS * (4 * 16 / 31 / 200) ** 0.5


def test_without_a_generator_torch_seeds_decide():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = UNEQUAL.sample(8)
        assert not torch.equal(UNEQUAL.sample(8), first)
        torch.manual_seed(5)
        assert torch.equal(UNEQUAL.sample(8), first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_generator_of_a_device_is_refused():
    with pytest.raises(ValueError, match="must be on the CPU"):
        TimestepClusters([0, 4]).sample(2, generator=torch.Generator("cuda"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size`"),
        ({"num_processes": 0}, "`num_processes`"),
        ({"num_processes": 2, "generator": None}, "`generator` must be given when 2 processes"),
        ({"process_index": 1}, r"`process_index` must be in \[0, 1\)"),
        ({"shares": [1.0]}, r"`shares` must have the shape \(2,\)"),
        ({"shares": [1.0, -1.0]}, "`shares`.* >= 0, got -1.0 at index 1"),
        ({"shares": [math.nan, 1.0]}, "`shares`.*finite"),
        ({"shares": [0.0, 0.0]}, "`shares` must have a positive sum"),
        ({"importance": [1.0] * 3}, r"`importance` must have the shape \(4,\)"),
        ({"importance": [1.0, 1.0, 0.0, 0.0]}, "`importance`.*cluster 1"),
        ({"importance": [1.0, math.inf, 1.0, 1.0]}, "`importance`.*inf at index 1"),
    ],
)
def test_arguments_that_define_no_draw_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimestepClusters([0, 2, 4]).sample(**{"batch_size": 4, "generator": seeded(), **arguments})
