"""Configs that come from files: published ones are right, others are one clear error, and routing is read unbuilt."""

from __future__ import annotations

import copy
import json
import random
from typing import get_type_hints

import accelerate
import pytest
import torch
from tiny_denoisers import build, tiny_config

import diffusers_dtr
from diffusers_dtr import DTRTransformer2DModel, DTRUNet2DConditionModel, DTRUNet2DModel, route
from diffusers_dtr.cli.saved_routing import saved_routing
from diffusers_dtr.config_types import check_types, constructor_types
from diffusers_dtr.models.families import TRANSFORMERS, UNETS
from diffusers_dtr.models.routed_model import config_types


every_family = pytest.mark.parametrize("name", [*TRANSFORMERS, *UNETS])

SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "upcast_attention": None,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "mid_block_scale_factor": 1,
}
# As the configs of published models are: null where annotations do not allow it, and factors that are no integers.
PUBLISHED = [
    ("UNet2DConditionModel", SDXL),
    ("UNet2DConditionModel", {"only_cross_attention": [True, True, True, False], "cross_attention_dim": 768}),
    ("PixArtTransformer2DModel", {"sample_size": 128, "interpolation_scale": 0.5, "use_additional_conditions": None}),
    ("SD3Transformer2DModel", {"num_layers": 38, "qk_norm": "rms_norm", "dual_attention_layers": []}),
    ("FluxTransformer2DModel", {"axes_dims_rope": [16, 56, 56], "guidance_embeds": True}),
    ("Lumina2Transformer2DModel", {"axes_dim_rope": [32, 32, 32], "norm_eps": 1e-5}),
    ("ZImageTransformer2DModel", {"rope_theta": 1000000.0, "t_scale": 1000.0, "axes_lens": [1536, 512, 512]}),
    ("BriaTransformer2DModel", {"rope_theta": 10000.0}),
    ("DiTTransformer2DModel", {"attention_bias": True, "num_vector_embeds": None, "cross_attention_dim": None}),
    ("UNet2DModel", {"attention_head_dim": None, "dropout": 0.13, "mid_block_scale_factor": 1.4142135623730951}),
]
WRONG = ["many", 2.5, -1, 0, [], [[[]]], [1] * 1000, {"a": 1}, None, True, 10**400, float("nan"), 2**63, [None], ""]


def routed_class(name):
    return getattr(diffusers_dtr, f"DTR{name}")


@every_family
def test_default_and_tiny_configs_are_right(name):
    types = config_types(routed_class(name))
    assert types.items() >= constructor_types(routed_class(name).plain_class).items()
    for model in ({}, tiny_config(name)):
        check_types(types, json.loads(json.dumps(model)), name)
    with accelerate.init_empty_weights():
        saved = dict(routed_class(name).from_config(tiny_config(name)).config)
    check_types(types, json.loads(json.dumps(saved)), name)


@pytest.mark.parametrize(("name", "config"), PUBLISHED)
def test_configs_as_they_are_published_are_right(name, config):
    check_types(config_types(routed_class(name)), config, name)


def test_sizes_are_trusted():
    # Where nothing is allocated, not for a moment.
    with torch.device("meta"):
        DTRUNet2DConditionModel.from_config(SDXL)
        model = DTRTransformer2DModel(num_attention_heads=256, num_layers=3)
    assert sum(parameter.numel() for parameter in model.parameters()) > 10**10


@every_family
def test_values_of_the_wrong_type_are_refused_by_name_before_anything_is_built(name):
    cls = routed_class(name)
    hints = get_type_hints(cls.plain_class.__init__)
    key = next((key for key, hint in hints.items() if hint in (int, int | None)), "in_channels")
    for value in ("many", [2], 10**400, {}):
        with pytest.raises(ValueError, match=f"`{key}` of the config of {cls.__name__} must be (an integer|a number)"):
            cls.from_config({**tiny_config(name), key: value})
    with pytest.raises(ValueError, match=f"`routing_seed` of the config of {cls.__name__} must be an integer"):
        cls(**{**tiny_config(name), "routing_seed": 1.5})


@every_family
def test_the_routing_of_a_config_is_that_of_the_model(name):
    model = route(build(name), routing_beta=0.6, routing_timestep_range=(0.1, 0.9))
    config = json.loads(json.dumps({**model.config, "_class_name": type(model).__name__}))
    routing, widths = saved_routing(config)
    assert widths == model.routed_widths
    assert (routing.beta, tuple(routing.timestep_range)) == (0.6, (0.1, 0.9))


def test_the_config_of_another_model_has_no_routing():
    for name in ("UNet2DModel", "DTRPipeline", "routing_mask", None, ["DTRUNet2DModel"], 3):
        assert saved_routing({"_class_name": name}) is None


def test_a_config_of_absurd_sizes_is_read_without_building_it():
    levels = {"block_out_channels": [32] * 100, "down_block_types": ["DownBlock2D"] * 100, "layers_per_block": 10**9}
    _, widths = saved_routing({"_class_name": "DTRUNet2DModel", **levels})
    assert widths == (32, 64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_out_channels": []}, "A DTRUNet2DModel cannot be made of these files"),
        ({"block_out_channels": 8}, "`block_out_channels` of the config of DTRUNet2DModel must be a list of integers"),
        ({"routing_beta": 2}, "beta"),
        ({"routing_beta": "0.8"}, "`routing_beta` of the config of DTRUNet2DModel must be a number, got '0.8'"),
        ({"routing_timestep_range": [1]}, "timestep_range"),
        ({"routing_type": "spiral"}, "routing_type"),
    ],
)
def test_a_routing_that_does_not_exist_is_refused_unbuilt(wrong, message):
    with pytest.raises(ValueError, match=message):
        saved_routing({"_class_name": "DTRUNet2DModel", **wrong})


# ---- what anybody may have written


def mutated(config, draw):
    """A config with one or two values replaced, wrapped or taken away."""
    config = copy.deepcopy(config)
    for _ in range(draw.randint(1, 2)):
        name = draw.choice(sorted(config))
        match draw.randrange(6):
            case 0:
                del config[name]
            case 1:
                config[name] = [config[name]]
            case 2 if isinstance(config[name], list) and config[name]:
                config[name][draw.randrange(len(config[name]))] = draw.choice(WRONG)
            case _:
                config[name] = draw.choice(WRONG)
        if not config:
            break
    return config


def attempt(make):
    """The error of what is refused, or None; any other exception is a fault."""
    try:
        make()
    except (ValueError, OSError) as error:
        return str(error)
    return None


@every_family
def test_every_mutated_config_makes_a_model_or_is_one_clear_error(name):
    cls, draw = routed_class(name), random.Random(name)
    config = json.loads(json.dumps(dict(build(name).config)))
    for _ in range(8):
        with accelerate.init_empty_weights():
            message = attempt(lambda: cls.from_config({**mutated(config, draw), "_class_name": cls.__name__}))
        assert message is None or len(message) < 2000


@pytest.mark.parametrize("cls", [DTRTransformer2DModel, DTRUNet2DModel], ids=lambda cls: cls.__name__)
def test_every_mutated_config_in_a_folder_is_a_model_or_one_clear_error(cls, tmp_path):
    draw = random.Random(0)
    torch.manual_seed(0)
    cls.from_config(tiny_config(cls.plain_class.__name__)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for _ in range(60):
        (tmp_path / "config.json").write_text(json.dumps(mutated(config, draw)))
        attempt(lambda: cls.from_pretrained(tmp_path))


def test_weights_that_are_missing_are_an_error(tmp_path):
    DTRTransformer2DModel.from_config(tiny_config("DiTTransformer2DModel")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for more in ({"norm_elementwise_affine": True}, {"num_layers": config["num_layers"] + 1}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        with pytest.raises(ValueError, match=r"weights of a DTRTransformer2DModel must .* is missing, and \d+"):
            DTRTransformer2DModel.from_pretrained(tmp_path)
