import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dtr.training.randomness import derive_seed, noise_generator, seed_model, timestep_generator


numbers = st.integers(0, 2**40)


@given(st.lists(numbers, min_size=1, max_size=4))
def test_seeds_are_numbers_that_every_generator_takes(entropy):
    assert 0 <= derive_seed(*entropy) < 2**63
    assert derive_seed(*entropy) == derive_seed(*entropy)


def test_neighbouring_numbers_have_seeds_of_their_own():
    assert len({derive_seed(seed, place) for seed in range(50) for place in range(50)}) == 2500
    assert derive_seed(1, 2) != derive_seed(2, 1)


@given(numbers, numbers)
def test_draws_depend_on_seed_and_place_alone(seed, place):
    for make in (lambda: noise_generator(seed, place, "cpu"), lambda: timestep_generator(seed, place)):
        assert torch.equal(torch.rand(3, generator=make()), torch.rand(3, generator=make()))


def test_noise_timesteps_and_label_drops_of_a_place_are_independent():
    """From one stream, whether a label is dropped would be told by the noise of its sample."""
    seed_model(0, 5)
    draws = [
        torch.rand(1000),
        torch.rand(1000, generator=noise_generator(0, 5, "cpu")),
        torch.rand(1000, generator=timestep_generator(0, 5)),
    ]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(3)
    assert correlations.abs().max() < 0.15


def test_model_draws_the_same_again_whatever_was_drawn_before():
    seed_model(3, 7)
    expected = torch.rand(4)
    torch.rand(100)
    seed_model(3, 7)
    assert torch.equal(torch.rand(4), expected)
    seed_model(3, 8)
    assert not torch.equal(torch.rand(4), expected)
