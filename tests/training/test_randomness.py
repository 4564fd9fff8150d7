import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dtr.training.randomness import Draw, derive_seed, generator_for, seed_model


numbers = st.integers(0, 2**40)


@given(st.lists(numbers, min_size=1, max_size=4))
def test_seeds_are_numbers_that_every_generator_takes(entropy):
    assert 0 <= derive_seed(*entropy) < 2**63
    assert derive_seed(*entropy) == derive_seed(*entropy)


def test_draws_of_neighbouring_seeds_and_places_are_independent():
    places = [(seed, *place) for seed in range(3) for place in ((0, 0), (1, 0), (0, 1), (0,), (1,))]
    seeds = {generator_for(draw, *place).initial_seed() for draw in Draw for place in places}
    assert len(seeds) == len(Draw) * len(places)


def test_seeds_of_draws_stay_what_they_are():
    """A run resumes to the bit from a checkpoint that an earlier version wrote."""
    assert generator_for(Draw.ORDER, 7, 1, 0).initial_seed() == derive_seed(7, 1, 0, int.from_bytes(b"order", "big"))
    assert generator_for(Draw.NOISE, 7, 3).initial_seed() == derive_seed(7, 3, int.from_bytes(b"noise", "big"))


def test_noise_timesteps_and_label_drops_of_a_place_are_independent():
    """From one stream, whether a label is dropped would be told by the noise of its sample."""
    seed_model(0, 5)
    draws = [torch.rand(1000)]
    draws += [torch.rand(1000, generator=generator_for(draw, 0, 5)) for draw in (Draw.NOISE, Draw.TIMESTEPS)]
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
