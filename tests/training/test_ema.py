from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from run_config import run_config
from tiny_dit import routed_dit

from diffusers_dtr.training.config import EMAConfig
from diffusers_dtr.training.ema import WeightAverage, power_function_exponent
from diffusers_dtr.training.engine import Engine


def copies(tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def assert_same(left, right) -> None:
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.fixture
def trained() -> SimpleNamespace:
    """A model, and how its weights are changed as by an optimizer."""
    model, generator = routed_dit(), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step() -> None:
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))

    return SimpleNamespace(model=model, engine=Engine(Accelerator(cpu=True), model), step=step)


@pytest.mark.parametrize("offload", [False, True])
def test_average_is_that_of_diffusers_to_the_bit(trained, offload):
    flags = {"ema_max_decay": 0.6, "ema_inv_gamma": 2.0, "ema_power": 0.8}
    average = WeightAverage(run_config(use_ema=True, offload_ema=offload, **flags).ema, trained.engine)
    options = {"decay": 0.6, "inv_gamma": 2.0, "power": 0.8, "use_ema_warmup": True, "foreach": True}
    theirs = EMAModel(trained.model.parameters(), **options)
    for _ in range(6):
        trained.step()
        average.step()
        theirs.step(trained.model.parameters())
        assert_same(average.weights, theirs.shadow_params)


def test_model_has_its_average_for_a_while_and_its_own_weights_again_after_an_error(trained):
    average, seen = WeightAverage(run_config(use_ema=True).ema, trained.engine), []
    for _ in range(2):
        trained.step()
        average.step()
    own = copies(trained.model.parameters())

    def sample():
        seen.extend(copies(trained.model.parameters()))
        raise RuntimeError("sampling failed")

    with pytest.raises(RuntimeError, match="sampling failed"), trained.engine.computing_with(average.weights):
        sample()
    assert_same(seen, average.weights)
    assert not torch.equal(seen[0], own[0])
    assert_same(trained.model.parameters(), own)


def test_average_of_half_precision_is_in_full(trained):
    trained.model.to(torch.bfloat16)
    average = WeightAverage(run_config(use_ema=True, ema_max_decay=0.999).ema, trained.engine)
    trained.step()
    average.step()
    assert {weight.dtype for weight in average.weights} == {torch.float32}


def averages_of(values: list[float], **options) -> float:
    """What an average of one weight is after it had these values."""
    weight = torch.zeros(1, dtype=torch.float64)
    average = WeightAverage(EMAConfig(use_ema=True, **options), SimpleNamespace(weights=lambda: [weight]))
    for value in values:
        weight.fill_(value)
        average.step()
    return average.weights[0].item()


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.28])
def test_the_window_of_the_power_function_is_as_wide_as_asked_for(sigma_rel):
    """Its mean and standard deviation follow from averages of the steps' numbers and of their squares."""
    steps = 2000
    options = {"ema_type": "power", "ema_sigma_rel": sigma_rel}
    mean = averages_of([step / steps for step in range(1, steps + 1)], **options)
    square = averages_of([(step / steps) ** 2 for step in range(1, steps + 1)], **options)
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=0.01)


def test_exponents_are_those_of_the_paper():
    """Of the two averages that EDM2 keeps."""
    assert [round(power_function_exponent(width), 2) for width in (0.05, 0.1)] == [16.97, 6.94]


def test_the_average_begins_with_the_weights_after_the_first_step():
    assert averages_of([3.0], ema_type="power") == averages_of([3.0]) == 3.0
