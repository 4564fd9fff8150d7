"""What the authors' files say of their runs, and what they do not."""

from __future__ import annotations

import argparse

import pytest
import torch
from hostile_pickles import fake_omegaconf, omegaconf_of

from diffusers_dtr.conversion.checkpoint_file import read_original_checkpoint
from diffusers_dtr.conversion.run_settings import OriginalRun, Recorded, original_run, read_settings


DTR_CONFIG = {
    "general": {"image_size": 256, "schedule_name": "cosine", "loss_weight_type": "uw", "vae": "mse"},
    "models": {"name": "DiT-L/2", "param": {"num_classes": "${data.num_classes}", "latent_size": 32}},
    "logs": {"results_dir": "results/${general.schedule_name}_scheduling"},
}
ANT_CONFIG = {"model": {"name": "DiT-L/2", "param": {"num_classes": 1000, "latent_size": 32}}, "optim": {"lr": 1e-4}}
ANT_ARGS = {"image_size": 256, "total_clusters": 5, "grouping_method": "uniform", "data_path": "/data"}
DIT_ARGS = {"model": "DiT-XL/2", "image_size": 512, "num_classes": 1000, "vae": "ema", "data_path": "/data"}


def run_of(tmp_path, args=None, config=None):
    """What is read of a file with these settings."""
    with fake_omegaconf() as modules:
        places = {"args": args and argparse.Namespace(**args), "config": config and omegaconf_of(modules, config)}
        torch.save({"ema": {"a": torch.ones(1)}, **places}, tmp_path / "0400000.pt")
    return original_run(read_original_checkpoint(tmp_path / "0400000.pt").settings)


def test_dtrs_configuration_is_read(tmp_path):
    for theirs, ours in (("cosine", "squaredcos_cap_v2"), ("linear", "linear")):
        general = {**DTR_CONFIG["general"], "schedule_name": theirs}
        run = run_of(tmp_path, config={**DTR_CONFIG, "general": general})
        assert run == OriginalRun(ours, "as the file says", None, 256, "stabilityai/sd-vae-ft-mse")


@pytest.mark.parametrize(
    ("args", "config", "code", "expected"),
    [
        (ANT_ARGS, ANT_CONFIG, "ANT", ("squaredcos_cap_v2", 256, None)),
        (
            {**ANT_ARGS, "mtl_method": "nash"},
            ANT_CONFIG,
            "ANT",
            ("squaredcos_cap_v2", 256, "madebyollin/sdxl-vae-fp16-fix"),
        ),
        (DIT_ARGS, None, "DiT", ("linear", 512, "stabilityai/sd-vae-ft-ema")),
    ],
)
def test_other_runs_have_the_schedule_that_their_code_always_has(tmp_path, args, config, code, expected):
    run = run_of(tmp_path, args, config)
    assert (run.noise_schedule, run.image_size, run.vae) == expected
    assert f"{code}'s code" in run.reason


@pytest.mark.parametrize("settings", [{}, {"args.image_size": -1, "args.vae": 3}, {"args.data_path": "/data"}])
def test_what_is_not_known_is_none(settings):
    assert original_run(settings) == OriginalRun()


def test_numbers_of_timesteps_are_read_wherever_they_are():
    assert original_run({"args.diffusion_steps": 500}).num_train_timesteps == 500
    assert original_run({"config.models.routing.taskcount": 250}).num_train_timesteps == 250


def test_a_schedule_that_diffusers_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"noise schedule of the file must be one of linear, .* got 'warmup10'"):
        original_run({"config.general.schedule_name": "warmup10"})


def recorded(state):
    made = Recorded()
    made.__setstate__(state)
    return made


def test_only_plain_values_are_settings():
    values = {"a": torch.ones(1), "b": recorded(None), "c": b"bytes", "d": object(), "e": (1, "x"), 3: True}
    assert read_settings({"args": values, "opt": {"lr": 1}}) == {
        "args.e.0": 1,
        "args.e.1": "x",
        "args.3": True,
    }


def test_settings_that_hold_themselves_are_refused_at_once():
    endless: dict = {}
    endless |= {"one": endless, "two": endless}
    with pytest.raises(ValueError, match="at most 16 levels deep"):
        read_settings({"args": endless})
    wide = [[[]] * 1000] * 1000
    with pytest.raises(ValueError, match="at most 10000, got more"):
        read_settings({"config": wide})
