"""What is published of a run has no secrets, and no paths of the machine that it was made on."""

import json
import shlex
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dtr.run_record import public_command, publishable, published_path


TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize("value", [TOKEN, f"https://me:{TOKEN}@huggingface.co/me/digits", {"url": [f"x {TOKEN}"]}])
def test_a_token_typed_in_the_wrong_place_is_cut_out(value):
    typed = value if isinstance(value, str) else json.dumps(value)
    assert TOKEN not in json.dumps(publishable(value))
    assert TOKEN not in public_command(["train.py", "--dataset_name", typed, f"--dataset_name={typed}"])
    assert publishable("https://me:password@example.org/digits") == "https://example.org/digits"
    assert publishable('{"a":1,  "b":[2]}') == '{"a":1,  "b":[2]}'


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
        ("output_dir", "./run", "path/to/run"),
        ("resume_from_checkpoint", "../run/checkpoint-10", "path/to/checkpoint-10"),
        ("resume_from_checkpoint", "latest", "latest"),
        ("cache_dir", r"C:\Users\me\cache", "path/to/cache"),
        ("model_config", "model.json", "path/to/model.json"),
        ("pretrained_model_name_or_path", "owner/base", "path/to/base"),
        ("pretrained_model_name_or_path", "owner/other", "owner/other"),
        ("dataset_name", "uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("hub_model_id", "owner/base", "owner/base"),
        ("image_column", "image", "image"),
        ("anything", "{here}/demo", "path/to/demo"),
        ("anything", "demo/digits", "path/to/digits"),
        ("anything", "demo", "demo"),
        ("anything", "file://{here}/demo", "path/to/demo"),
        ("output_dir", "/", "path/to/folder"),
        ("output_dir", "..", "path/to/folder"),
        ("output_dir", str(Path.home()), "path/to/folder"),
    ],
)
def test_paths_of_this_machine_become_placeholders_and_ids_stay(here, name, typed, published):
    typed = typed.format(here=here)
    assert publishable({name: typed}) == {name: published}
    assert publishable({name: [typed]}) == {name: [published]}
    for flags in ([f"--{name}", typed], [f"--{name}={typed}"]):
        command = shlex.split(public_command(["train.py", *flags, "--seed", "3"]))
        expected = [flag.replace(typed, published) for flag in flags]
        assert command == ["accelerate", "launch", "train.py", *expected, "--seed", "3"]


def test_every_value_of_a_flag_is_looked_at(here):
    command = public_command(["train.py", "--model_name_or_path", "owner/base", "demo", "owner/other"])
    assert command.endswith("--model_name_or_path path/to/base path/to/demo owner/other")


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ("examples/train.py", "examples/train.py"),
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


@pytest.mark.parametrize("host", [socket.gethostname(), "box", "a.b.example.org", "10.0.0.5", "my-laptop_2"])
def test_only_the_machine_goes_from_the_name_of_a_file_of_tensorboard(host):
    published = "logs/run/events.out.tfevents.1764331200.4711.0"
    assert published_path(f"logs/run/events.out.tfevents.1764331200.{host}.4711.0") == published
    assert published_path(published) == published
    assert published_path("transformer/model-00001.4711.0") == "transformer/model-00001.4711.0"
