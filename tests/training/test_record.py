import argparse
import json

import pytest
from accelerate import Accelerator

from diffusers_dtr import __version__
from diffusers_dtr.training import run_record, tracker_config


ARGS = argparse.Namespace(seed=3, hub_token="hf_secret", model_config={"num_layers": 2}, vae=None, flip=True, rate=0.5)


def make_record(*flags: str, **results) -> dict:
    return run_record(ARGS, ["/home/me/train.py", *flags], Accelerator(cpu=True), seconds=1.23, **results)


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--seed", "3", "--hub_token", "hf_secret"], "--seed 3"),
        (["--hub_token", "hf_secret", "--seed", "3"], "--seed 3"),
        (["--seed", "3", "--hub_token=hf_secret"], "--seed 3"),
        (["--model_config", '{"num_layers": 2}'], """--model_config '{"num_layers": 2}'"""),
    ],
)
def test_command_can_be_typed_again_and_has_no_token(flags, kept):
    assert make_record(*flags)["command"] == f"accelerate launch train.py {kept}"


def test_record_is_json_without_the_token():
    text = json.dumps(make_record("--hub_token", "hf_secret", losses=[1.0]))
    assert "hf_secret" not in text
    assert json.loads(text)["losses"] == [1.0]
    assert json.loads(text)["arguments"] == {
        "seed": 3,
        "model_config": {"num_layers": 2},
        "vae": None,
        "flip": True,
        "rate": 0.5,
    }


def test_record_tells_versions_machine_and_duration():
    record = make_record()
    assert record["versions"]["diffusers-dtr"] == __version__
    assert {"python", "torch", "diffusers", "accelerate", "datasets", "transformers"} < record["versions"].keys()
    assert record["hardware"]
    assert record["num_processes"] == 1
    assert record["seconds"] == 1.2


def test_trackers_get_numbers_and_strings_without_the_token():
    assert tracker_config(ARGS) == {
        "seed": 3,
        "model_config": "{'num_layers': 2}",
        "vae": "None",
        "flip": True,
        "rate": 0.5,
    }
