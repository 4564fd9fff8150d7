"""`diffusers-dtr inspect`: what a saved model is, without loading its weights."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..config_types import check_types
from ..models.lora_header import WARNING_LAYER, header_routing
from ..pipelines.model_index import pipeline_class_name
from ..run_record import LORA_FILE, PIPELINE_INDEX, RECORD_FILE
from ..training.run.checkpoints import STATE_FILE
from ..user_errors import printable
from ..visualization import draw_routing_masks
from .options import new_output
from .saved_routing import saved_routing
from .sources import Source


DESCRIPTION = "Reads only configs and the headers of safetensors files: weights are not downloaded."
EXAMPLES = """\
  diffusers-dtr inspect ./demo/pipeline
  diffusers-dtr inspect owner/model --masks masks.png
  diffusers-dtr inspect my-run/checkpoint-20000 --json"""

# As torch calls them.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What is shown of a scheduler's config, and what else is read.
_SCHEDULER_TYPES = {
    "num_train_timesteps": int,
    **dict.fromkeys(("beta_schedule", "prediction_type", "variance_type"), str | None),
}
_DENOISER_TYPES = {"_class_name": str, "num_embeds_ada_norm": int | None, "num_class_embeds": int | None}
_RECORD_TYPES = dict.fromkeys(("arguments", "clusters", "model"), dict | None)
_CLUSTER_TYPES = {"num_clusters": int, "boundaries": list[float]}
# Where a denoiser may be.
_FOLDERS = ("transformer/", "unet/", "")
# The first of an adapter's two layers, whose outputs are as many as its rank.
_FIRST_LAYERS = ("lora_A.weight", "lora.down.weight", "lora_down.weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="Folder or repository of a pipeline, model, LoRA adapters or run's checkpoint.")
    add("--json", action="store_true", help="Print one JSON object.")
    add("--masks", metavar="PNG", help="Draw which channels are active when into this file; it must not exist.")


def run(args: argparse.Namespace) -> None:
    """Print the description."""
    description = describe(Source(args.model, args.revision, args.token))
    if args.masks is not None:
        _draw_masks(description["routing"], args.masks)
    print(json.dumps(description, indent=2, ensure_ascii=False) if args.json else _as_text(description))
    if args.masks is not None:  # and standard output stays one JSON object
        print(printable(f"{'masks':<11} {args.masks}"), file=sys.stderr if args.json else sys.stdout)


def describe(source: Source) -> dict[str, Any]:
    """The description of a saved pipeline, model, checkpoint or adapter, of JSON types; None for what it lacks."""
    index = source.read_json(PIPELINE_INDEX) or {}
    state = source.read_json(STATE_FILE, {"global_step": int}) or {}
    record = source.read_json(RECORD_FILE, _RECORD_TYPES) or {}
    check_types(_CLUSTER_TYPES, record.get("clusters") or {}, f"the clusters of `{RECORD_FILE}`")
    configs = ((folder, source.read_json(f"{folder}config.json", _DENOISER_TYPES)) for folder in _FOLDERS)
    folder, config = next((found for found in configs if "_class_name" in (found[1] or {})), ("", None))
    adapters = None if config else _adapters(source, record)
    if config is None and adapters is None:
        raise ValueError(
            "There is no diffusers model: no config.json with a `_class_name`, here or in `transformer` or `unet`, "
            f"and no {LORA_FILE}."
        )
    scheduler = source.read_json("scheduler/scheduler_config.json", {"_class_name": str, **_SCHEDULER_TYPES})
    shown = {key: scheduler[key] for key in _SCHEDULER_TYPES if scheduler.get(key) is not None} if scheduler else {}
    vae = source.read_json("vae/config.json", {"_class_name": str}) if index else None
    return {
        "pipeline": pipeline_class_name(index),
        "step": state.get("global_step"),
        "denoiser": _denoiser(source, folder, config) if config else None,
        "adapters": adapters,
        "routing": _routing(config) if config else _recorded_routing(record),
        "clusters": record.get("clusters"),
        "scheduler": scheduler and {"class": scheduler.get("_class_name"), **shown},
        "vae": vae and vae.get("_class_name"),
    }


def _denoiser(source: Source, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    counts = source.parameter_counts(folder)
    return {
        "class": config["_class_name"],
        "folder": folder.rstrip("/") or None,
        "parameters": sum(counts.values()) or None,
        "dtypes": [_DTYPES.get(name, name) for name in sorted(counts)],
        "classes": config.get("num_embeds_ada_norm") or config.get("num_class_embeds"),
        "averaged_beside_it": source.read_json(f"{folder.rstrip('/')}_ema/config.json") is not None,
    }


def _adapters(source: Source, record: dict[str, Any]) -> dict[str, Any] | None:
    """LoRA adapters, as pipelines load them or in a checkpoint of a run."""
    headers = (source.header(folder + LORA_FILE) for folder in ("", "transformer_lora/", "unet_lora/"))
    header = next((header for header in headers if header is not None), None)
    if header is None:
        return None
    tensors = {name: info for name, info in header.tensors.items() if WARNING_LAYER not in name}
    shapes = [info.shape for name, info in tensors.items() if name.endswith(_FIRST_LAYERS) and info.shape]
    routings = [*header_routing(header.metadata or {}, LORA_FILE).values()]
    return {
        "of": (record.get("model") or {}).get("class"),
        "for": (record.get("arguments") or {}).get("pretrained_model_name_or_path"),
        "ranks": sorted({shape[0] for shape in shapes}),
        "layers": len(shapes),
        "parameters": sum(header.parameter_count.values()) - (len(header.tensors) - len(tensors)),
        "routing": {name.removeprefix("routing_"): value for name, value in routings[0].items()} if routings else None,
        "dtypes": [_DTYPES.get(name, name) for name in sorted(header.parameter_count)],
    }


def _recorded_routing(record: dict[str, Any]) -> dict[str, Any] | None:
    """The routing of adapters, from the denoiser's config in a run's record."""
    model = record.get("model") or {}
    types = {"class": str, "config": dict | None, "routed_widths": list[int]}
    check_types(types, model, f"the model of `{RECORD_FILE}`")
    return _routing({**(model.get("config") or {}), "_class_name": model.get("class")}, model.get("routed_widths"))


def _routing(config: dict[str, Any], known_widths: list[int] | None = None) -> dict[str, Any] | None:
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
        "widths": [{"channels": width, "active": int(share * width)} for width in known_widths or widths],
    }


def _draw_masks(routing: dict[str, Any] | None, path: str) -> None:
    if routing is None or routing["type"] != "dtr":
        kind = "none" if routing is None else repr(routing["type"])
        raise ValueError(f'`--masks` shows routing of type "dtr", the sliding window; this model has {kind}.')
    widths = [width["channels"] for width in routing["widths"]]
    figure = draw_routing_masks(widths, **{name: routing[name] for name in ("alpha", "beta", "timestep_range")})
    with new_output(path, suffix=".png") as partial:
        figure.savefig(partial)


def _named_values(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _as_text(description: dict[str, Any]) -> str:
    denoiser, adapters, clusters = (description[name] for name in ("denoiser", "adapters", "clusters"))
    rows = [("pipeline", description["pipeline"]), ("step", description["step"])]
    if adapters is None:
        number = "no safetensors weights" if denoiser["parameters"] is None else f"{denoiser['parameters']:,}"
        rows += [
            ("denoiser", denoiser["class"] + (f" in {denoiser['folder']}/" if denoiser["folder"] else "")),
            ("parameters", " ".join([number, *denoiser["dtypes"]])),
            ("averaged", f"{denoiser['folder']}_ema/" if denoiser["averaged_beside_it"] else None),
            ("classes", denoiser["classes"]),
        ]
    else:
        ranks = ", ".join(map(str, adapters["ranks"]))
        rows += [
            ("adapters", f"LoRA of rank {ranks} for {adapters['layers']} layers"),
            ("of", adapters["of"]),
            ("for", adapters["for"]),
            ("channels", adapters["routing"] and f"of the rank are routed: {_named_values(adapters['routing'])}"),
            ("parameters", " ".join([f"{adapters['parameters']:,}", *adapters["dtypes"]])),
        ]
    rows += _routing_rows(description["routing"])
    if clusters is not None:
        edges = ", ".join(f"{edge:g}" for edge in clusters.get("boundaries", ()))
        rows.append(("clusters", f"{clusters.get('num_clusters')} of timesteps, bounded by {edges}"))
    if description["scheduler"]:
        values = dict(description["scheduler"])
        rows.append(("scheduler", ", ".join([str(values.pop("class")), _named_values(values)])))
    rows.append(("vae", description["vae"]))
    return "\n".join(printable(f"{name:<11} {value}") for name, value in rows if value is not None)


def _routing_rows(routing: dict[str, Any] | None) -> list[tuple[str, str]]:
    if routing is None:
        return [("routing", "none, not a routed model")]
    timesteps = "timesteps {:g} to {:g}".format(*routing["timestep_range"])
    numbers = {
        "dtr": f"alpha={routing['alpha']:g}, beta={routing['beta']:g}, {timesteps}",
        "random": f"beta={routing['beta']:g}, seed={routing['seed']}, {timesteps}",
        "none": "all channels are active",
    }
    widths = ", ".join(f"{width['active']} of {width['channels']}" for width in routing["widths"])
    return [("routing", f"{routing['type']}, {numbers[routing['type']]}"), ("active", f"{widths} channels")]
