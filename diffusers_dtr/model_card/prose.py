"""The sentences and the code of a model card."""

from __future__ import annotations

import json
import shlex

from ..publishing import LOCAL_PREFIX
from .trained_model import TrainedModel


_DENOISERS = {
    "DTRTransformer2DModel": "diffusion transformer (DiT)",
    "DTRUNet2DModel": "U-Net",
    "DTRUNet2DConditionModel": "Stable Diffusion U-Net",
    "DTRPixArtTransformer2DModel": "PixArt transformer",
    "DTRSD3Transformer2DModel": "Stable Diffusion 3 transformer",
    "DTRFluxTransformer2DModel": "Flux transformer",
}


def overview(model: TrainedModel) -> str:
    """One paragraph that says what the model is."""
    arguments = model.arguments
    denoiser = _DENOISERS.get(model.denoiser.get("_class_name"), "diffusion model")
    kind = "text-to-image" if model.is_text_to_image else "class-conditional" if model.num_classes else "unconditional"
    article = "An" if kind == "unconditional" and not model.is_adapter else "A"
    parts = [f"{'LoRA weights for a' if model.is_adapter else article} {kind} {denoiser}"]
    if model.is_routed:
        parts.append("with Denoising Task Routing")
    size = model.record.get("model", {}).get("num_parameters")
    if size is not None:
        parts.append(f"({size:,} parameters)")
    base, dataset = model.hub_id("pretrained_model_name_or_path"), model.hub_id("dataset_name")
    if arguments:
        verb = "trained from scratch" if arguments.get("pretrained_model_name_or_path") is None else "fine-tuned"
        parts.append(f", {verb}" + ("" if base is None else f" from [{base}](https://huggingface.co/{base})"))
    if dataset is not None:
        parts.append(f"on [{dataset}](https://huggingface.co/datasets/{dataset})")
    elif "num_images" in model.record:
        parts.append(f"on {model.record['num_images']:,} images")
    if "resolution" in arguments:
        parts.append(f"at {arguments['resolution']}×{arguments['resolution']} pixels")
    return " ".join(parts).replace(" ,", ",") + "." + _class_names(model)


def samples_caption(model: TrainedModel) -> str:
    """How the samples were made."""
    arguments = model.arguments
    subject = "Samples of the classes in turn" if model.num_classes else "Samples"
    guidance, steps = (arguments.get(f"validation_{name}") for name in ("guidance_scale", "num_inference_steps"))
    settings = [
        None if guidance is None else "without guidance" if guidance <= 1 else f"guidance {guidance:g}",
        None if steps is None else f"{steps} steps",
    ]
    return ", ".join([f"{subject}, not picked", *filter(None, settings)]) + "."


def wrap_command(command: str, width: int = 100) -> str:
    """A command over several lines, broken before flags, still to be typed as it is.

    Args:
        command: Quoted for a shell.
        width: Characters that a line has at most, unless one flag with its values has more.
    """
    pieces: list[str] = []
    for word in shlex.split(command):
        if word.startswith("--") or not pieces:
            pieces.append(shlex.quote(word))
        else:
            pieces[-1] += f" {shlex.quote(word)}"
    lines = pieces[:1]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) < width:
            lines[-1] += f" {piece}"
        else:
            lines.append(f"  {piece}")
    return " \\\n".join(lines)


def loading_code(model: TrainedModel, repo_id: str | None, name: str) -> str:
    """Python that loads the model and makes an image."""
    source = repo_id or f"{LOCAL_PREFIX}{name}"
    if model.is_adapter:
        return _adapter_code(model, source)
    pipeline_class = model.pipeline_class or "DTRPipeline"
    if pipeline_class == "DTRPipeline":
        lines = ["from diffusers_dtr import DTRPipeline"]
    else:
        lines = [
            "import diffusers_dtr  # lets diffusers find the routed model",
            f"from diffusers import {pipeline_class}",
        ]
    return "\n".join([*lines, "", f'pipe = {pipeline_class}.from_pretrained("{source}")', _call(model)])


def _adapter_code(model: TrainedModel, source: str) -> str:
    base = model.hub_id("pretrained_model_name_or_path") or f"{LOCAL_PREFIX}base-model"
    config, routed_class = model.denoiser, model.denoiser.get("_class_name", "")
    lines = ["from diffusers import DiffusionPipeline"]
    routing = []
    if routed_class in _DENOISERS:
        lines.append(f"from diffusers_dtr import {routed_class}")
        component = "unet" if "UNet" in routed_class else "transformer"
        keys = sorted(key for key in config if key.startswith("routing_") and config[key] is not None)
        values = ", ".join(f"{key}={config[key]!r}" for key in keys)
        routing = [f"pipe.{component} = {routed_class}.from_{component}(pipe.{component}, {values})"]
    load = [f'pipe = DiffusionPipeline.from_pretrained("{base}")', *routing, f'pipe.load_lora_weights("{source}")']
    return "\n".join([*lines, "", *load, _call(model)])


def _call(model: TrainedModel) -> str:
    if model.is_text_to_image:
        prompt = model.arguments.get("validation_prompts") or model.arguments.get("validation_prompt") or "a prompt"
        prompt = prompt if isinstance(prompt, str) else prompt[0]
        return f"image = pipe({prompt!r}).images[0]"
    labels = model.index.get("id2label")
    if not model.num_classes:
        call = "pipe()" if model.pipeline_class != "DTRPipeline" else "pipe(num_images=4)"
    elif labels and model.pipeline_class == "DTRPipeline":
        call = f"pipe(class_labels={json.dumps([next(iter(labels.values())).split(',')[0]], ensure_ascii=False)})"
    else:
        call = "pipe(class_labels=[0])"
    return f"images = {call}.images"


def _class_names(model: TrainedModel) -> str:
    if not model.num_classes:
        return ""
    labels = [label.split(",")[0] for label in (model.index.get("id2label") or {}).values()]
    if not 0 < len(labels) <= 20:
        return f" It knows {model.num_classes} classes."
    return f" Its classes are {', '.join(labels)}."
