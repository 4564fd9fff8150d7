"""The pictures of a model card."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..routing import DEFAULT_TIMESTEP_RANGE
from ..visualization import draw_routing_masks
from .trained_model import TrainedModel


FIGURES = "figures"
MASKS_FILE = f"{FIGURES}/routing_masks.png"
SAMPLES_FILE = f"{FIGURES}/samples.png"

# Grids of tiny images are enlarged to about this width, without smoothing.
_SAMPLES_WIDTH = 400
_GAP = 6


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
            side = model.arguments.get("resolution")
            _spread_out(grid.convert("RGB"), side).save(card_dir / SAMPLES_FILE, optimize=True)


def copy_drawing(source: Path, target: Path) -> None:
    """Copy a drawing of few colours, as a file of half the size."""
    with Image.open(source) as drawing:
        drawing.convert("RGB").quantize(64).save(target, optimize=True)


def shows_masks(model: TrainedModel) -> bool:
    """Whether there is a sliding window to be drawn."""
    return model.is_routed and model.denoiser["routing_type"] == "dtr" and bool(model.routed_widths)


def _spread_out(grid: Image.Image, side: int | None) -> Image.Image:
    """The samples of a grid with gaps between them: images of digits run into each other without."""
    if side is None or grid.width % side or grid.height % side:
        return grid
    scale = max(1, round(_SAMPLES_WIDTH / grid.width))
    step = side * scale + _GAP
    columns, rows = grid.width // side, grid.height // side
    spread = Image.new("RGB", (columns * step - _GAP, rows * step - _GAP), "white")
    for row in range(rows):
        for column in range(columns):
            sample = grid.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
            enlarged = sample.resize((side * scale, side * scale), Image.Resampling.NEAREST)
            spread.paste(enlarged, (column * step, row * step))
    return spread


def _draw_masks(model: TrainedModel, path: Path) -> None:
    config = model.denoiser
    figure = draw_routing_masks(
        model.routed_widths[:1],
        alpha=config["routing_alpha"],
        beta=config["routing_beta"],
        timestep_range=config.get("routing_timestep_range") or DEFAULT_TIMESTEP_RANGE,
    )
    figure.savefig(path, dpi=100)
