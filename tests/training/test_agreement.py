"""A model, its data and a configuration that do not agree are refused before anything is done."""

from types import SimpleNamespace

import pytest
from diffusers import DDPMScheduler
from run_config import run_config
from tiny_dit import plain_dit, routed_dit

from diffusers_dtr.training.agreement import check_agreement
from diffusers_dtr.training.lora import add_lora


def data(num_classes=3, vae=None):
    images = SimpleNamespace(captions=None)
    return SimpleNamespace(images=images, num_classes=num_classes, vae=vae)


def agree(model=None, num_classes=3, vae=None, num_train_timesteps=1000, **options):
    model = model or routed_dit(num_embeds_ada_norm=3)
    scheduler = DDPMScheduler(num_train_timesteps=num_train_timesteps)
    check_agreement(run_config(**options), model, data(num_classes, vae), scheduler)


def test_what_agrees_is_trained():
    agree(routing_beta=0.8, routing_timestep_range=[0, 999])
    agree(routed_dit(num_embeds_ada_norm=3, routing_timestep_range=(0, 499)), num_train_timesteps=500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing_beta": 0.25}, "`--routing_beta` is 0.25, but the model has 0.8"),
        ({"routing_timestep_range": [200, 800]}, "`--routing_timestep_range` is .* but the model has"),
        ({"rank": 2}, "`--rank` is 2, but the model has no adapters"),
        ({"vae_name_or_path": "vae"}, "`--vae_name_or_path` is given, but the data have no autoencoder"),
        ({"num_classes": 2}, "The model has 3 classes, but the data have 2"),
        ({"num_classes": None}, "The model has 3 classes, but the data have none"),
        ({"num_train_timesteps": 500}, r"over the timesteps \[0, 999\], but there are 500"),
    ],
)
def test_what_does_not_agree_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        agree(**options)


def test_a_model_is_routed_and_has_the_adapters_that_it_is_trained_by():
    with pytest.raises(ValueError, match="`model` must be routed, got a DiTTransformer2DModel"):
        agree(plain_dit())
    model = routed_dit(num_embeds_ada_norm=3)
    config = run_config(rank=2)
    add_lora(model, config.lora, config.routing, ("to_q",))
    agree(model, rank=2)
    with pytest.raises(ValueError, match="`--rank` is None, but the model has adapters"):
        agree(model)
