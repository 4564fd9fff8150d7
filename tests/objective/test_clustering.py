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
from diffusers_dtr.objective.clustering import cluster_timesteps
from diffusers_dtr.objective.clusters import TimestepClusters


def all_boundaries(num_timesteps, num_clusters):
    """Every way of cutting, the earliest edges first."""
    for inner in itertools.combinations(range(1, num_timesteps), num_clusters - 1):
        yield (0, *inner, num_timesteps)


def total_cost(boundaries, distance):
    """The definition: distance of each timestep to the centre ⌊(l + r) / 2⌋ of its cluster."""
    total = 0
    for first, end in itertools.pairwise(boundaries):
        center = (first + end - 1) // 2
        total += sum(distance(center, timestep) for timestep in range(first, end))
    return total


def brute_force(num_timesteps, num_clusters, distance):
    return min(all_boundaries(num_timesteps, num_clusters), key=lambda edges: total_cost(edges, distance))


@st.composite
def sizes(draw):
    num_timesteps = draw(st.integers(1, 12))
    return num_timesteps, draw(st.integers(1, num_timesteps))


@settings(deadline=None, max_examples=60)
@given(sizes(), st.integers(0, 2**31), st.integers(1, 50))
def test_optimum_and_its_ties_are_those_of_brute_force(size, seed, spread):
    # Whole numbers are exact in float64, so equal costs are true ties; a small spread makes many of them.
    num_timesteps, num_clusters = size
    generator = torch.Generator().manual_seed(seed)
    affinity = torch.randint(-spread, spread + 1, (num_timesteps, num_timesteps), generator=generator)
    clusters = cluster_timesteps(num_timesteps, num_clusters, cost=affinity)
    table = affinity.tolist()
    assert clusters.boundaries == brute_force(num_timesteps, num_clusters, lambda c, t: -table[c][t])


@settings(deadline=None, max_examples=60)
@given(sizes(), st.integers(0, 2**31))
def test_optimum_on_real_costs_is_that_of_brute_force(size, seed):
    num_timesteps, num_clusters = size
    affinity = torch.randn(num_timesteps, num_timesteps, generator=torch.Generator().manual_seed(seed)).double()
    clusters = cluster_timesteps(num_timesteps, num_clusters, cost=affinity)
    table = affinity.tolist()
    assert clusters.boundaries == brute_force(num_timesteps, num_clusters, lambda c, t: -table[c][t])


@pytest.mark.parametrize(("num_timesteps", "num_clusters"), [(1, 1), (2, 1), (7, 3), (11, 4), (12, 12)])
def test_timestep_cost_is_squared_distance_to_the_centre(num_timesteps, num_clusters):
    clusters = cluster_timesteps(num_timesteps, num_clusters, cost="timestep")
    assert clusters.boundaries == brute_force(num_timesteps, num_clusters, lambda c, t: (t - c) ** 2)


@pytest.mark.parametrize("num_clusters", [1, 3, 5, 12])
def test_snr_cost_is_distance_in_log_snr(num_clusters):
    scheduler = DDPMScheduler(num_train_timesteps=12, beta_end=0.5)
    levels = NoiseLevels(scheduler)
    log_snr = levels.log_snr(levels.timesteps).tolist()
    clusters = cluster_timesteps(scheduler, num_clusters)
    assert clusters.boundaries == brute_force(12, num_clusters, lambda c, t: abs(log_snr[t] - log_snr[c]))


def test_edges_on_the_linear_schedule():
    # The optimum of the reference problem; the authors' program stops 0.003 % above it.
    clusters = cluster_timesteps(DDPMScheduler(beta_schedule="linear"), num_clusters=8)
    assert clusters.boundaries == (0, 67, 188, 341, 496, 639, 768, 887, 1000)


def test_planted_clusters_are_found():
    affinity = torch.block_diag(torch.ones(8, 8), torch.ones(8, 8), torch.ones(8, 8))
    assert cluster_timesteps(24, 3, cost=affinity).boundaries == (0, 8, 16, 24)


def test_cost_may_be_a_function_of_two_timesteps():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=12, shift=3.0)
    grid = NoiseLevels(scheduler).timesteps.tolist()
    clusters = cluster_timesteps(scheduler, 4, cost=lambda center, timestep: (center - 2 * timestep).abs())
    assert clusters.boundaries == brute_force(12, 4, lambda c, t: abs(grid[c] - 2 * grid[t]))


def test_functions_reach_the_costs_that_have_names():
    levels = NoiseLevels(DDPMScheduler())
    named = cluster_timesteps(DDPMScheduler(), 8, "snr")
    assert cluster_timesteps(DDPMScheduler(), 8, lambda c, t: (levels.log_snr(c) - levels.log_snr(t)).abs()) == named
    assert cluster_timesteps(50, 4, lambda c, t: (c - t) ** 2) == cluster_timesteps(50, 4, "timestep")


def test_affinity_may_come_as_array_or_lists():
    affinity = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    expected = cluster_timesteps(6, 3, cost=affinity)
    assert cluster_timesteps(6, 3, cost=affinity.numpy()) == expected
    assert cluster_timesteps(6, 3, cost=affinity.tolist()) == expected


def test_close_affinities_in_lists_keep_double_precision():
    # In float32 both ways of cutting cost the same, and the earlier edge would win.
    affinity = [[1.0, 1.0 + 1e-12, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert cluster_timesteps(3, 2, cost=affinity).boundaries == (0, 2, 3)


@given(st.integers(1, 500), st.data())
def test_uniform_clusters_differ_by_one_at_most(num_timesteps, data):
    num_clusters = data.draw(st.integers(1, num_timesteps))
    widths = [len(cluster) for cluster in cluster_timesteps(num_timesteps, num_clusters, cost="uniform")]
    assert len(widths) == num_clusters
    assert sum(widths) == num_timesteps
    assert max(widths) - min(widths) <= 1


def test_pure_noise_joins_the_last_cluster_and_moves_no_edge():
    scheduler = DDPMScheduler(num_train_timesteps=13, beta_end=0.5, rescale_betas_zero_snr=True)
    levels = NoiseLevels(scheduler)
    log_snr = levels.log_snr(levels.timesteps).tolist()
    assert log_snr[-1] == -torch.inf
    finite = brute_force(12, 4, lambda c, t: abs(log_snr[t] - log_snr[c]))
    assert cluster_timesteps(scheduler, 4).boundaries == (*finite[:-1], 13)


@pytest.mark.parametrize("arguments", [(0, 1), (-3, 1), (True, 1), (5, 6), (5, 0), (5, -1), (5, True), (5, 2.0)])
def test_impossible_numbers_are_refused(arguments):
    with pytest.raises(ValueError, match=r"`noise_scheduler`|`num_clusters`"):
        cluster_timesteps(*arguments, cost="uniform")


def test_a_cluster_of_pure_noise_alone_is_refused():
    scheduler = DDPMScheduler(num_train_timesteps=6, beta_end=0.5, rescale_betas_zero_snr=True)
    assert len(cluster_timesteps(scheduler, 5)) == 5
    with pytest.raises(ValueError, match=r"`num_clusters`.*\[1, 5\].*finite log SNR"):
        cluster_timesteps(scheduler, 6)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ("entropy", "uniform, timestep, snr, a function or an affinity matrix, got 'entropy'"),
        ("snr", "pass the scheduler"),
        (torch.zeros(4, 3), r"\(4, 4\), got \(4, 3\)"),
        (torch.zeros(5, 5), r"\(4, 4\), got \(5, 5\)"),
        (torch.eye(4).index_fill(0, torch.tensor([2]), torch.nan), r"nan at \(2, 0\)"),
        (torch.full((4, 4), torch.inf), r"inf at \(0, 0\)"),
        (lambda center, timestep: timestep[:3], r"a function's result, must have the shape \(16,\), got \(3,\)"),
        (lambda center, timestep: 1 / timestep, r"a function's result, must be finite, got inf at \(0,\)"),
    ],
)
def test_costs_that_define_no_clustering_are_refused(cost, message):
    with pytest.raises(ValueError, match=message):
        cluster_timesteps(4, 2, cost=cost)


def test_an_unknown_scheduler_is_a_type_error():
    with pytest.raises(TypeError):
        cluster_timesteps("ddpm", 2)


@given(st.sets(st.integers(1, 40), min_size=1))
def test_clusters_tile_the_timesteps(edges):
    clusters = TimestepClusters([0, *sorted(edges)])
    assert [t for cluster in clusters for t in cluster] == list(range(clusters.num_train_timesteps))
    assert len(clusters) == len(list(clusters))
    assert clusters[-1] == clusters[len(clusters) - 1] == list(clusters)[-1]
    expected = [i for i, cluster in enumerate(clusters) for _ in cluster]
    assert clusters.assign(torch.arange(clusters.num_train_timesteps)).tolist() == expected


def test_index_past_the_end_is_an_index_error():
    with pytest.raises(IndexError):
        TimestepClusters([0, 2, 5])[2]


@pytest.mark.parametrize("boundaries", [[], [0], [1, 4], [0, 4, 4], [0, 5, 4], [0.0, 4.0], [0, 2.5, 4]])
def test_boundaries_that_do_not_tile_are_refused(boundaries):
    with pytest.raises(ValueError, match="`boundaries`"):
        TimestepClusters(boundaries)


@pytest.mark.parametrize("timesteps", [[1.0, 2.0], [1.0, 3.0, 2.0], [1.0, 1.0, 2.0], [0.0, 1.0, torch.inf]])
def test_grids_that_do_not_increase_or_fit_are_refused(timesteps):
    with pytest.raises(ValueError, match="`timesteps`"):
        TimestepClusters([0, 1, 3], timesteps=timesteps)


def test_timesteps_between_grid_points_go_to_the_nearest_and_the_noisier():
    clusters = TimestepClusters([0, 10, 20])
    timesteps = torch.tensor([9.0, 9.49, 9.5, 9.51, -4.0, 25.0], dtype=torch.float64)
    assert clusters.assign(timesteps).tolist() == [0, 0, 1, 1, 0, 1]
    edm = TimestepClusters([0, 1, 3], timesteps=[-1.5, -0.5, 1.0])
    assert edm.assign(torch.tensor([-9.0, -1.1, -1.0, -0.9, 0.3, 7.0])).tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float32, torch.float64, torch.bfloat16])
def test_timesteps_of_any_type_are_assigned(dtype):
    assigned = TimestepClusters([0, 100, 200]).assign(torch.tensor([0, 64, 128], dtype=dtype))
    assert assigned.dtype == torch.int64
    assert assigned.tolist() == [0, 0, 1]


def test_nan_belongs_to_no_cluster():
    with pytest.raises(ValueError, match="NaN at index 1"):
        TimestepClusters([0, 2, 4]).assign(torch.tensor([0.0, torch.nan]))


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=3.0), EDMEulerScheduler()])
def test_real_valued_grids_are_carried(scheduler):
    clusters = cluster_timesteps(scheduler, num_clusters=5)
    grid = NoiseLevels(scheduler).timesteps
    expected = [i for i, cluster in enumerate(clusters) for _ in cluster]
    assert clusters.assign(grid).tolist() == expected
    drawn = clusters.sample(50, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert torch.isin(drawn, grid.float()).all()
    assert clusters.assign(drawn).bincount(minlength=5).tolist() == [10] * 5


def test_a_discrete_grid_is_not_stored():
    clusters = cluster_timesteps(EulerDiscreteScheduler(), num_clusters=4, cost="uniform")
    assert clusters == TimestepClusters([0, 250, 500, 750, 1000])
    assert clusters.to_dict() == {"boundaries": [0, 250, 500, 750, 1000]}


@pytest.mark.parametrize(
    "clusters",
    [
        TimestepClusters([0, 67, 188, 1000]),
        cluster_timesteps(FlowMatchEulerDiscreteScheduler(shift=3.0), num_clusters=3),
    ],
    ids=["discrete", "real"],
)
def test_clusters_survive_json_copy_and_pickle(clusters):
    clusters.assign(torch.zeros(1))
    copies = [
        TimestepClusters.from_dict(json.loads(json.dumps(clusters.to_dict()))),
        copy.deepcopy(clusters),
        pickle.loads(pickle.dumps(clusters)),
    ]
    assert all(other == clusters and hash(other) == hash(clusters) for other in copies)


def test_other_clusters_and_other_grids_are_unequal():
    clusters = TimestepClusters([0, 1, 3])
    assert clusters != TimestepClusters([0, 2, 3])
    assert clusters != TimestepClusters([0, 1, 3], timesteps=[0.0, 1.0, 2.5])
    assert clusters == TimestepClusters([0, 1, 3], timesteps=[0.0, 1.0, 2.0])


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="got \\['boundaries', 'k'\\]"):
        TimestepClusters.from_dict({"boundaries": [0, 3], "k": 1})
    with pytest.raises(ValueError, match="'boundaries'"):
        TimestepClusters.from_dict({})


def test_clusters_are_immutable():
    with pytest.raises(AttributeError):
        TimestepClusters([0, 3]).boundaries = (0, 4)


def test_repr_is_short_and_shows_the_edges():
    assert repr(TimestepClusters([0, 5, 9])) == "TimestepClusters((0, 5, 9))"
    grid = TimestepClusters([0, 1, 3], timesteps=[0.5, 1.0, 1000.0])
    assert repr(grid) == "TimestepClusters((0, 1, 3), timesteps=(0.5, ..., 1000))"


def test_clustering_and_sampling_ignore_the_default_device():
    expected = TimestepClusters([0, 3, 9]).sample(6, generator=torch.Generator().manual_seed(3))
    with torch.device("meta"):
        clusters = cluster_timesteps(9, 2, cost="timestep")
        drawn = TimestepClusters([0, 3, 9]).sample(6, generator=torch.Generator("cpu").manual_seed(3))
    assert clusters.boundaries == cluster_timesteps(9, 2, cost="timestep").boundaries
    assert drawn.device.type == "cpu"
    assert torch.equal(drawn, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_assigning_sampling_and_density_do_not_wait_for_the_device():
    clusters = TimestepClusters([0, 67, 188, 1000])
    clusters.assign(torch.zeros(1, device="cuda"))  # The tables move to the device once.
    generator = torch.Generator().manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        timesteps = clusters.sample(64, generator=generator, device="cuda")
        assigned, density = clusters.assign(timesteps), clusters.density(timesteps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(assigned.cpu(), clusters.assign(timesteps.cpu()))
    assert torch.equal(density.cpu(), clusters.density(timesteps.cpu()))
