"""Every declared family: what its routed class computes, saves and recomputes."""

import json
import pickle
from inspect import signature

import pytest
import torch
from diffusers import ModelMixin, models
from tiny_denoisers import FLEX_ATTENTION, build, inputs, run, tiny_config
from torch import nn

import diffusers_dtr
from diffusers_dtr import Family, route, unroute
from diffusers_dtr.cli.saved_routing import saved_routing
from diffusers_dtr.models.families import TRANSFORMERS, UNETS
from diffusers_dtr.routing import routing_mask


every_denoiser = pytest.mark.parametrize("name", [*TRANSFORMERS, *UNETS])
every_transformer = pytest.mark.parametrize("name", TRANSFORMERS)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Equal to the bit."""


def output(model, name, seed=0):
    with torch.no_grad():
        return run(model, inputs(name, seed=seed))


def public(config):
    """Without what loading adds, and with tuples as the lists that they become in JSON."""
    return json.loads(json.dumps({key: value for key, value in config.items() if not key.startswith("_")}))


def test_every_transformer_of_diffusers_is_declared_or_named_with_a_reason():
    theirs = {
        name
        for name in dir(models.transformers)
        if isinstance(getattr(models.transformers, name), type)
        and issubclass(getattr(models.transformers, name), ModelMixin)
    }
    reasons = diffusers_dtr.models.families.__doc__
    assert {name for name in theirs - TRANSFORMERS.keys() if name not in reasons} == set()
    assert len(theirs & TRANSFORMERS.keys()) >= 50


@every_denoiser
def test_a_share_of_one_is_the_plain_model_to_the_bit_and_a_half_is_not(name):
    model = build(name)
    expected = output(model, name)
    assert expected.isfinite().all()
    route(model, routing_beta=0.5)
    assert not torch.allclose(output(model, name), expected, rtol=1e-3)
    model.set_routing_beta(1.0)
    assert torch.equal(output(model, name), expected)
    route(model, routing_beta=1.0)
    assert torch.equal(output(model, name), expected)
    assert torch.equal(output(unroute(model), name), expected)


@pytest.mark.parametrize(
    ("name", "config", "timestep_range"),
    [
        ("SanaTransformer2DModel", {"timestep_scale": 1.0}, (0.0, 1000.0)),
        ("SanaTransformer2DModel", {"timestep_scale": 0.001}, (0.0, 1.0)),
        ("CosmosTransformer3DModel", {"extra_pos_embed_type": "learnable"}, (-1.5537, 1.0955)),
        ("CosmosTransformer3DModel", {"extra_pos_embed_type": None}, (0.0, 1.0)),
    ],
)
def test_the_range_follows_the_config_where_checkpoints_of_one_class_differ(name, config, timestep_range):
    plain, made = build(name, **config), getattr(diffusers_dtr, f"DTR{name}")(**{**tiny_config(name), **config})
    assert saved_routing({**plain.config, "_class_name": f"DTR{name}"})[0].timestep_range == timestep_range
    for routed in (made, route(plain)):
        assert routed.routing.timestep_range == routed.config.routing_timestep_range == timestep_range
    assert route(routed, routing_timestep_range=(1, 2)).routing.timestep_range == (1, 2)


def masked_by_hand(model: nn.Module, family: Family, timestep: torch.Tensor, timestep_range: tuple) -> None:
    """Route a plain model with hooks alone. The image stream is told from others by its number of tokens."""

    def window(hidden_states):
        width, axis = hidden_states.shape[-1], (family.streams.get("ErnieImageSharedAdaLNBlock") and 1) or 0
        per_sample = timestep.reshape(timestep.shape[0], -1)
        mask = torch.stack(
            [routing_mask(t, width, alpha=1.0, beta=0.5, timestep_range=timestep_range) for t in per_sample]
        ).to(hidden_states.dtype)
        if mask.shape[1] == 1:
            rows = hidden_states.shape[axis] // len(mask)
            mask = mask.repeat_interleave(rows, dim=0).reshape(
                [-1 if dim == axis else 1 for dim in range(hidden_states.ndim - 1)] + [width]
            )
        else:
            mask = mask.repeat_interleave(hidden_states.shape[1] // mask.shape[1], dim=1)
        return mask

    def before(block, args, kwargs):
        key = None if args else next(iter(kwargs))
        block.image = args[0] if args else kwargs[key]
        masked = block.image * window(block.image)
        return ((masked, *args[1:]), kwargs) if args else (args, {**kwargs, key: masked})

    def after(block, args, kwargs, output):
        carried = (1 - window(block.image)) * block.image
        if torch.is_tensor(output):
            return output + carried
        # MotifVideo's decoder has a second stream of images, which comes after.
        place = next(i for i, value in enumerate(output) if value is not None and value.shape == block.image.shape)
        return (*output[:place], output[place] + carried, *output[place + 1 :])

    names = family.blocks or [
        name
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList) and type(child[0]).__name__ in model._repeated_blocks
    ]
    for name in names:
        for block in model.get_submodule(name):
            block.register_forward_pre_hook(before, with_kwargs=True)
            block.register_forward_hook(after, with_kwargs=True)


@every_transformer
def test_blocks_see_the_window_and_the_other_channels_go_past_them(name):
    arguments = inputs(name)
    model = build(name)
    found = output(route(model, routing_beta=0.5, routing_alpha=1.0), name)
    plain, family = build(name), TRANSFORMERS[name]
    masked_by_hand(plain, family, arguments[family.timestep], model.routing.timestep_range)
    torch.testing.assert_close(found, output(plain, name), rtol=1e-4, atol=1e-4)


@every_denoiser
def test_saving_and_loading_keeps_the_output(name, tmp_path):
    model = route(build(name), routing_beta=0.5, routing_alpha=2.0)
    model.save_pretrained(tmp_path)
    routed_class = getattr(diffusers_dtr, f"DTR{name}")
    loaded = routed_class.from_pretrained(tmp_path)
    assert type(model) is routed_class
    assert public(loaded.config) == public(model.config)
    torch.testing.assert_close(output(loaded, name), output(model, name), rtol=1e-4, atol=1e-4)


@every_denoiser
def test_positional_and_keyword_construction_give_the_config_of_the_plain_class(name):
    routed_class, config = getattr(diffusers_dtr, f"DTR{name}"), tiny_config(name)
    first, plain = next(iter(signature(routed_class).parameters)), routed_class.plain_class(**config)
    rest = {key: value for key, value in config.items() if key != first}
    routed = routed_class(plain.config[first], **rest, routing_beta=0.5)
    assert public(routed.config).items() >= public(plain.config).items()
    assert pickle.loads(pickle.dumps(routed)).config == routed.config


@every_denoiser
def test_checkpointing_recomputes_each_call_with_its_own_masks(name):
    model = route(build(name), routing_alpha=1.0)
    if not model._supports_gradient_checkpointing:
        pytest.skip(f"{name} has no gradient checkpointing")
    if name in FLEX_ATTENTION:
        pytest.skip(f"{name} needs a CUDA device to be trained")

    def gradients():
        losses = []
        for share, seed in ((0.9, 0), (0.5, 1)):
            model.set_routing_beta(share)
            losses.append(run(model, inputs(name, seed=seed)).square().mean())
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.autograd.grad(sum(losses), parameters, allow_unused=True)

    expected = gradients()
    model.enable_gradient_checkpointing()
    for found, wanted in zip(gradients(), expected, strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
