"""A model, its data and a configuration are given apart to [`Trainer`]: what they say of each other must agree."""

from __future__ import annotations

from diffusers import ModelMixin, SchedulerMixin

from ..models.routed_model import RoutedModelMixin
from ..routing import DEFAULT_TIMESTEP_RANGE
from .components import family_of
from .config import TrainingConfig
from .data import TrainingData
from .lora import has_lora


def check_agreement(
    config: TrainingConfig, model: ModelMixin, data: TrainingData, noise_scheduler: SchedulerMixin
) -> None:
    """Refuse what would be recorded of a run, but not be done."""
    if not isinstance(model, RoutedModelMixin):
        raise ValueError(f"`model` must be routed, got a {type(model).__name__}: train `diffusers_dtr.route(model)`.")
    if not config.lora.route_lora:
        _check_routing(config, model, noise_scheduler)
    if has_lora(model) != (config.lora.rank is not None):
        has = "has adapters" if has_lora(model) else "has no adapters"
        raise ValueError(f"`--rank` is {config.lora.rank}, but the model {has}.")
    if config.model.vae_name_or_path is not None and data.vae is None:
        raise ValueError("`--vae_name_or_path` is given, but the data have no autoencoder: `load_data(..., vae=...)`.")
    known = model.config.get("num_embeds_ada_norm", model.config.get("num_class_embeds"))
    is_new = config.model.pretrained_model_name_or_path is None
    if data.images.captions is None and known != data.num_classes and (data.num_classes is not None or is_new):
        raise ValueError(
            f"The model has {known or 'no'} classes, but the data have {data.num_classes or 'none'}: make the model "
            "with `data.num_classes`, or train on data with labels (`LabelledDataConfig`) or without (`DataConfig`)."
        )


def _check_routing(config: TrainingConfig, model: RoutedModelMixin, noise_scheduler: SchedulerMixin) -> None:
    family = family_of(type(model))
    routing = {**model.config, "routing_timestep_range": list(family.range_of(model.config))}
    for name, value in config.routing.given.items():
        own = routing[name]
        if own != value:
            raise ValueError(f"`--{name}` is {value}, but the model has {own}: route it so, or leave the option out.")
    if family.timestep_range != DEFAULT_TIMESTEP_RANGE:
        return
    last = noise_scheduler.config.num_train_timesteps - 1
    if last != DEFAULT_TIMESTEP_RANGE[1] and routing["routing_timestep_range"] == list(DEFAULT_TIMESTEP_RANGE):
        raise ValueError(
            f"The model is routed over the timesteps {list(DEFAULT_TIMESTEP_RANGE)}, but there are {last + 1}: give "
            f"it `routing_timestep_range`=(0, {last})."
        )
