import argparse
import getpass
import json
import shlex
from pathlib import Path

import pytest
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from tiny_dit import routed_dit

from diffusers_dtr import __version__
from diffusers_dtr.training import run_record, tracker_config
from diffusers_dtr.training.record import describe_model, public_arguments, public_command, publishable


ARGS = argparse.Namespace(seed=3, hub_token="hf_secret", model_config={"num_layers": 2}, vae=None, flip=True, rate=0.5)
TOKEN = "hf_" + "aB3" * 11


def make_record(*flags: str, args: argparse.Namespace = ARGS, **results) -> dict:
    return run_record(args, ["/home/me/train.py", *flags], Accelerator(cpu=True), seconds=1.23, **results)


# ---- secrets


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--seed", "3", "--hub_token", "hf_secret"], "--seed 3"),
        (["--hub_token", "hf_secret", "--seed", "3"], "--seed 3"),
        (["--seed", "3", "--hub_token=hf_secret"], "--seed 3"),
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
    assert json.loads(text)["arguments"] == {
        "seed": 3,
        "model_config": {"num_layers": 2},
        "vae": None,
        "flip": True,
        "rate": 0.5,
    }


@pytest.mark.parametrize("value", [TOKEN, f"https://me:{TOKEN}@huggingface.co/me/digits", {"url": [f"x {TOKEN}"]}])
def test_a_token_typed_in_the_wrong_place_is_cut_out(value):
    record = make_record("--dataset_name", json.dumps(value), args=argparse.Namespace(dataset_name=value), note=value)
    assert TOKEN not in json.dumps(record)


def test_the_rest_of_an_address_with_a_password_stays():
    assert publishable("https://me:password@example.org/digits") == "https://example.org/digits"


# ---- paths


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with data, a model and a configuration in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "digits").mkdir(parents=True)
    (tmp_path / "owner" / "base").mkdir(parents=True)
    (tmp_path / "image").mkdir()
    (tmp_path / "model.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "typed", "published"),
    [
        ("train_data_dir", "{here}/demo/digits", "path/to/digits"),
        ("train_data_dir", "demo/digits", "path/to/digits"),
        ("train_data_dir", "demo/digits/", "path/to/digits"),
        ("output_dir", "./run", "path/to/run"),
        ("output_dir", "~/run", "path/to/run"),
        ("resume_from_checkpoint", "../run/checkpoint-10", "path/to/checkpoint-10"),
        ("resume_from_checkpoint", "latest", "latest"),
        ("cache_dir", r"C:\Users\me\cache", "path/to/cache"),
        ("model_config", "model.json", "path/to/model.json"),
        ("pretrained_model_name_or_path", "owner/base", "path/to/base"),
        ("pretrained_model_name_or_path", "owner/other", "owner/other"),
        ("dataset_name", "uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("dataset_name", "{here}/owner", "path/to/owner"),
        ("hub_model_id", "owner/base", "owner/base"),
        ("image_column", "image", "image"),
        ("anything", "{here}/demo", "path/to/demo"),
        ("anything", "file://{here}/demo", "path/to/demo"),
        ("output_dir", "/", "path/to/folder"),
        ("output_dir", "..", "path/to/folder"),
        ("output_dir", str(Path.home()), "path/to/folder"),
    ],
)
def test_paths_of_this_machine_become_placeholders_and_ids_stay(here, name, typed, published):
    typed = typed.format(here=here)
    assert public_arguments(argparse.Namespace(**{name: typed})) == {name: published}
    assert public_arguments(argparse.Namespace(**{name: [typed]})) == {name: [published]}
    for flags in ([f"--{name}", typed], [f"--{name}={typed}"]):
        command = shlex.split(public_command(["train.py", *flags, "--seed", "3"]))
        assert command == [
            "accelerate",
            "launch",
            "train.py",
            *[f.replace(typed, published) for f in flags],
            *command[-2:],
        ]
        assert command[-2:] == ["--seed", "3"]


def test_every_value_of_a_flag_is_looked_at(here):
    command = public_command(["train.py", "--model_name_or_path", "owner/base", "demo", "owner/other"])
    assert command.endswith("--model_name_or_path path/to/base path/to/demo owner/other")


def test_paths_inside_a_configuration_and_results_become_placeholders(here):
    config = {"sub": [{"file": f"{here}/a.bin"}], "n": 1}
    record = make_record("--model_config", json.dumps(config), unreadable_images=[f"{here}/x/1.png (row 7)"])
    assert record["unreadable_images"] == ["path/to/1.png (row 7)"]
    assert json.loads(shlex.split(record["command"])[-1]) == {"sub": [{"file": "path/to/a.bin"}], "n": 1}


def test_a_configuration_without_paths_stays_as_it_was_typed():
    assert publishable('{"a":1,  "b":[2]}') == '{"a":1,  "b":[2]}'


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ("examples/class_conditional/train.py", "examples/class_conditional/train.py"),
        ("/home/me/examples/train.py", "train.py"),
        ("../me/train.py", "train.py"),
        ("a/../../me/train.py", "train.py"),
    ],
)
def test_a_script_keeps_the_folders_below_the_one_it_was_started_in(script, named):
    assert public_command([script], ["python"]) == f"python {named}"


@given(st.recursive(st.text() | st.integers() | st.booleans() | st.none(), lambda x: st.lists(x, max_size=3)))
def test_publishing_again_changes_nothing(value):
    once = publishable(value, "output_dir")
    assert publishable(once, "output_dir") == once


def test_no_placeholder_names_the_user():
    for home in (str(Path.home()), f"{Path.home()}/", "~"):
        assert publishable(home, "cache_dir") == "path/to/folder"
    assert getpass.getuser() not in publishable(f"{Path.home()}/run", "cache_dir").removeprefix("path/to/")


# ---- the rest


def test_record_tells_versions_machine_and_duration():
    record = make_record()
    assert record["versions"]["diffusers-dtr"] == __version__
    assert {"python", "torch", "diffusers", "accelerate", "datasets", "transformers"} < record["versions"].keys()
    assert "CPU" in record["hardware"]
    assert record["num_processes"] == 1
    assert record["mixed_precision"] == "no"
    assert record["seconds"] == 1.2


def test_the_command_has_what_accelerate_was_configured_with():
    class Configured:
        num_processes, mixed_precision, device = 2, "bf16", Accelerator(cpu=True).device

    configured, typed = (
        run_record(argparse.Namespace(mixed_precision=precision), ["train.py"], Configured, 1.0)["command"]
        for precision in (None, "bf16")
    )
    assert configured == "accelerate launch --num_processes 2 --mixed_precision bf16 train.py"
    assert typed == "accelerate launch --num_processes 2 train.py"


def test_a_model_is_described_by_its_class_size_and_routing():
    model = routed_dit(routing_beta=0.5)
    model.pos_embed.requires_grad_(False)
    described = json.loads(json.dumps(describe_model(model)))
    frozen = sum(parameter.numel() for parameter in model.pos_embed.parameters())
    assert described["class"] == "DTRTransformer2DModel"
    assert described["num_parameters"] - described["num_trained_parameters"] == frozen > 0
    assert described["config"]["routing_beta"] == 0.5
    assert described["config"]["attention_head_dim"] == 8


def test_trackers_get_numbers_and_strings_without_the_token_and_paths(here):
    assert tracker_config(ARGS) == {
        "seed": 3,
        "model_config": "{'num_layers': 2}",
        "vae": "None",
        "flip": True,
        "rate": 0.5,
    }
    assert tracker_config(argparse.Namespace(output_dir=str(here))) == {"output_dir": f"path/to/{here.name}"}
