import pytest
import torch
from diffusers.training_utils import EMAModel

from diffusers_dtr import DTRTransformer2DModel
from diffusers_dtr.training.ema import averaged_weights


def make_model(seed: int = 0) -> DTRTransformer2DModel:
    torch.manual_seed(seed)
    size = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "sample_size": 4}
    return DTRTransformer2DModel(**size, num_embeds_ada_norm=2)


def make_ema(model: DTRTransformer2DModel, **options) -> EMAModel:
    config = {"model_cls": DTRTransformer2DModel, "model_config": model.config}
    return EMAModel(model.parameters(), **config, **options)


def copies(tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def assert_same(left, right) -> None:
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@torch.no_grad()
def train(model: DTRTransformer2DModel, ema: EMAModel) -> None:
    for parameter in model.parameters():
        parameter.add_(1)
    ema.step(model.parameters())


def test_model_has_its_average_for_a_while_and_its_own_weights_again_after_an_error():
    model = make_model()
    ema = make_ema(model, decay=0.5)
    train(model, ema)
    train(model, ema)
    own = copies(model.parameters())
    seen = []

    def sample():
        seen.extend(copies(model.parameters()))
        raise RuntimeError("sampling failed")

    with pytest.raises(RuntimeError, match="sampling failed"), averaged_weights(ema, model):
        sample()
    assert_same(seen, ema.shadow_params)
    assert not torch.equal(seen[0], own[0])
    assert_same(model.parameters(), own)
