"""`diffusers-dtr inspect`: what a saved model is, without loading its weights."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..models.without_weights import saved_routing
from ..pipelines.model_index import pipeline_class_name
from ..run_folder import PIPELINE_INDEX, RECORD_FILE
from ..training.checkpoints import STATE_FILE
from ..visualization import draw_routing_masks
from .options import add_hub_arguments, new_parser
from .outputs import new_output
from .sources import Source, open_source


_EXAMPLE = """\
  diffusers-dtr inspect ./demo/pipeline
  diffusers-dtr inspect owner/model --masks masks.png
  diffusers-dtr inspect my-run/checkpoint-20000 --json"""

# As torch calls them.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SCHEDULER_KEYS = ("num_train_timesteps", "beta_schedule", "prediction_type", "variance_type")


def add_parser(subparsers) -> None:
    """Add the command's parser."""
    parser = new_parser(
        subparsers,
        "inspect",
        "Say what a saved model is: routing, clusters, parameters, scheduler.",
        "Reads configs and the headers of safetensors files, so that the size of the weights does not matter,\n"
        "here or on the Hub.",
        _EXAMPLE,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="A pipeline, a model or a checkpoint of a run: its folder, or a repository."
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument(
        "--masks", metavar="PNG", help="Draw which channels are active when into this file; it must not exist."
    )
    add_hub_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the description."""
    description = describe(open_source(args.model, args.revision, args.token))
    if args.masks is not None:
        _draw_masks(description["routing"], args.masks)
    print(json.dumps(description, indent=2, ensure_ascii=False) if args.json else _as_text(description))


def describe(source: Source) -> dict[str, Any]:
    """What a saved pipeline, model or checkpoint is, of JSON types.

    Args:
        source: Where it is.

    Returns:
        `pipeline`, `step` (of a checkpoint), `denoiser` (class, folder, number of parameters, dtypes, classes),
        `routing`, `clusters`, `scheduler` and `vae`; None where there is no such thing.

    Raises:
        ValueError: If there is no denoiser.
    """
    index = source.read_json(PIPELINE_INDEX) or {}
    state = source.read_json(STATE_FILE) or {}
    record = source.read_json(RECORD_FILE) or {}
    folder, config = _denoiser(source)
    counts = source.parameter_counts(folder)
    scheduler = source.read_json("scheduler/scheduler_config.json")
    vae = source.read_json("vae/config.json") if index else None
    return {
        "pipeline": pipeline_class_name(index),
        "step": state.get("global_step"),
        "denoiser": {
            "class": config["_class_name"],
            "folder": folder.rstrip("/") or None,
            "parameters": sum(counts.values()) or None,
            "dtypes": [_DTYPES.get(name, name) for name in sorted(counts)],
            "classes": config.get("num_embeds_ada_norm") or config.get("num_class_embeds"),
            "averaged_beside_it": source.read_json(f"{folder.rstrip('/')}_ema/config.json") is not None,
        },
        "routing": _routing(config),
        "clusters": record.get("clusters"),
        "scheduler": scheduler and {"class": scheduler.get("_class_name"), **_part(scheduler, _SCHEDULER_KEYS)},
        "vae": vae and vae.get("_class_name"),
    }


def _denoiser(source: Source) -> tuple[str, dict[str, Any]]:
    """Its folder, with a `/` behind, and its config."""
    for folder in ("transformer/", "unet/", ""):
        config = source.read_json(f"{folder}config.json")
        if config is not None and "_class_name" in config:
            return folder, config
    raise ValueError(
        "There is no diffusers model: no config.json with a `_class_name`, here or in `transformer` or `unet`."
    )


def _part(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: config[key] for key in keys if config.get(key) is not None}


def _routing(config: dict[str, Any]) -> dict[str, Any] | None:
    """The routing of a routed model's config, with the number of active channels of every width."""
    saved = saved_routing(config)
    if saved is None:
        return None
    routing, widths = saved
    share = 1.0 if routing.routing_type == "none" else routing.beta
    return {
        "type": routing.routing_type,
        "alpha": routing.alpha,
        "beta": routing.beta,
        "seed": routing.seed,
        "timestep_range": list(routing.timestep_range),
        "widths": [{"channels": width, "active": int(share * width)} for width in widths],
    }


def _draw_masks(routing: dict[str, Any] | None, path: str) -> None:
    if routing is None or routing["type"] != "dtr":
        kind = "none" if routing is None else repr(routing["type"])
        raise ValueError(f'`--masks` shows routing of type "dtr", the sliding window; this model has {kind}.')
    widths = [width["channels"] for width in routing["widths"]]
    figure = draw_routing_masks(widths, **{name: routing[name] for name in ("alpha", "beta", "timestep_range")})
    with new_output(path, suffix=".png") as partial:
        figure.savefig(partial)


def _as_text(description: dict[str, Any]) -> str:
    denoiser, routing, clusters = (description[name] for name in ("denoiser", "routing", "clusters"))
    rows = [("pipeline", description["pipeline"]), ("step", description["step"])]
    rows.append(("denoiser", denoiser["class"] + (f" in {denoiser['folder']}/" if denoiser["folder"] else "")))
    parameters = "no safetensors weights" if denoiser["parameters"] is None else f"{denoiser['parameters']:,}"
    rows.append(("parameters", " ".join([parameters, *denoiser["dtypes"]])))
    rows.append(("averaged", f"{denoiser['folder']}_ema/" if denoiser["averaged_beside_it"] else None))
    rows.append(("classes", denoiser["classes"]))
    rows += [("routing", "none, not a routed model")] if routing is None else _routing_rows(routing)
    if clusters is not None:
        edges = ", ".join(f"{edge:g}" for edge in clusters["boundaries"])
        rows.append(("clusters", f"{clusters['num_clusters']} of timesteps, bounded by {edges}"))
    if description["scheduler"]:
        values = dict(description["scheduler"])
        rows.append(("scheduler", ", ".join([values.pop("class"), *(f"{key}={values[key]}" for key in values)])))
    rows.append(("vae", description["vae"]))
    return "\n".join(f"{name:<11} {value}" for name, value in rows if value is not None)


def _routing_rows(routing: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = routing["timestep_range"]
    numbers = {
        "dtr": f"alpha={routing['alpha']:g}, beta={routing['beta']:g}, timesteps {low:g} to {high:g}",
        "random": f"beta={routing['beta']:g}, seed={routing['seed']}, timesteps {low:g} to {high:g}",
        "none": "all channels are active",
    }
    widths = ", ".join(f"{width['active']} of {width['channels']}" for width in routing["widths"])
    return [("routing", f"{routing['type']}, {numbers[routing['type']]}"), ("active", f"{widths} channels")]
