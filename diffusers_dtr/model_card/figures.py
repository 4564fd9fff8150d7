"""The pictures of a model card."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from ..routing import DEFAULT_TIMESTEP_RANGE
from .trained_model import TrainedModel


FIGURES = "figures"
MASKS_FILE = f"{FIGURES}/routing_masks.png"
SAMPLES_FILE = f"{FIGURES}/samples.png"

# Grids of tiny images are enlarged to about this width, without smoothing.
_SAMPLES_WIDTH = 400


def draw_figures(model: TrainedModel, card_dir: Path) -> None:
    """Draw the pictures that a model's card shows.

    Args:
        model: The model.
        card_dir: Folder of the card.

    Raises:
        ImportError: Without matplotlib.
    """
    (card_dir / FIGURES).mkdir(parents=True, exist_ok=True)
    if shows_masks(model):
        _draw_masks(model, card_dir / MASKS_FILE)
    samples = model.last_samples()
    if samples is not None:
        with Image.open(samples) as grid:
            scale = max(1, round(_SAMPLES_WIDTH / grid.width))
            size = (grid.width * scale, grid.height * scale)
            grid.convert("RGB").resize(size, Image.Resampling.NEAREST).save(card_dir / SAMPLES_FILE, optimize=True)


def shows_masks(model: TrainedModel) -> bool:
    """Whether there is a sliding window to be drawn."""
    return model.is_routed and model.denoiser["routing_type"] == "dtr" and bool(model.widths)


def _draw_masks(model: TrainedModel, path: Path) -> None:
    if find_spec("matplotlib") is None:
        raise ImportError("The card's figures need matplotlib: pip install 'diffusers-dtr[training]'.")
    from matplotlib.figure import Figure

    from ..visualization import plot_routing_masks

    config = model.denoiser
    figure = Figure(figsize=(6, 3), layout="constrained")
    plot_routing_masks(
        model.widths[0],
        alpha=config["routing_alpha"],
        beta=config["routing_beta"],
        timestep_range=config.get("routing_timestep_range") or DEFAULT_TIMESTEP_RANGE,
        ax=figure.add_subplot(),
    )
    figure.savefig(path, dpi=100)
