"""What the authors' files say of their runs, and what they do not."""

from __future__ import annotations

import argparse

import pytest
import torch
from original_checkpoints import fake_omegaconf, omegaconf_of

from diffusers_dtr.conversion.checkpoint_file import read_original_checkpoint
from diffusers_dtr.conversion.run_settings import OriginalRun, Recorded, original_run, read_settings


MODEL = {"name": "DiT-L/2", "param": {"num_classes": "${data.num_classes}", "latent_size": 32}}
ANT_ARGS = {"image_size": 256, "total_clusters": 5, "grouping_method": "uniform", "data_path": "/data"}
ANT_CONFIG = {"model": MODEL, "optim": {"lr": 1e-4}}
DIT_ARGS = {"model": "DiT-XL/2", "image_size": 512, "num_classes": 1000, "vae": "ema", "data_path": "/data"}
COSINE, SAID = "squaredcos_cap_v2", "as the file says"
ANT, DIT = (f"the file is of {name}'s code, whose runs have it" for name in ("ANT", "DiT"))


def dtr_config(schedule):
    return {"general": {"image_size": 256, "schedule_name": schedule, "vae": "mse"}, "models": MODEL}


@pytest.mark.parametrize(
    ("args", "config", "expected"),
    [
        (None, dtr_config("cosine"), OriginalRun(COSINE, SAID, None, 256, "stabilityai/sd-vae-ft-mse")),
        (None, dtr_config("linear"), OriginalRun("linear", SAID, None, 256, "stabilityai/sd-vae-ft-mse")),
        (ANT_ARGS, ANT_CONFIG, OriginalRun(COSINE, ANT, None, 256)),
        (
            {**ANT_ARGS, "mtl_method": "nash"},
            None,
            OriginalRun(COSINE, ANT, None, 256, "madebyollin/sdxl-vae-fp16-fix"),
        ),
        (DIT_ARGS, None, OriginalRun("linear", DIT, None, 512, "stabilityai/sd-vae-ft-ema")),
    ],
)
def test_a_run_is_known_by_its_settings_or_by_whose_code_it_is_of(tmp_path, args, config, expected):
    with fake_omegaconf() as modules:
        places = {"args": args and argparse.Namespace(**args), "config": config and omegaconf_of(modules, config)}
        torch.save({"ema": {"a": torch.ones(1)}, **places}, tmp_path / "0400000.pt")
    assert original_run(read_original_checkpoint(tmp_path / "0400000.pt").settings) == expected


@pytest.mark.parametrize("settings", [{}, {"args.image_size": -1, "args.vae": 3}, {"args.data_path": "/data"}])
def test_what_is_not_known_is_none(settings):
    assert original_run(settings) == OriginalRun()


def test_numbers_of_timesteps_are_read_wherever_they_are():
    assert original_run({"args.diffusion_steps": 500}).num_train_timesteps == 500
    assert original_run({"config.models.routing.taskcount": 250}).num_train_timesteps == 250


def test_a_schedule_that_diffusers_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"noise schedule of the file must be one of linear, .* got 'warmup10'"):
        original_run({"config.general.schedule_name": "warmup10"})


def test_only_plain_values_are_settings():
    values = {"a": torch.ones(1), "b": Recorded(), "c": b"bytes", "d": object(), "e": (1, "x"), 3: True}
    assert read_settings({"args": values, "opt": {"lr": 1}}) == {"args.e.0": 1, "args.e.1": "x", "args.3": True}


def test_settings_that_hold_themselves_are_refused_at_once():
    endless: dict = {}
    endless |= {"one": endless, "two": endless}
    with pytest.raises(ValueError, match="at most 16 levels deep"):
        read_settings({"args": endless})
    with pytest.raises(ValueError, match="at most 10000, got more"):
        read_settings({"config": [[[]] * 1000] * 1000})
