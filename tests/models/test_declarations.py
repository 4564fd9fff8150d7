"""Declarations of families: of models of other libraries, those that do not fit, and what follows from all of them."""

import pickle
from inspect import signature
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

import diffusers_dtr
from diffusers_dtr import Family, RoutedTransformerMixin, Stream, route, unroute
from diffusers_dtr.models.families import TRANSFORMERS, UNETS
from diffusers_dtr.models.routed_model import RoutedModelMixin
from diffusers_dtr.models.unet import RoutedUNetMixin


ROOT = Path(__file__).parents[2]


class PaintBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x)


class PaintModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, hidden_size: int = 16, depth: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(PaintBlock(hidden_size) for _ in range(depth))

    def forward(self, tokens, t):
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


class DTRPaintModel(
    RoutedTransformerMixin, PaintModel, family=Family(timestep="t", blocks=["layers"], width="hidden_size")
):
    """A model of another library, routed."""


class OtherModel(PaintModel):
    pass


def test_a_declared_model_of_another_library_is_routed(tmp_path):
    model, tokens = PaintModel(), torch.randn(2, 3, 16)
    route(model, routing_beta=0.5, routing_alpha=1.0)
    assert type(model) is DTRPaintModel
    found = model(tokens, torch.tensor([0.0, 999.0]))
    mask = torch.tensor([[1.0] * 8 + [0.0] * 8, [0.0] * 8 + [1.0] * 8])[:, None]
    expected = tokens
    for layer in model.layers:
        expected = expected + layer.linear(expected * mask)
    torch.testing.assert_close(found, expected)
    model.save_pretrained(tmp_path)
    loaded = DTRPaintModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens, torch.tensor([0.0, 999.0])), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens, t=3), model(tokens, t=3))


def test_a_model_of_no_known_family_is_told_how_to_be_declared():
    with pytest.raises(TypeError, match=r"`OtherModel`.*Declare it.*family=Family\(blocks="):
        route(OtherModel())


class NewTransformerBlock(PaintBlock):
    def forward(self, hidden_states, text=None):
        return text, super().forward(hidden_states)


class NewTransformer2DModel(PaintModel):
    @register_to_config
    def __init__(self, hidden_size: int = 16, depth: int = 2):
        super().__init__(hidden_size, depth)
        self.layers = nn.ModuleList(NewTransformerBlock(hidden_size) for _ in range(depth))

    def forward(self, hidden_states, timestep):
        for layer in self.layers:
            _, hidden_states = layer(hidden_states)
        return hidden_states


# Each field on its own is wrong: what is declared, the error, and what it tells of.
GOOD = {"timestep": "t", "blocks": ["layers"], "width": "hidden_size"}
WRONG = [
    ({"timestep": "timestep"}, r"an argument of `OtherModel.forward`, tokens, t, got 'timestep'"),
    ({"timestep_range": (0, 0)}, r"two different finite timesteps, got \(0, 0\)"),
    ({"timestep_range": None}, "two different finite timesteps, got None"),
    ({"timestep_range": lambda config: (0, config["scale"])}, "its config, hidden_size, depth, got"),
    ({"blocks": None}, "given, because the model has no `_repeated_blocks`, got None"),
    ({"blocks": "layers"}, "a list of names of its attributes, got 'layers'"),
    ({"blocks": []}, r"a list of names of its attributes, got \[\]"),
    ({"streams": {"PaintBlok": 0}}, "class names of blocks, such as .*PaintBlock.*, got {'PaintBlok': 0}"),
    ({"streams": {"PaintBlock": -1}}, "places from 0 on, .*, got {'PaintBlock': -1}"),
    ({"streams": {"PaintBlock": "x"}}, "a `Stream` of an argument of `PaintBlock`, x, got"),
    ({"streams": {"PaintBlock": Stream("image")}}, "of an argument of `PaintBlock`, x, got .*'image'"),
    ({"streams": {"PaintBlock": Stream(batch_dim=-2)}}, "places from 0 on, .*batch_dim=-2"),
    ({"width": "hiden_size"}, "product of values of its config, hidden_size, depth, got 'hiden_size'"),
    ({"width": 16}, "product of values of its config, hidden_size, depth, got 16"),
    ({"packed": "["}, r"a regular expression, got '\['"),
    ({"other_streams": {"text"}}, "a regular expression, got {'text'}"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_every_field_that_does_not_fit_is_an_error_when_the_class_is_made(wrong, message):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"`{name}` of the family of `OtherModel` must be .*{message}"):
        type("DTROther", (RoutedTransformerMixin, OtherModel), {}, family=Family(**{**GOOD, **wrong}))
    with pytest.raises(TypeError, match="Declare it"):
        route(OtherModel())


@pytest.mark.parametrize("wrong", [{"blocks": ["mid_block"]}, {"streams": {"ResnetBlock2D": 0}}, {"width": "depth"}])
def test_what_a_unet_does_not_need_is_not_ignored(wrong):
    class Other(UNet2DModel):
        pass

    (name,) = wrong
    with pytest.raises(ValueError, match=f"`{name}` of the family of `Other` must be left out: a U-Net's units"):
        type("DTROther", (RoutedUNetMixin, Other), {}, family=Family(**wrong))


@pytest.mark.parametrize(
    ("bases", "family", "message"),
    [
        ((RoutedTransformerMixin, OtherModel), None, "must be a `Family`, got None"),
        ((RoutedTransformerMixin, OtherModel), {"blocks": ["layers"]}, "must be a `Family`, got {'blocks'"),
        ((RoutedTransformerMixin,), Family(**GOOD), "must name the class that it routes, after the mixin"),
        ((OtherModel, RoutedTransformerMixin), Family(**GOOD), "must name the class .* after the mixin"),
    ],
)
def test_a_class_that_does_not_say_what_it_routes_is_an_error(bases, family, message):
    with pytest.raises(TypeError, match=message):
        type("DTROther", bases, {}, family=family)


def test_blocks_that_a_model_does_not_have_are_named_before_it_is_changed():
    class Misnamed(PaintModel):
        pass

    type("DTRMisnamed", (RoutedTransformerMixin, Misnamed), {}, family=Family(**{**GOOD, "blocks": ["layer"]}))
    model = Misnamed()
    with pytest.raises(ValueError, match=r"`blocks` of the family of `Misnamed` must be .* layers, got \['layer'\]"):
        route(model)
    assert (type(model), type(model.layers[0])) == (Misnamed, PaintBlock)
    assert "routing_beta" not in model.config


def test_the_declaration_that_contributors_are_shown_is_all_there_is(monkeypatch, tmp_path):
    diff = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```diff\n")[1].split("```")[0]
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert len(added) <= 10
    (declared,) = eval("{" + "\n".join(added) + "}", {"Family": Family}).items()
    monkeypatch.setitem(TRANSFORMERS, *declared)
    monkeypatch.setitem(diffusers_dtr._DECLARED, f"DTR{declared[0]}", declared[0])
    monkeypatch.setattr(diffusers, declared[0], NewTransformer2DModel, raising=False)
    model, arguments = route(NewTransformer2DModel(), routing_beta=0.5), (torch.randn(2, 3, 16), torch.rand(2))
    assert type(model) is diffusers_dtr.DTRNewTransformer2DModel
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.routing.timestep_range == (0.0, 1.0)
    assert torch.equal(loaded(*arguments), model(*arguments))
    assert not torch.allclose(loaded(*arguments), unroute(model)(*arguments))
    monkeypatch.delitem(vars(diffusers_dtr), f"DTR{declared[0]}")


@pytest.mark.parametrize("name", [*TRANSFORMERS, *UNETS])
def test_what_others_read_off_a_class_is_what_the_plain_class_says(name):
    """What must not be split, what stays in float32, what is compiled, which pipelines and checkpoints fit ..."""
    plain, routed = getattr(diffusers, name), getattr(diffusers_dtr, f"DTR{name}")
    said = {key for key in dir(plain) if not key.startswith("__") and not callable(getattr(plain, key))}
    assert {key for key in said if getattr(routed, key) != getattr(plain, key)} <= {"_abc_impl"}
    assert said >= {"_no_split_modules", "_repeated_blocks", "_keep_in_fp32_modules"}
    assert signature(routed.forward) == signature(plain.forward)
    assert issubclass(routed, RoutedModelMixin)
