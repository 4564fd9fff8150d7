import pytest
import torch
from diffusers.training_utils import EMAModel

from diffusers_dtr import DTRTransformer2DModel
from diffusers_dtr.training.ema import averaged_weights, load_average


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


def test_average_goes_on_after_loading_as_if_it_had_never_stopped():
    options = {"decay": 0.99, "use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.6, "min_decay": 0.1}
    model = make_model()
    ema = make_ema(model, **options)
    for _ in range(3):
        train(model, ema)
    weights = {
        name: weight.clone() for (name, _), weight in zip(model.named_parameters(), ema.shadow_params, strict=True)
    }
    loaded = make_ema(make_model(1), **options)
    load_average(loaded, model, weights, 3)
    assert_same(loaded.shadow_params, ema.shadow_params)
    before = copies(model.parameters())
    train(model, ema)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    train(model, loaded)
    assert_same(loaded.shadow_params, ema.shadow_params)


def test_average_of_another_model_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="must be of this model, got those of another"):
        load_average(make_ema(model), model, {"other": torch.zeros(1)}, 1)
