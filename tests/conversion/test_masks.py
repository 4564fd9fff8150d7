"""The routing that a table of masks stands for."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from diffusers_dtr import random_routing_mask
from diffusers_dtr.conversion.masks import mask_table, read_mask_tables


@example(num_channels=8, tenths=8, alpha=0.5, num_timesteps=5)  # 1 is at the end of the interval, and rounds otherwise
@settings(max_examples=20, deadline=None)
@given(
    num_channels=st.integers(8, 400),
    tenths=st.integers(2, 10),
    alpha=st.sampled_from([0.5, 1.0, 2.5, 4.0, 7.0]),
    num_timesteps=st.integers(2, 1200),
)
def test_the_routing_of_a_table_gives_the_table(num_channels, tenths, alpha, num_timesteps):
    table = mask_table(num_timesteps, num_channels, alpha, tenths / 10)
    routing = read_mask_tables([table, table.clone()], {})
    assert (routing["routing_type"], routing["routing_timestep_range"]) == ("dtr", (0, num_timesteps - 1))
    found = mask_table(num_timesteps, num_channels, routing["routing_alpha"], routing["routing_beta"])
    assert torch.equal(found, table)


def test_the_authors_own_tables_are_understood():
    with safe_open(Path(__file__).parents[1] / "fixtures" / "masks.safetensors", "pt") as file:
        starts = {key: file.get_tensor(key).long() for key in file.keys()}  # noqa: SIM118 - not a dictionary
        num_active = {key: int(value) for key, value in file.metadata().items() if key in starts}
    for key, start in starts.items():
        num_channels, beta, alpha = re.fullmatch(r"T1000_C(\d+)_beta(.+)_alpha(.+)", key).groups()
        offset = torch.arange(int(num_channels)) - start[:, None]
        routing = read_mask_tables([((offset >= 0) & (offset < num_active[key])).float()], {})
        # Without a window, any exponent fits.
        expected = (float(beta), 4.0 if beta == "1.0" else float(alpha))
        assert (routing["routing_beta"], routing["routing_alpha"]) == expected


def test_given_values_are_kept_if_they_give_the_same_masks():
    table = mask_table(1000, 64, 4.0, 0.8)
    given = {"routing_beta": 0.801, "routing_alpha": None, "routing_seed": 3}
    assert read_mask_tables([table], given)["routing_beta"] == 0.801
    with pytest.raises(ValueError, match=r"'routing_beta': 0\.8,.* got \{'routing_beta': 0\.7\}"):
        read_mask_tables([table], {"routing_beta": 0.7})


def damaged(position, value):
    table = mask_table(100, 16, 4.0, 0.8)
    table[position] = value
    return table


@pytest.mark.parametrize(
    "table",
    [
        *(torch.zeros(100, 16), torch.ones(1, 16), torch.ones(100), torch.ones(100, 0)),
        torch.zeros(100, 16).index_fill(1, torch.tensor([15]), 1.0),
        *(damaged((50, 15), 1.0), damaged((50, 3), 0.5), damaged((50, 3), float("nan"))),
        random_routing_mask(torch.arange(100), 16, beta=0.5).float(),
    ],
)
def test_what_is_no_sliding_window_is_refused(table):
    with pytest.raises(ValueError, match="are not those of a window that slides over the timesteps"):
        read_mask_tables([table], {})


def test_random_routing_is_named_where_blocks_differ():
    tables = [random_routing_mask(torch.arange(100), 16, seed=seed).float() for seed in range(2)]
    with pytest.raises(ValueError, match="differ between blocks, as those of random routing do"):
        read_mask_tables(tables, {})
