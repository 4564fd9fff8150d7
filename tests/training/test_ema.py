import pytest
import torch
from diffusers import ModelMixin
from run_config import run_config
from tiny_dit import routed_dit

from diffusers_dtr.training.ema import averaged_weights, build_ema, step_average


def copies(tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def assert_same(left, right) -> None:
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@torch.no_grad()
def train(model: ModelMixin, ema) -> None:
    for parameter in model.parameters():
        parameter.add_(1)
    step_average(ema, model)


def test_model_has_its_average_for_a_while_and_its_own_weights_again_after_an_error():
    model, seen = routed_dit(), []
    ema = build_ema(run_config(use_ema=True).ema, model, model.device)
    train(model, ema)
    train(model, ema)
    own = copies(model.parameters())

    def sample():
        seen.extend(copies(model.parameters()))
        raise RuntimeError("sampling failed")

    with pytest.raises(RuntimeError, match="sampling failed"), averaged_weights(ema, model):
        sample()
    assert_same(seen, ema.shadow_params)
    assert not torch.equal(seen[0], own[0])
    assert_same(model.parameters(), own)
