import json
import shlex
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType
from run_config import run_config
from tiny_dit import routed_dit

from diffusers_dtr import __version__
from diffusers_dtr.training.run.record import describe_model, run_record, tracker_config


OPTIONS = {"seed": 3, "hub_token": "hf_secret", "model_config": {"num_layers": 2}, "random_flip": True}


def make_record(*flags: str, **results) -> dict:
    accelerator = Accelerator(cpu=True)
    return run_record(run_config(**OPTIONS), ["/home/me/train.py", *flags], accelerator, seconds=1.23, **results)


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--seed", "3", "--hub_token", "hf_secret"], "--seed 3"),
        (["--hub-token=hf_secret", "--seed=3"], "--seed=3"),
        (["--api_key", "hf_secret", "--use_ema"], "--use_ema"),
        (["--model_config", '{"num_layers": 2}'], """--model_config '{"num_layers": 2}'"""),
    ],
)
def test_command_can_be_typed_again_and_has_no_token(flags, kept):
    assert make_record(*flags)["command"] == f"accelerate launch train.py {kept}"


def test_record_is_json_without_the_token():
    text = json.dumps(make_record("--hub_token", "hf_secret", losses=[1.0]))
    assert "hf_secret" not in text
    assert json.loads(text)["losses"] == [1.0]
    arguments = json.loads(text)["arguments"]
    expected = {"seed": 3, "model_config": {"num_layers": 2}, "vae_name_or_path": None, "random_flip": True}
    assert expected.items() <= arguments.items()
    assert "hub_token" not in arguments


def test_paths_inside_a_configuration_and_results_become_placeholders(tmp_path):
    config = {"sub": [{"file": f"{tmp_path}/a.bin"}], "n": 1}
    record = make_record("--model_config", json.dumps(config), images=[f"{tmp_path}/x/1.png (row 7)"])
    assert record["images"] == ["path/to/1.png (row 7)"]
    assert json.loads(shlex.split(record["command"])[-1]) == {"sub": [{"file": "path/to/a.bin"}], "n": 1}


def test_record_tells_versions_machine_and_duration():
    record = make_record()
    assert record["versions"]["diffusers-dtr"] == __version__
    assert {"python", "torch", "diffusers", "accelerate", "datasets", "transformers"} < record["versions"].keys()
    assert "CPU" in record["hardware"]
    assert (record["num_processes"], record["engine"]) == (1, "NO")
    assert record["mixed_precision"] == "no"
    assert record["seconds"] == 1.2


def test_the_command_has_what_accelerate_was_configured_with():
    device = Accelerator(cpu=True).device
    options = {"num_processes": 2, "distributed_type": DistributedType.MULTI_CPU, "mixed_precision": "bf16"}
    configured = SimpleNamespace(**options, gradient_accumulation_steps=2, device=device)

    def command(*flags: str) -> str:
        return run_record(run_config(), ["train.py", *flags], configured, 1.0)["command"]

    launcher, steps = "accelerate launch --num_processes 2", "--gradient_accumulation_steps 2"
    assert command() == f"{launcher} --mixed_precision bf16 train.py {steps}"
    assert command("--mixed-precision=bf16") == f"{launcher} train.py --mixed-precision=bf16 {steps}"
    for typed in (["--gradient_accumulation_steps=2"], ["--gradient_accumulation_steps", "2"]):
        assert command(*typed).replace("=", " ") == f"{launcher} --mixed_precision bf16 train.py {steps}"


def test_a_model_is_described_by_its_class_size_and_routing():
    model = routed_dit(routing_beta=0.5)
    model.pos_embed.requires_grad_(False)
    described = json.loads(json.dumps(describe_model(model)))
    frozen = sum(parameter.numel() for parameter in model.pos_embed.parameters())
    assert described["class"] == "DTRTransformer2DModel"
    assert described["num_parameters"] - described["num_trained_parameters"] == frozen > 0
    assert described["config"]["routing_beta"] == 0.5
    assert described["config"]["attention_head_dim"] == 8
    assert described["routed_widths"] == [16]


def test_trackers_get_numbers_and_strings_without_the_token_and_paths(tmp_path):
    config = tracker_config(run_config(**OPTIONS, output_dir=str(tmp_path)))
    expected = {"seed": 3, "model_config": "{'num_layers': 2}", "vae_name_or_path": "None", "random_flip": True}
    assert expected.items() <= config.items()
    assert config["output_dir"] == f"path/to/{tmp_path.name}"
    assert {*map(type, config.values())} <= {int, float, str, bool}
    assert "hub_token" not in config


@pytest.mark.parametrize("argv", ["", "-c", "/usr/lib/ipykernel_launcher.py"])
def test_a_notebook_has_no_command(argv):
    assert run_record(run_config(), [argv], Accelerator(cpu=True), 1.0)["command"] == ""
