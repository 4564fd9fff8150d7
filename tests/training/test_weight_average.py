"""The moving average of a model's weights."""

from types import SimpleNamespace

import pytest
import torch

from diffusers_dtr.training.config import EMAConfig
from diffusers_dtr.training.ema import WeightAverage, power_function_exponent


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
