import sys

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from diffusers_dtr.routing import routing_mask
from diffusers_dtr.visualization import plot_cluster_losses, plot_routing_masks


HISTORY = [
    {"step": 10, "loss": 1.0, "clusters": [0.1, 1.0, 3.0], "weights": [1.0, 1.0, 1.0]},
    {"step": 20, "loss": 1.0, "clusters": [0.2, None, 2.0], "weights": [1.0, 1.0, 1.0]},
    {"step": 30, "loss": 1.0, "clusters": [0.3, 0.5, 1.0], "weights": [1.0, 1.0, 1.0]},
]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


@pytest.mark.parametrize(
    "plot", [lambda **o: plot_cluster_losses(HISTORY, **o), lambda **o: plot_routing_masks(8, **o)]
)
def test_plots_draw_on_the_axes_given_or_on_new_ones(plot):
    ax = Figure().add_subplot()
    assert plot(ax=ax) is ax
    assert not pyplot.get_fignums()
    assert ax.has_data()
    new = plot()
    assert new.has_data()
    assert new.figure.number in pyplot.get_fignums()
    assert plot().figure is not new.figure


def test_every_cluster_is_a_line_in_a_colour_of_its_own():
    ax = plot_cluster_losses(HISTORY)
    assert [line.get_label() for line in ax.lines] == ["cluster 0", "cluster 1", "cluster 2"]
    assert ax.lines[0].get_xydata().tolist() == [[10, 0.1], [20, 0.2], [30, 0.3]]
    assert len({line.get_color() for line in ax.lines}) == 3
    assert len(ax.get_legend().get_texts()) == 3
    assert ax.get_yscale() == "log"


def test_line_goes_on_where_a_cluster_had_no_samples():
    ax = plot_cluster_losses(HISTORY)
    assert ax.lines[1].get_xydata().tolist() == [[10, 1.0], [30, 0.5]]


def test_cluster_that_never_had_samples_is_in_the_legend():
    history = [{**entry, "clusters": [0.1, None]} for entry in HISTORY]
    assert [len(line.get_xydata()) for line in plot_cluster_losses(history).lines] == [3, 0]


def test_single_cluster_and_single_reading_are_drawn():
    ax = plot_cluster_losses([{"step": 1, "clusters": [0.5]}])
    assert ax.lines[0].get_marker() == "."
    ax.figure.canvas.draw()


def test_empty_history_is_refused():
    with pytest.raises(ValueError, match="`history` must have at least one entry, got none"):
        plot_cluster_losses([])


def test_masks_are_those_of_the_routing():
    ax = plot_routing_masks(10, alpha=2.0, beta=0.5, timestep_range=(0, 9))
    (image,) = ax.images
    shown = np.asarray(image.get_array())
    assert shown.shape == (10, 500)
    assert np.array_equal(shown[:, -1], routing_mask(9, 10, alpha=2.0, beta=0.5, timestep_range=(0, 9))[0])
    assert np.array_equal(shown[:, 0], routing_mask(0, 10, alpha=2.0, beta=0.5, timestep_range=(0, 9))[0])
    assert (shown.sum(0) == 5).all()
    assert image.get_extent() == [0, 9, 0, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "`routing_beta`"),
        ({"alpha": -1.0}, "`routing_alpha`"),
        ({"timestep_range": (5, 5)}, "`routing_timestep_range`"),
        ({"timestep_range": (0, 1, 2)}, "`routing_timestep_range`"),
    ],
)
def test_masks_of_no_routing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plot_routing_masks(8, **options)


def test_missing_matplotlib_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers-dtr\[training\]'"):
        plot_routing_masks(8)
