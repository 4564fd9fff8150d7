import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from diffusers_dtr.routing import ChannelRouting, random_routing_mask, routed_residual, routing_mask, warmed_up_beta


# s(t), the first active channel at t = 0..999, as the authors' implementation computes it.
REFERENCE = safe_open(Path(__file__).parent / "fixtures" / "masks.safetensors", "pt")
TIMESTEPS = torch.arange(1000)

alphas = st.sampled_from([0.5, 1, 2, 4.0, 8])
betas = st.floats(0.1, 1)
widths = st.integers(10, 200)
ranges = st.tuples(st.floats(-1000, 1000), st.floats(0.1, 2000)).map(lambda pair: (pair[0], sum(pair)))
both_masks = pytest.mark.parametrize("mask_of", [routing_mask, random_routing_mask])

# Channels 0 to 15 that random routing keeps, by (seed, timestep).
RANDOM_ROUTING = {
    (0, 0): "xxxxx.xxx..xxxx.",
    (0, 1): "xxxxx.xxxxxx..x.",
    (0, 999): ".xxx.xxxx.xx.xxx",
    (7, 0): "xxx.xxx.xxxx.xx.",
    (7, 998): "xxxxx.xxxx.x..xx",
    (7, 999): "xx..xxxxxx.xx.xx",
}


def window(start, num_active, num_channels):
    channels = torch.arange(num_channels)
    return (start[:, None] <= channels) & (channels < start[:, None] + num_active)


# --- the window ------------------------------------------------------------------------------------------------------


def test_masks_equal_the_authors_tables():
    keys = REFERENCE.keys()
    assert len(keys) == 100
    for key in keys:
        _, channels, beta, alpha = key.split("_")
        settings = {"beta": float(beta.removeprefix("beta")), "alpha": float(alpha.removeprefix("alpha"))}
        num_channels = int(channels.removeprefix("C"))
        expected = window(REFERENCE.get_tensor(key).long(), int(REFERENCE.metadata()[key]), num_channels)
        for timesteps in (TIMESTEPS, TIMESTEPS.float()):
            assert torch.equal(routing_mask(timesteps, num_channels, **settings), expected), key


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float16, torch.float32, torch.float64])
def test_every_dtype_that_holds_the_timesteps_gives_the_same_masks(dtype):
    assert torch.equal(routing_mask(TIMESTEPS.to(dtype), 384), routing_mask(TIMESTEPS, 384))


@pytest.mark.parametrize("t", [0, 411, 999])
def test_a_scalar_is_a_batch_of_one(t):
    expected = routing_mask(TIMESTEPS, 384)[t : t + 1]
    for timestep in (t, float(t), torch.tensor(t), torch.tensor(float(t)), [t]):
        assert torch.equal(routing_mask(timestep, 384), expected)


@given(
    t=st.one_of(st.integers(-10, 1010), st.floats(-1e6, 1e6), st.sampled_from([-math.inf, math.inf])),
    num_channels=widths,
    alpha=alphas,
    beta=betas,
    timestep_range=ranges,
)
def test_the_window_is_that_of_the_formula_for_real_timesteps_in_and_out_of_range(
    t, num_channels, alpha, beta, timestep_range
):
    low, high = timestep_range
    num_active = int(beta * num_channels)
    tau = min(max((t - low) / (high - low), 0.0), 1.0)
    start = round((num_channels - num_active) * tau**alpha)
    mask = routing_mask(t, num_channels, alpha=alpha, beta=beta, timestep_range=timestep_range)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, window(torch.tensor([start]), num_active, num_channels))


@pytest.mark.parametrize(("t", "num_channels", "beta", "alpha"), [(859, 320, 0.2, 8), (931, 1152, 0.7, 2)])
def test_the_window_is_computed_in_float64(t, num_channels, beta, alpha):
    num_active = int(beta * num_channels)
    start = round((num_channels - num_active) * (t / 999) ** alpha)  # in float32: one off
    for timestep in (t, torch.tensor(t, dtype=torch.float32)):
        mask = routing_mask(timestep, num_channels, alpha=alpha, beta=beta)
        assert mask[0].nonzero().flatten().tolist() == list(range(start, start + num_active))


def test_halves_round_to_the_even_channel_and_the_number_of_channels_is_truncated():
    start = routing_mask(torch.tensor([1, 3, 5]), 20, alpha=1, beta=0.5, timestep_range=(0, 20)).int().argmax(1)
    assert start.tolist() == [0, 2, 2]
    assert routing_mask(TIMESTEPS, 384, beta=0.2).sum(1).unique().tolist() == [76]  # 76.8


@given(t=st.lists(st.floats(-1, 2), min_size=1, max_size=9), num_channels=widths, alpha=alphas, beta=betas)
def test_a_range_that_runs_downwards_mirrors_the_window(t, num_channels, alpha, beta):
    t = torch.tensor(t, dtype=torch.float64)
    down = routing_mask(t, num_channels, alpha=alpha, beta=beta, timestep_range=(1.0, 0.0))
    # Where 1 - t is exact.
    exact = (1 - (1 - t)) == t
    up = routing_mask(1 - t, num_channels, alpha=alpha, beta=beta, timestep_range=(0.0, 1.0))
    assert torch.equal(down[exact], up[exact])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both_masks
def test_masks_on_a_gpu_equal_those_on_the_cpu(mask_of):
    for t in (TIMESTEPS, TIMESTEPS.float() + 0.05):
        mask = mask_of(t.cuda(), 384)
        assert mask.is_cuda
        assert torch.equal(mask.cpu(), mask_of(t, 384))


# --- random channels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "timestep"), RANDOM_ROUTING)
def test_random_channels_are_the_recorded_ones_on_every_platform(seed, timestep):
    mask = random_routing_mask(timestep, 16, seed=seed)[0]
    assert "".join("x" if active else "." for active in mask) == RANDOM_ROUTING[seed, timestep]


@given(beta=betas, num_channels=widths, seed=st.integers(0, 2**32 - 1))
def test_random_routing_keeps_as_many_channels_at_every_timestep(beta, num_channels, seed):
    mask = random_routing_mask(TIMESTEPS[::100], num_channels, seed=seed, beta=beta)
    assert (mask.sum(1) == int(beta * num_channels)).all()


def test_random_routing_is_uniform_and_tells_all_timesteps_and_seeds_apart():
    masks = torch.cat([random_routing_mask(TIMESTEPS, 100, seed=seed) for seed in (1, 7)])
    # A share of 0.8 over 2000 draws has a standard deviation of 0.009; this allows five.
    assert (masks.double().mean(0) - 0.8).abs().max() < 0.045
    assert len(masks.unique(dim=0)) == 2000


def test_random_routing_rounds_real_timesteps_to_equidistant_levels():
    assert torch.equal(random_routing_mask(978.05, 64), random_routing_mask(978, 64))
    assert torch.equal(random_routing_mask(5000.0, 64), random_routing_mask(999, 64))
    sigma = torch.arange(1000, dtype=torch.float64) / 999
    assert torch.equal(random_routing_mask(sigma, 64, timestep_range=(0, 1)), random_routing_mask(TIMESTEPS, 64))
    many = random_routing_mask(torch.arange(5000), 64, timestep_range=(0, 4999))
    assert len(many.unique(dim=0)) == 5000


# --- what is refused -------------------------------------------------------------------------------------------------


REFUSED = [
    ({"beta": 0}, r"`routing_beta` must be a number in \(0, 1\], got 0\."),
    ({"beta": 1.01}, r"`routing_beta` must be .*, got 1\.01\."),
    ({"beta": "0.8"}, r"`routing_beta` must be .*, got '0.8'\."),
    ({"alpha": 0}, r"`routing_alpha` must be a number > 0, got 0\."),
    ({"timestep_range": (5, 5)}, r"`routing_timestep_range` must be .* different finite timesteps, got \(5, 5\)\."),
    ({"timestep_range": (0, math.inf)}, r"`routing_timestep_range` must be .* finite .*, got \(0, inf\)\."),
    ({"timestep_range": (1, 2, 3)}, r"`routing_timestep_range` must be \(cleanest, noisiest\).*, got \(1, 2, 3\)\."),
    ({"timestep_range": 1000}, r"`routing_timestep_range` must be .*, got 1000\."),
    ({"seed": -1}, r"`routing_seed` must be an integer in \[0, 2\^32\), got -1\."),
    ({"routing_type": "dtrr"}, r"`routing_type` must be one of dtr, random, none, got 'dtrr'\."),
]
SETTINGS = {
    routing_mask: {"alpha", "beta", "timestep_range"},
    random_routing_mask: {"beta", "timestep_range", "seed"},
    ChannelRouting: {"alpha", "beta", "timestep_range", "seed", "routing_type"},
}


@pytest.mark.parametrize(
    ("mask_of", "settings", "message"),
    [(mask_of, *row) for mask_of in SETTINGS for row in REFUSED if row[0].keys() <= SETTINGS[mask_of]],
)
def test_settings_that_name_no_routing_are_refused(mask_of, settings, message):
    with pytest.raises(ValueError, match=message):
        mask_of(**settings) if mask_of is ChannelRouting else mask_of(0, 16, **settings)


@both_masks
def test_a_window_without_channels_and_timesteps_that_are_no_batch_of_numbers_are_refused(mask_of):
    assert mask_of(0, 16, beta=1 / 16).sum() == 1
    with pytest.raises(ValueError, match=r"`routing_beta`=0\.05 .*16 channels.* = 0\. It must come to at least one"):
        mask_of(0, 16, beta=0.05)
    for timestep, index in ((torch.tensor([1.0, math.nan]), 1), (math.nan, 0)):
        with pytest.raises(ValueError, match=rf"`timestep` must be a number everywhere, got NaN at index {index}\."):
            mask_of(timestep, 16)
    with pytest.raises(ValueError, match=r"`timestep` must be .*\(batch,\), got shape \(2, 1\)\."):
        mask_of(torch.zeros(2, 1), 16)


# --- one residual block ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_block_sees_the_active_channels_and_the_others_pass_it_by(dtype):
    x = torch.randint(-9, 9, (2, 3, 8)).to(dtype)
    mask = routing_mask(torch.tensor([0, 999]), 8, beta=0.5)[:, None]
    seen = []

    def block(hidden_states, scale, *, shift):
        seen.append(hidden_states)
        return scale * hidden_states.flip(-1) + hidden_states + shift

    y = routed_residual(block, x, mask, 2, shift=3)
    masked = torch.where(mask, x, 0)
    assert torch.equal(seen[0], masked)
    assert torch.equal(y, 2 * masked.flip(-1) + masked + 3 + torch.where(mask, 0, x))
    assert y.dtype == dtype


def test_without_a_mask_or_with_all_channels_active_the_block_is_untouched():
    x, linear = torch.randn(2, 3, 8), torch.nn.Linear(8, 8)
    for mask in (None, torch.ones(2, 1, 8, dtype=torch.bool)):
        assert torch.equal(routed_residual(linear, x, mask), linear(x))


# --- the routing of one model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"beta": 1}, {"beta": 1.0, "routing_type": "random"}, {"routing_type": "none"}])
def test_nothing_is_masked_where_nothing_is_routed(settings):
    routing = ChannelRouting(**settings)
    assert not routing.is_active
    assert routing.mask(TIMESTEPS, 16) is None


def test_the_routing_type_decides_between_window_and_random_channels():
    t, settings = TIMESTEPS[::37], {"beta": 0.4, "timestep_range": (10, 500)}
    routing = ChannelRouting(alpha=2, **settings)
    assert torch.equal(routing.mask(t, 64), routing_mask(t, 64, alpha=2, **settings))
    routing = ChannelRouting(alpha=2, routing_type="random", seed=5, **settings)
    assert torch.equal(routing.mask(t, 64), random_routing_mask(t, 64, seed=5, **settings))
    with pytest.raises(ValueError, match="NaN at index 0"):
        routing.mask(torch.tensor([math.nan]), 16)


@given(st.sampled_from([0.8, 1.0]), betas, widths, st.sampled_from(["dtr", "random"]))
def test_a_beta_set_later_gives_the_masks_of_a_configured_one(configured, beta, num_channels, routing_type):
    t, routing = TIMESTEPS[::100], ChannelRouting(beta=configured, routing_type=routing_type)
    before = routing.mask(t, num_channels)
    with torch.inference_mode():
        routing.set_beta(1.0)
    routing.set_beta(beta)
    expected = ChannelRouting(beta=beta, routing_type=routing_type).mask(t, num_channels)
    mask = routing.mask(t, num_channels)
    assert mask.all() if expected is None else torch.equal(mask, expected)
    routing.set_beta(None)
    restored = routing.mask(t, num_channels)
    assert restored is before is None or torch.equal(restored, before)


def test_a_beta_set_later_is_checked_like_a_configured_one():
    with pytest.raises(ValueError, match=r"`routing_beta`=0\.05 leaves none of 16 channels active"):
        ChannelRouting(beta=0.05, widths=[32, 16])
    routing = ChannelRouting(widths=[32, 16])
    for beta in (0.05, 0, 1.5):
        with pytest.raises(ValueError, match="routing_beta"):
            routing.set_beta(beta)
    assert torch.equal(routing.mask(TIMESTEPS, 16), routing_mask(TIMESTEPS, 16))


@given(st.integers(0, 1000), st.floats(0.01, 1))
def test_beta_falls_steadily_from_one_to_its_target(warmup_steps, target):
    shares = [warmed_up_beta(step, warmup_steps, target) for step in range(warmup_steps + 2)]
    assert shares[0] == (1 if warmup_steps else target)
    assert shares[warmup_steps:] == [target, target]
    assert shares == sorted(shares, reverse=True)
    assert all(target <= share <= 1 for share in shares)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda routing: pickle.loads(pickle.dumps(routing))])
def test_a_copy_routes_alike_and_goes_its_own_way(copied):
    routing = ChannelRouting(beta=0.5)
    routing.set_beta(0.7)
    other = copied(routing)
    assert torch.equal(other.mask(TIMESTEPS, 16), routing.mask(TIMESTEPS, 16))
    other.set_beta(0.2)
    assert torch.equal(routing.mask(TIMESTEPS, 16), routing_mask(TIMESTEPS, 16, beta=0.7))
