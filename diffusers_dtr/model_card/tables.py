"""The tables of a model card: rows of texts, without rows of what is not known."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..routing import DEFAULT_TIMESTEP_RANGE
from .trained_model import TrainedModel


Rows = list[tuple[str, ...]]

_COSTS = {
    "uniform": "equal widths",
    "timestep": "the best by distance in timesteps",
    "snr": "the best by distance in log SNR",
    "affinity": "the best by task affinity",
}
_BALANCINGS = {
    "uniform": "none: all clusters weigh the same",
    "uncertainty": "uncertainty weighting (ANT-UW)",
    "continuous_uncertainty": "continuous uncertainty weighting, as in EDM2",
    "pcgrad": "PCGrad",
    "nash_mtl": "Nash-MTL",
}


def routing_rows(model: TrainedModel) -> Rows:
    """What Denoising Task Routing is set to."""
    config = model.denoiser
    beta = config.get("routing_beta", 1)
    low, high = config.get("routing_timestep_range") or DEFAULT_TIMESTEP_RANGE
    sliding = config.get("routing_type") == "dtr"
    active = ", ".join(f"{int(beta * width)} of {width}" for width in model.routed_widths)
    warmup = model.arguments.get("routing_warmup_steps")
    return _rows(
        ("routed class", _code(config.get("_class_name"))),
        ("routing", "sliding window" if sliding else "random channels, the paper's baseline"),
        ("share of active channels β", beta),
        ("active channels", active),
        ("exponent of the slide α", config.get("routing_alpha") if sliding else None),
        ("seed", None if sliding else config.get("routing_seed")),
        ("timesteps of the slide", f"{_number(low)} to {_number(high)}" if sliding else None),
        ("warm-up from the unrouted model", f"{warmup} steps" if warmup else None),
    )


def objective_rows(model: TrainedModel) -> Rows:
    """What the clusters of timesteps and the loss are set to."""
    arguments, clusters = model.arguments, model.record.get("clusters", {})
    balancing, gamma = arguments.get("balancing"), arguments.get("snr_gamma")
    weighting = arguments.get("loss_weighting")
    return _rows(
        ("clusters", clusters.get("num_clusters")),
        ("chosen as", _COSTS.get(arguments.get("cluster_cost"), arguments.get("cluster_cost"))),
        ("balancing", _BALANCINGS.get(balancing, balancing)),
        ("timestep sampling", arguments.get("timestep_sampling")),
        ("weighting by noise level", weighting if gamma is None else f"{weighting}, γ = {_number(gamma)}"),
        ("prediction", model.scheduler.get("prediction_type")),
    )


def cluster_rows(model: TrainedModel) -> Rows:
    """Number, timesteps, last training loss and weight of every cluster."""
    clusters = model.record.get("clusters", {})
    edges, grid = clusters.get("boundaries", [0]), clusters.get("timesteps")
    count = len(edges) - 1
    losses = model.last_losses.get("clusters", [None] * count)
    weights = model.last_losses.get("weights", [None] * count)
    rows = []
    for number, (start, end) in enumerate(pairwise(edges)):
        first, last = (start, end - 1) if grid is None else (grid[start], grid[end - 1])
        values = (losses[number], weights[number])
        span = f"{_number(first)} to {_number(last)}"
        rows.append((str(number), span, *("–" if value is None else _number(value) for value in values)))
    return rows


def held_out_rows(model: TrainedModel) -> Rows:
    """The held-out loss of every eighth of the timesteps."""
    prefix = "validation_loss/eighth_"
    results = model.record.get("results", {}).items()
    losses = {int(key.removeprefix(prefix)): loss for key, loss in results if key.startswith(prefix)}
    return [(str(number), _number(losses[number])) for number in sorted(losses)]


def metric_rows(model: TrainedModel) -> Rows:
    """What was measured: name, value, settings."""
    return [
        (
            _cell(metric["name"]),
            f"{metric['value']:.1%}" if metric["type"] == "accuracy" else _cell(_number(metric["value"])),
            _cell(settings_text(metric.get("settings", {}))),
        )
        for metric in model.metrics
    ]


def settings_text(settings: dict[str, Any]) -> str:
    """Settings of an evaluation in one line."""
    return ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in settings.items())


def training_rows(model: TrainedModel) -> Rows:
    """How the model was trained."""
    arguments, record = model.arguments, model.record
    processes = record.get("num_processes", 1)
    batch = arguments.get("train_batch_size")
    if batch is not None:
        batch *= arguments.get("gradient_accumulation_steps", 1) * processes
    trained, total = (record.get("model", {}).get(key) for key in ("num_trained_parameters", "num_parameters"))
    schedule = arguments.get("lr_scheduler")
    ema = arguments.get("ema_max_decay") if arguments.get("use_ema") else None
    unreadable = record.get("unreadable_images")
    return _rows(
        ("trained parameters", None if trained in (None, total) else f"{trained:,} of {total:,}"),
        ("images", _count(record.get("num_images"))),
        ("optimizer steps", _count(arguments.get("max_train_steps"))),
        ("images per step", batch),
        ("peak learning rate", arguments.get("learning_rate")),
        ("schedule", schedule if not schedule else schedule.replace("_", " ")),
        ("moving average of the weights", None if ema is None else f"decay up to {_number(ema)}"),
        ("seed", arguments.get("seed")),
        ("precision", {"no": "float32"}.get(record.get("mixed_precision"), record.get("mixed_precision"))),
        ("hardware", record.get("hardware")),
        ("processes", processes if processes > 1 else None),
        ("duration", _duration(record.get("seconds"))),
        ("changed while it was trained", _changes(record.get("changed_settings"))),
        ("images left out because they cannot be read", len(unreadable) if unreadable else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())),
    )


def _changes(changes: list[dict[str, Any]] | None) -> str:
    """What was changed in resuming the run."""
    return "; ".join(
        f"{change['setting'].removeprefix('--').replace('_', ' ')} from {change['before']} to {change['after']} at "
        f"step {change['step']}"
        for change in changes or ()
    )


def _rows(*rows: tuple[str, Any]) -> Rows:
    return [(name, _cell(_number(value))) for name, value in rows if value not in (None, "")]


def _number(value: Any) -> str:
    """Four digits of a real number; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str | None) -> str | None:
    return None if text is None else f"`{text}`"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    units = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{count} {unit}" for count, unit in units if count) or "0 s"
