from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from run_config import run_config
from tiny_dit import routed_dit

from diffusers_dtr.training.ema import WeightAverage
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
