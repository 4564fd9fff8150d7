"""The metadata of a model card, which the Hub indexes."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .trained_model import TrainedModel


def card_metadata(model: TrainedModel, name: str, license: str | None = None) -> ModelCardData:
    """Describe a model to the Hub.

    Args:
        model: The model.
        name: What its results are listed under.
        license: Its license, as the Hub names it.

    Returns:
        The metadata, without what is not known.
    """
    base_model = model.hub_id("pretrained_model_name_or_path")
    dataset = model.hub_id("dataset_name")
    results = _results(model)
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=pipeline_tag(model),
        base_model=base_model,
        base_model_relation=None if base_model is None else "adapter" if model.is_adapter else "finetune",
        datasets=None if dataset is None else [dataset],
        tags=_tags(model),
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def pipeline_tag(model: TrainedModel) -> str:
    """The Hub's task; it has none for classes."""
    return "text-to-image" if model.is_text_to_image else "unconditional-image-generation"


def held_out_settings(model: TrainedModel) -> dict[str, Any]:
    """How the held-out loss of a training script was evaluated."""
    settings = {
        **(model.record.get("held_out") or {}),
        "split": model.arguments.get("validation_split"),
        "loss": "mean squared error of the prediction",
        "prediction_type": model.scheduler.get("prediction_type"),
        "weights": "exponential moving average" if model.arguments.get("use_ema") else None,
    }
    return {key: value for key, value in settings.items() if value is not None}


def _tags(model: TrainedModel) -> list[str]:
    kind = None if model.is_text_to_image or not model.num_classes else "class-conditional-image-generation"
    tags = ["diffusers", "diffusers-dtr", "denoising-task-routing", kind, "lora" if model.is_adapter else None]
    return [tag for tag in tags if tag is not None]


def _results(model: TrainedModel) -> list[EvalResult]:
    dataset = model.hub_id("dataset_name")
    task = {"task_type": pipeline_tag(model)}
    data = {"dataset_type": dataset or "imagefolder", "dataset_name": dataset or "a folder of images"}
    results = []
    loss = model.record.get("results", {}).get("validation_loss")
    if loss is not None:
        results.append(
            EvalResult(
                **task,
                **data,
                metric_type="mse",
                metric_name="Held-out denoising loss",
                metric_value=round(loss, 5),
                metric_args=held_out_settings(model),
            )
        )
    for metric in model.metrics:
        measured_on = metric.get("dataset")
        results.append(
            EvalResult(
                **task,
                **(data if measured_on is None else {"dataset_type": measured_on, "dataset_name": measured_on}),
                metric_type=metric["type"],
                metric_name=metric["name"],
                metric_value=metric["value"],
                metric_args=metric.get("settings") or None,
            )
        )
    return results
