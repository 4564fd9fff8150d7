"""matplotlib, which pictures need and nothing else does."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_matplotlib() -> None:
    """Raise an ImportError that says how to install matplotlib, if it is not there."""
    if find_spec("matplotlib") is None:
        raise ImportError("Pictures need matplotlib: pip install 'diffusers-dtr[training]'.")


def axes_or_new(ax: Axes | None) -> Axes:
    """The Axes that are given, or those of a new figure.

    Raises:
        ImportError: Without matplotlib.
    """
    if ax is not None:
        return ax
    check_matplotlib()
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]
