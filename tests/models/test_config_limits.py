"""Configs with absurd values are refused at once and before memory is spent, by every model and way of loading."""

from __future__ import annotations

import json
import resource
import time
from contextlib import contextmanager

import accelerate
import pytest
import torch
from diffusers import DiTTransformer2DModel
from tiny_models import DIT, FLUX, PIXART, SD3, UNET, UNET_CONDITION, every_family

from diffusers_dtr import (
    DTRFluxTransformer2DModel,
    DTRPixArtTransformer2DModel,
    DTRSD3Transformer2DModel,
    DTRTransformer2DModel,
    DTRUNet2DConditionModel,
)
from diffusers_dtr.models.config_limits import _argument_kinds, check_config, check_size


INFINITY, NAN = float("inf"), float("nan")


@contextmanager
def refused_at_once(message):
    """A `ValueError` within a second that leaves the process's peak memory where it was."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=message):
        yield
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def layers_of(family):
    return next(name for name in family.config if name in ("num_layers", "layers_per_block"))


def size_of(family):
    return "sample_size" if "sample_size" in family.config else "in_channels"


ABSURD = {
    "2**31 layers": (layers_of, 2**31),
    "no number of layers": (layers_of, "many"),
    "true layers": (layers_of, True),
    "-1 layers": (layers_of, -1),
    "a list of 10**6 layers": (layers_of, [1] * 10**6),
    "a size of ten digits": (size_of, 1234567890),
    "a size of 400 digits": (size_of, 10**400),
    "a size that is not a number": (size_of, NAN),
    "an infinite size": (size_of, INFINITY),
    "a size in words": (size_of, "64"),
    "a share of 10": (lambda family: "routing_beta", 10),
    "a share that is not a number": (lambda family: "routing_beta", NAN),
    "a seed of 2**40": (lambda family: "routing_seed", 2**40),
}


@every_family
@pytest.mark.parametrize("absurd", ABSURD)
def test_absurd_configs_are_refused_by_every_model(family, absurd):
    name_of, value = ABSURD[absurd]
    name = name_of(family)
    config = {**family.config, "_class_name": family.routed_class.__name__, name: value}
    with refused_at_once(f"`{name}`"):
        family.routed_class.from_config(config)
    with refused_at_once(f"`{name}`"), accelerate.init_empty_weights():
        family.routed_class(**{**family.config, name: value})


@every_family
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_absurd_configs_are_refused_when_weights_are_loaded(family, low_cpu_mem_usage, tmp_path):
    family.routed().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name, value in ((layers_of(family), 2**31), (size_of(family), 10**10), (size_of(family), NAN)):
        path.write_text(json.dumps({**config, name: value}))
        with refused_at_once(f"`{name}` must be a number from 0 to"):
            family.routed_class.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    path.write_text(json.dumps(config))
    with refused_at_once("`routing_beta`"):
        family.routed_class.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, routing_beta=10.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 2**31}, "`num_layers` must be a number from 0 to 1024, .* got 2147483648"),
        ({"sample_size": 2**14, "patch_size": 1}, "table of positions"),
        ({"patch_size": 0}, "`patch_size` must be at least 1, got 0"),
    ],
)
def test_absurd_configs_are_refused_before_a_plain_dit_is_loaded(values, message, tmp_path):
    plain = DIT.plain()
    plain.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({**plain.config, "_class_name": "DiTTransformer2DModel", **values})
    )
    with refused_at_once(message):
        DTRTransformer2DModel.from_pretrained(tmp_path)


def test_checking_a_plain_dit_before_it_is_loaded_draws_no_random_numbers(tmp_path):
    DIT.plain().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    DTRTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", [DIT, PIXART, SD3, FLUX], ids=lambda family: family.routed_class.__name__)
def test_a_width_that_is_the_product_of_two_allowed_values_is_refused(family):
    config = {**family.config, "num_attention_heads": 2**14, "attention_head_dim": 2**14}
    with refused_at_once(rf"`num_attention_heads` \* `attention_head_dim` must be .* got {2**28}"):
        family.routed_class(**config)


@pytest.mark.parametrize("family", [DIT, PIXART, SD3], ids=lambda family: family.routed_class.__name__)
def test_a_table_of_positions_of_absurd_size_is_refused(family):
    sizes = {"sample_size": 2**14, "patch_size": 1, "num_attention_heads": 64, "attention_head_dim": 64}
    sizes |= {"pos_embed_max_size": 2**14} if family is SD3 else {}
    with refused_at_once(f"must be at most {int((2**30 / 4096) ** 0.5)} for 4096 channels, got 16384"):
        family.routed_class(**{**family.config, **sizes})


def test_layers_within_layers_of_absurd_number_are_refused():
    config = {**UNET_CONDITION.config, "layers_per_block": 200, "transformer_layers_per_block": (1, 200)}
    with refused_at_once("`layers_per_block` .* must be at most 1024, got 40000"):
        DTRUNet2DConditionModel(**config)


def test_a_config_that_is_changed_later_is_checked_too():
    model = DIT.routed()
    with pytest.raises(ValueError, match="`num_embeds_ada_norm` must be a number from 0 to"):
        model.register_to_config(num_embeds_ada_norm=2**31)
    assert model.config.num_embeds_ada_norm == DIT.config["num_embeds_ada_norm"]


@every_family
def test_the_kind_of_every_argument_is_known(family):
    assert all(_argument_kinds(family.routed_class).values())


@pytest.mark.parametrize(
    ("family", "value"),
    [
        (UNET, {"flip_sin_to_cos": "false"}),
        (UNET, {"act_fn": 3}),
        (UNET, {"block_out_channels": (8, "16")}),
        (UNET_CONDITION, {"only_cross_attention": (True, 0)}),
        (DIT, {"dropout": -0.1}),
        (DIT, {"norm_eps": {}}),
    ],
)
def test_values_of_the_wrong_kind_are_refused(family, value):
    (name,) = value
    with pytest.raises(ValueError, match=f"`{name}` must be (a number|a string|true or false)"):
        family.routed_class(**{**family.config, **value})


SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "upcast_attention": None,
}
SD3_5_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (DTRTransformer2DModel, {}),
        (DTRTransformer2DModel, {"sample_size": 512, "num_embeds_ada_norm": 21841}),
        (DTRUNet2DConditionModel, SDXL),
        (DTRUNet2DConditionModel, {**SDXL, "sample_size": 16384}),
        (DTRPixArtTransformer2DModel, {"sample_size": 512, "interpolation_scale": 0.5}),
        (DTRSD3Transformer2DModel, SD3_5_LARGE),
        (DTRFluxTransformer2DModel, {}),
        (DTRFluxTransformer2DModel, {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48}),
    ],
)
def test_huge_models_that_exist_are_built(model_class, config):
    with torch.device("meta"):
        model = model_class(**config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 5e8


def test_numbers_may_be_those_of_numpy():
    numpy = pytest.importorskip("numpy")
    check_config(UNET.routed_class, {"sample_size": numpy.int64(32), "norm_eps": numpy.float32(1e-5)})


def test_limits_are_inclusive():
    check_config(DTRTransformer2DModel, {"num_layers": 1024, "sample_size": 2**14, "num_embeds_ada_norm": 2**20})
    check_size({"sample_size": 2048, "patch_size": 2}, width=2**10)
    with pytest.raises(ValueError, match="table of positions"):
        check_size({"sample_size": 2050, "patch_size": 2}, width=2**10)
