import pytest
import torch

from diffusers_dtr.training.objective import draw_noise


SHAPE = torch.Size((4000, 3, 2, 2))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_noise_to_learn_is_the_noise_that_is_added():
    noise, added = draw_noise(SHAPE, seeded())
    assert torch.equal(noise, torch.randn(SHAPE, generator=seeded()))
    assert torch.equal(noise, added)


@pytest.mark.parametrize("shape", [(4000, 3, 2, 2), (4000, 3, 2, 2, 2)])
def test_offset_is_one_number_per_sample_and_channel(shape):
    noise, added = draw_noise(torch.Size(shape), seeded(), noise_offset=0.5)
    offset = noise - draw_noise(torch.Size(shape), seeded())[0]
    assert torch.equal(noise, added)
    assert offset.std().item() == pytest.approx(0.5, rel=0.02)
    assert offset.flatten(1).view(*shape[:2], -1).var(-1, correction=0).max() < 1e-10


def test_perturbation_is_added_but_not_learned():
    plain, _ = draw_noise(SHAPE, seeded(), noise_offset=0.5)
    noise, added = draw_noise(SHAPE, seeded(), noise_offset=0.5, input_perturbation=0.1)
    assert torch.equal(noise, plain)
    assert (added - noise).std().item() == pytest.approx(0.1, rel=0.02)
