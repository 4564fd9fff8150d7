import copy
import itertools
import json
import pickle

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dtr.noise_levels import NoiseLevels
from diffusers_dtr.objective import TimestepClusters, cluster_timesteps


def brute_force(num_timesteps, num_clusters, distance):
    """The definition, tried on every way of cutting, the earliest edges first."""

    def total_cost(boundaries):
        total = 0
        for first, end in itertools.pairwise(boundaries):
            center = (first + end - 1) // 2
            total += sum(distance(center, timestep) for timestep in range(first, end))
        return total

    inner = itertools.combinations(range(1, num_timesteps), num_clusters - 1)
    return min(((0, *edges, num_timesteps) for edges in inner), key=total_cost)


def log_snr_of(scheduler):
    levels = NoiseLevels(scheduler)
    return levels.log_snr(levels.timesteps).tolist()


# --- the optimum -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([None, 1, 3, 50]))
def test_optimum_and_its_ties_are_those_of_brute_force(data, num_timesteps, seed, spread):
    # Whole numbers are exact in float64, so equal costs are true ties; a small spread makes many of them.
    num_clusters = data.draw(st.integers(1, num_timesteps))
    generator, shape = torch.Generator().manual_seed(seed), (num_timesteps, num_timesteps)
    affinity = torch.randn(shape, generator=generator).double()
    if spread is not None:
        affinity = torch.randint(-spread, spread + 1, shape, generator=generator)
    clusters, table = cluster_timesteps(num_timesteps, num_clusters, cost=affinity), affinity.tolist()
    assert clusters.boundaries == brute_force(num_timesteps, num_clusters, lambda c, t: -table[c][t])


@pytest.mark.parametrize(("num_timesteps", "num_clusters"), [(1, 1), (7, 3), (11, 4)])
def test_timestep_cost_is_squared_distance_to_the_centre(num_timesteps, num_clusters):
    clusters = cluster_timesteps(num_timesteps, num_clusters, cost="timestep")
    assert clusters.boundaries == brute_force(num_timesteps, num_clusters, lambda c, t: (t - c) ** 2)
    assert cluster_timesteps(num_timesteps, num_clusters, lambda c, t: (c - t) ** 2) == clusters


@pytest.mark.parametrize("num_clusters", [1, 3, 5, 12])
def test_snr_cost_is_distance_in_log_snr(num_clusters):
    scheduler = DDPMScheduler(num_train_timesteps=12, beta_end=0.5)
    log_snr = log_snr_of(scheduler)
    clusters = cluster_timesteps(scheduler, num_clusters)
    assert clusters.boundaries == brute_force(12, num_clusters, lambda c, t: abs(log_snr[t] - log_snr[c]))


@pytest.mark.parametrize(
    ("config", "first"),
    [
        ({"beta_end": 0.5, "rescale_betas_zero_snr": True}, 0),
        ({"trained_betas": [0.0, *[0.01 * t for t in range(1, 13)]]}, 1),
    ],
    ids=["noise", "signal"],
)
def test_pure_noise_or_signal_joins_the_cluster_at_its_end_moves_no_edge_and_is_no_cluster_alone(config, first):
    scheduler = DDPMScheduler(num_train_timesteps=13, **config)
    log_snr = log_snr_of(scheduler)
    assert torch.tensor(log_snr).isinf().nonzero().tolist() == [[0 if first else 12]]
    finite = brute_force(12, 4, lambda c, t: abs(log_snr[first + t] - log_snr[first + c]))
    assert cluster_timesteps(scheduler, 4).boundaries == (0, *(first + edge for edge in finite[1:-1]), 13)
    with pytest.raises(ValueError, match=r"`num_clusters`.*\[1, 12\].*finite log SNR"):
        cluster_timesteps(scheduler, 13)


def test_edges_on_the_linear_schedule():
    # The optimum of the reference problem; the authors' program stops 0.003 % above it.
    clusters = cluster_timesteps(DDPMScheduler(beta_schedule="linear"), num_clusters=8)
    assert clusters.boundaries == (0, 67, 188, 341, 496, 639, 768, 887, 1000)


def test_cost_may_be_a_function_of_two_timesteps():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=12, shift=3.0)
    grid = NoiseLevels(scheduler).timesteps.tolist()
    clusters = cluster_timesteps(scheduler, 4, cost=lambda center, timestep: (center - 2 * timestep).abs())
    assert clusters.boundaries == brute_force(12, 4, lambda c, t: abs(grid[c] - 2 * grid[t]))


def test_affinity_may_come_as_array_or_lists_in_double_precision():
    affinity = torch.block_diag(*[torch.ones(8, 8)] * 3)
    for matrix in (affinity, affinity.numpy(), affinity.tolist()):
        assert cluster_timesteps(24, 3, cost=matrix).boundaries == (0, 8, 16, 24)
    # In float32 both ways of cutting cost the same, and the earlier edge would win.
    close = [[1.0, 1.0 + 1e-12, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert cluster_timesteps(3, 2, cost=close).boundaries == (0, 2, 3)


@given(st.integers(1, 500), st.data())
def test_uniform_clusters_differ_by_one_at_most(num_timesteps, data):
    num_clusters = data.draw(st.integers(1, num_timesteps))
    widths = [len(cluster) for cluster in cluster_timesteps(num_timesteps, num_clusters, cost="uniform")]
    assert (len(widths), sum(widths)) == (num_clusters, num_timesteps)
    assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("arguments", [(0, 1), (True, 1), (5, 6), (5, 0), (5, 2.0)])
def test_impossible_numbers_are_refused(arguments):
    with pytest.raises(ValueError, match=r"`noise_scheduler`|`num_clusters`"):
        cluster_timesteps(*arguments, cost="uniform")


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ("entropy", "uniform, timestep, snr, a function or an affinity matrix, got 'entropy'"),
        ("snr", "pass the scheduler"),
        (torch.zeros(4, 3), r"\(4, 4\), got \(4, 3\)"),
        (torch.eye(4).index_fill(0, torch.tensor([2]), torch.nan), r"nan at \(2, 0\)"),
        (torch.full((4, 4), torch.inf), r"inf at \(0, 0\)"),
        (lambda center, timestep: timestep[:3], r"a function's result, must have the shape \(16,\), got \(3,\)"),
        (lambda center, timestep: 1 / timestep, r"a function's result, must be finite, got inf at \(0,\)"),
    ],
)
def test_costs_that_define_no_clustering_are_refused(cost, message):
    with pytest.raises(ValueError, match=message):
        cluster_timesteps(4, 2, cost=cost)


# --- the clusters ----------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(1, 40), min_size=1))
def test_clusters_tile_the_timesteps(edges):
    clusters = TimestepClusters([0, *sorted(edges)])
    assert [t for cluster in clusters for t in cluster] == list(range(clusters.num_train_timesteps))
    assert len(clusters) == len(list(clusters))
    assert clusters[-1] == clusters[len(clusters) - 1] == list(clusters)[-1]
    expected = [i for i, cluster in enumerate(clusters) for _ in cluster]
    assert clusters.assign(torch.arange(clusters.num_train_timesteps)).tolist() == expected
    with pytest.raises(IndexError):
        clusters[len(clusters)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *(([edges], "boundaries") for edges in ([0], [1, 4], [0, 4, 4], [0.0, 4.0])),
        *(([[0, 1, 3], grid], "timesteps") for grid in ([1.0, 2.0], [1.0, 1.0, 2.0], [0.0, 1.0, torch.inf])),
    ],
)
def test_boundaries_and_grids_that_do_not_tile_are_refused(arguments, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        TimestepClusters(*arguments)


def test_timesteps_between_grid_points_go_to_the_nearest_and_the_noisier():
    clusters = TimestepClusters([0, 10, 20])
    timesteps = torch.tensor([9.0, 9.49, 9.5, 9.51, -4.0, 25.0], dtype=torch.float64)
    assert clusters.assign(timesteps).tolist() == [0, 0, 1, 1, 0, 1]
    edm = TimestepClusters([0, 1, 3], timesteps=[-1.5, -0.5, 1.0])
    assert edm.assign(torch.tensor([-9.0, -1.1, -1.0, -0.9, 0.3, 7.0])).tolist() == [0, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="NaN at index 1"):
        clusters.assign(torch.tensor([0.0, torch.nan]))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float32, torch.float64, torch.bfloat16])
def test_timesteps_of_any_type_are_assigned(dtype):
    assigned = TimestepClusters([0, 100, 200]).assign(torch.tensor([0, 64, 128], dtype=dtype))
    assert assigned.dtype == torch.int64
    assert assigned.tolist() == [0, 0, 1]


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=3.0), EDMEulerScheduler()])
def test_real_valued_grids_are_carried(scheduler):
    clusters, grid = cluster_timesteps(scheduler, num_clusters=5), NoiseLevels(scheduler).timesteps
    assert clusters.assign(grid).tolist() == [i for i, cluster in enumerate(clusters) for _ in cluster]
    drawn = clusters.sample(50, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert torch.isin(drawn, grid.float()).all()
    assert clusters.assign(drawn).bincount(minlength=5).tolist() == [10] * 5


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_clusters_survive_json_copy_and_pickle(scheduler):
    clusters = cluster_timesteps(scheduler, num_clusters=3)
    clusters.assign(torch.zeros(1))
    saved = json.loads(json.dumps(clusters.to_dict()))
    copies = [TimestepClusters.from_dict(saved), copy.deepcopy(clusters), pickle.loads(pickle.dumps(clusters))]
    assert all(other == clusters and hash(other) == hash(clusters) for other in copies)
    with pytest.raises(ValueError, match=r"got \['boundaries', 'k'"):
        TimestepClusters.from_dict({**saved, "k": 1})
    with pytest.raises(ValueError, match="'boundaries'"):
        TimestepClusters.from_dict({})


def test_clusters_are_immutable_and_equal_where_edges_and_grid_are():
    clusters = TimestepClusters([0, 1, 3])
    assert clusters == TimestepClusters([0, 1, 3], timesteps=[0.0, 1.0, 2.0])
    euler = cluster_timesteps(EulerDiscreteScheduler(), num_clusters=2, cost="uniform")
    assert euler.to_dict() == {"boundaries": [0, 500, 1000]}  # a discrete grid is not stored
    assert clusters != TimestepClusters([0, 2, 3])
    assert clusters != TimestepClusters([0, 1, 3], timesteps=[0.0, 1.0, 2.5])
    with pytest.raises(AttributeError):
        clusters.boundaries = (0, 4)


def test_repr_is_short_and_shows_the_edges():
    assert repr(TimestepClusters([0, 5, 9])) == "TimestepClusters((0, 5, 9))"
    grid = TimestepClusters([0, 1, 3], timesteps=[0.5, 1.0, 1000.0])
    assert repr(grid) == "TimestepClusters((0, 1, 3), timesteps=(0.5, ..., 1000))"


def test_clustering_and_sampling_ignore_the_default_device():
    clusters = cluster_timesteps(9, 2, cost="timestep")
    expected = clusters.sample(6, generator=torch.Generator().manual_seed(3))
    with torch.device("meta"):
        assert cluster_timesteps(9, 2, cost="timestep") == clusters
        drawn = clusters.sample(6, generator=torch.Generator("cpu").manual_seed(3))
    assert torch.equal(drawn, expected)
