import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from matplotlib import pyplot
from matplotlib.figure import Figure

from diffusers_dtr import NoiseLevels, TaskAffinity, TimestepClusters, routing_mask
from diffusers_dtr.analysis import noise_distance_correlation
from diffusers_dtr.visualization import (
    draw_routing_masks,
    plot_affinity_by_noise_distance,
    plot_cluster_boundaries,
    plot_cluster_gaps,
    plot_cluster_losses,
    plot_routing_masks,
    plot_task_affinity,
)


HISTORY = [
    {"step": 10, "clusters": [0.1, 1.0, None]},
    {"step": 20, "clusters": [0.2, None, None]},
    {"step": 30, "clusters": [0.3, 0.5, None]},
]
GAPS = {"plain": ([1.0, -2.0], [0.5, -3.0], [2.0, -1.5]), "routed": ([0.0, 1.0], [-1.0, 0.0], [1.0, 2.0])}
LEVELS = NoiseLevels(DDPMScheduler(rescale_betas_zero_snr=True))
CLUSTERS = {"even": TimestepClusters([0, 500, 1000]), "odd": TimestepClusters([0, 100, 600, 1000])}


# Of four timesteps, the last of which is pure noise.
FOUR = torch.tensor([0.0, 300.0, 600.0, 999.0], dtype=torch.float64)
FALLING = torch.exp(-(FOUR[:, None] - FOUR).abs() / 500)
AFFINITY = TaskAffinity(FALLING, FOUR, LEVELS.timesteps, LEVELS.log_snr(FOUR), 0.9, "plain")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


@pytest.mark.parametrize(
    "plot",
    [
        lambda **o: plot_cluster_losses(HISTORY, **o),
        lambda **o: plot_routing_masks(8, **o),
        lambda **o: plot_task_affinity(AFFINITY, **o),
        lambda **o: plot_affinity_by_noise_distance(AFFINITY, **o),
        lambda **o: plot_cluster_boundaries(CLUSTERS, LEVELS, **o),
        lambda **o: plot_cluster_gaps(GAPS, **o),
    ],
)
def test_plots_draw_on_the_axes_given_or_on_new_ones(plot):
    ax, before = Figure().add_subplot(), pyplot.get_fignums()
    assert plot(ax=ax) is ax
    assert pyplot.get_fignums() == before
    assert ax.has_data()
    new = plot()
    assert new.has_data()
    assert new.figure.number in pyplot.get_fignums()
    assert plot().figure is not new.figure
    new.figure.canvas.draw()


def test_every_cluster_is_a_line_that_goes_on_where_it_had_no_samples():
    ax = plot_cluster_losses(HISTORY)
    assert [line.get_label() for line in ax.lines] == ["cluster 0", "cluster 1", "cluster 2"]
    lines = [line.get_xydata().tolist() for line in ax.lines]
    assert lines == [[[10, 0.1], [20, 0.2], [30, 0.3]], [[10, 1.0], [30, 0.5]], []]
    assert len({line.get_color() for line in ax.lines}) == len(ax.get_legend().get_texts()) == 3
    assert ax.get_yscale() == "log"
    assert ax.lines[0].get_marker() == "."  # one reading is no line


def test_masks_are_those_of_the_routing_and_stand_side_by_side():
    routing = {"alpha": 2.0, "beta": 0.5, "timestep_range": (0, 9)}
    (image,) = plot_routing_masks(10, **routing).images
    shown = np.asarray(image.get_array())
    assert shown.shape == (10, 500)
    for column, timestep in ((0, 0), (-1, 9)):
        assert np.array_equal(shown[:, column], routing_mask(timestep, 10, **routing)[0])
    assert (shown.sum(0) == 5).all()
    assert image.get_extent() == [0, 9, 0, 10]
    several = [ax.images[0].get_array() for ax in draw_routing_masks([10, 16], **routing).axes]
    assert np.array_equal(several[0], shown)
    assert len(several[1]) == 16


def test_heat_map_is_the_full_matrix_with_timesteps_and_noise_levels():
    ax = plot_task_affinity(AFFINITY)
    (image,), (above,) = ax.images, ax.child_axes
    assert np.array_equal(image.get_array(), AFFINITY.full_matrix().numpy())
    assert image.get_clim() == (-1, 1)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "250", "500", "749", "999"]
    assert above.get_xticks().tolist() == [0, 300, 600]
    expected = [f"{value:.1f}" for value in AFFINITY.log_snr[:3].tolist()]
    assert [label.get_text() for label in above.get_xticklabels()] == expected


def test_pairs_of_timesteps_are_points_under_their_correlation():
    ax = plot_affinity_by_noise_distance(AFFINITY)
    points = ax.collections[0].get_offsets()
    assert len(points) == 3  # pairs with pure noise have no distance
    assert (np.diff(points[:, 0]) > 0).all()
    assert sorted(points[:, 1]) == pytest.approx(sorted(AFFINITY.matrix[[0, 0, 1], [1, 2, 2]].tolist()))
    assert ax.get_title() == f"Spearman rank correlation {noise_distance_correlation(AFFINITY):.2f}"


def test_boundaries_are_bars_that_tile_the_noise_levels():
    ax = plot_cluster_boundaries(CLUSTERS, LEVELS)
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
    log_snr = LEVELS.log_snr(LEVELS.timesteps).tolist()
    clean, noisy = log_snr[0], log_snr[998]
    halfway = {i: (log_snr[i - 1] + log_snr[i]) / 2 for i in (100, 500, 600)}
    even = [(0, clean, halfway[500]), (0, halfway[500], noisy)]
    odd = [(1, clean, halfway[100]), (1, halfway[100], halfway[600]), (1, halfway[600], noisy)]
    assert bars == [pytest.approx(bar) for bar in even + odd]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["even", "odd"]
    assert [text.get_text().strip() for text in ax.texts] == ["0", "500", "0", "100", "600"]


def test_gaps_are_bars_side_by_side_with_their_intervals():
    ax = plot_cluster_gaps(GAPS)
    plain, routed = [container for container in ax.containers if hasattr(container, "patches")]
    assert [bar.get_height() for bar in (*plain, *routed)] == [1.0, -2.0, 0.0, 1.0]
    assert plain[0].get_x() + plain[0].get_width() == pytest.approx(routed[0].get_x())
    ends = [segment[:, 1].tolist() for segment in plain.errorbar.lines[2][0].get_segments()]
    assert ends == [[0.5, 2.0], [-3.0, -1.5]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["plain", "routed"]


SHORT = {"short": TimestepClusters([0, 10])}


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda: plot_cluster_losses([]), "`history` must have at least one entry, got none"),
        (lambda: plot_routing_masks(8, timestep_range=(0, 1, 2)), "`routing_timestep_range`"),
        (lambda: plot_cluster_boundaries({}, LEVELS), "`clusterings` must have at least one"),
        (lambda: plot_cluster_boundaries(SHORT, LEVELS), "of the 1000 timesteps of `levels`, got 'short' of 10"),
        (lambda: plot_cluster_gaps({}), "`gaps` must have the same number of clusters"),
        (lambda: plot_cluster_gaps({**GAPS, "short": ([1.0], [0.0], [2.0])}), "`gaps` must have the same number"),
    ],
)
def test_what_cannot_be_drawn_is_refused(plot, message):
    with pytest.raises(ValueError, match=message):
        plot()


@pytest.mark.parametrize("draw", [lambda: plot_routing_masks(8), lambda: draw_routing_masks([8])])
def test_missing_matplotlib_is_an_error_that_names_the_extra(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'need matplotlib: pip install "diffusers-dtr\[training\]"'):
        draw()
