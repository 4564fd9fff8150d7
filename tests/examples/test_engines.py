"""Two processes under every engine train, save and go on as one process does with the whole batch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train_families import VIDEO_SCRIPT, make_videos
from test_train_unconditional import SCRIPT as UNCONDITIONAL
from test_train_unconditional import UNET
from text_to_image_runs import FAMILIES, make_captioned_images
from text_to_image_runs import SCRIPT as TEXT_TO_IMAGE
from tiny_pipelines import PIPELINES
from training_runs import (
    EXAMPLES,
    SCRIPT,
    arguments,
    assert_close_weights,
    configs,
    finish,
    kill,
    load_script,
    make_images,
    run_main,
    wait_for,
)


pytestmark = pytest.mark.slow

ENGINES = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
every_engine = pytest.mark.parametrize("engine", ENGINES)

FLAGS = {
    "plain": (),
    "ema": ("--use_ema",),
    "uncertainty": ("--balancing", "uncertainty"),
    "continuous": ("--balancing", "continuous_uncertainty", "--gradient_checkpointing", "--routing_warmup_steps", 2),
    "accumulation": ("--gradient_accumulation_steps", 2),
}
# What every run does on its way
STEPS = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--validation_steps", 3, "--logging_steps", 1)


def start(engine: str, script: Path, argv: list[str], *launcher: object) -> subprocess.Popen:
    """Starts a script in two processes as the ready configuration of an engine says, but for the hardware."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--config_file", EXAMPLES / "accelerate_configs" / f"{engine}.yaml", "--mixed_precision", "no"]
    options += ["--num_processes", 2, "--main_process_port", port, *launcher]
    if engine in ("ddp", "two_nodes"):
        wrapper, device = [], {"ACCELERATE_USE_CPU": "true"}
    else:
        wrapper = [Path(__file__).with_name("on_cpu.py")]
        device = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, [*options, *wrapper, script, *argv])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **device, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory) -> Callable[..., Path]:
    """Runs of one process that accumulates the gradients of as many forward calls."""
    runs = {}

    def run(cell: str) -> Path:
        if cell not in runs:
            flags = list(FLAGS[cell])
            if "--gradient_accumulation_steps" not in flags:
                flags += ["--gradient_accumulation_steps", 2]
            else:
                flags[-1] *= 2
            runs[cell] = run_main(load_script(SCRIPT), argv(images, tmp_path_factory.mktemp(cell) / "run", *flags))
        return runs[cell]

    return run


def argv(images: Path, output_dir: Path, *flags: object) -> list[str]:
    return arguments(images, output_dir, *STEPS, "--validation_data_dir", images, *flags)


def history(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "loss_history.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    left, right = history(one), history(other)
    assert [entry["step"] for entry in left] == [entry["step"] for entry in right] == [1, 2, 3, 4]
    for before, after in zip(left, right, strict=True):
        assert before["loss"] == pytest.approx(after["loss"], abs=tolerance)
        assert before["weights"] == pytest.approx(after["weights"], abs=tolerance)
    files = [next(run.glob("[tu]*/diffusion_pytorch_model.safetensors")) for run in (one, other)]
    assert_close_weights(*map(load_file, files), tolerance)
    assert (one / "model_index.json").read_text() == (other / "model_index.json").read_text()
    assert configs(one) == configs(other)
    for part in ("validation_loss", "validation_loss/eighth_0"):
        results = [json.loads((run / "training_config.json").read_text())["results"][part] for run in (one, other)]
        assert results[0] == pytest.approx(results[1], abs=tolerance)
    for grid in ("step-00000003.png", "step-00000004.png"):
        pixels = [np.asarray(Image.open(run / "samples" / grid), dtype=int) for run in (one, other)]
        assert np.abs(pixels[0] - pixels[1]).max() <= (1 if tolerance else 0)


@every_engine
@pytest.mark.parametrize("cell", FLAGS)
def test_two_processes_are_one_that_accumulates(cell, engine, images, alone, tmp_path):
    finish(start(engine, SCRIPT, argv(images, tmp_path / "run", *FLAGS[cell])))
    exact = engine == "ddp" and cell != "accumulation"  # the order of whose sum is another
    assert_same_run(tmp_path / "run", alone(cell), 0 if exact else 1e-5)


OTHER_SCRIPTS = {
    UNCONDITIONAL: lambda folder: (make_images(folder / "data"), ("--unet_config", {**UNET, "dropout": 0.0})),
    TEXT_TO_IMAGE: lambda folder: (make_captioned_images(folder / "data"), pretrained("sdxl", folder)),
    VIDEO_SCRIPT: lambda folder: (make_videos(folder / "data"), pretrained("wan", folder)),
}


def pretrained(name: str, folder: Path) -> tuple:
    PIPELINES[name].pipeline().save_pretrained(folder / "base")
    more = ("--num_frames", 5) if name == "wan" else ()
    return ("--pretrained_model_name_or_path", folder / "base", "--resolution", PIPELINES[name].size, *more)


@every_engine
@pytest.mark.parametrize("script", OTHER_SCRIPTS, ids=lambda script: script.stem)
def test_every_script_is_one_process_that_accumulates_and_goes_on(script, engine, tmp_path):
    data, source = OTHER_SCRIPTS[script](tmp_path)

    def flags(run: str, *more: object) -> list[str]:
        # Some gradients, such as that of a key's bias, are rounding alone, which Adam would scale up.
        options = (*STEPS, "--train_batch_size", 2, "--use_ema", "--adam_epsilon", 1e-4, "--validation_data_dir", data)
        return arguments(data, tmp_path / run, *source, *options, *more, source=())

    run_main(load_script(script), flags("alone", "--gradient_accumulation_steps", 2))
    finish(start(engine, script, flags("run", "--max_train_steps", 2, "--validation_steps", 5)))
    finish(start(engine, script, flags("run", "--resume_from_checkpoint", "latest")))
    assert_same_run(tmp_path / "alone", tmp_path / "run")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler, gcc")
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_a_shared_model_is_compiled_and_warmed_up_in_bfloat16(engine, images, tmp_path):
    flags, bf16 = ("--routing_warmup_steps", 3), ("--mixed_precision", "bf16")
    one = argv(images, tmp_path / "alone", *flags, *bf16, "--gradient_accumulation_steps", 2)
    run_main(load_script(SCRIPT), one)
    finish(start(engine, SCRIPT, argv(images, tmp_path / "run", *flags, "--compile"), *bf16))
    losses = [[entry["loss"] for entry in history(tmp_path / run)] for run in ("alone", "run")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_a_run_in_bfloat16_goes_on_with_weights_in_float32(engine, images, tmp_path):
    bf16, flags = ("--mixed_precision", "bf16"), ("--use_ema", "--balancing", "uncertainty")
    finish(start(engine, SCRIPT, argv(images, tmp_path / "whole", *flags), *bf16))
    for more in (("--max_train_steps", 2, "--validation_steps", 5), ("--resume_from_checkpoint", "latest")):
        finish(start(engine, SCRIPT, argv(images, tmp_path / "run", *flags, *more), *bf16))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.fixture(scope="module")
def balanced(images, tmp_path_factory) -> Path:
    """A run that balances gradients, which are those of all processes, in two processes of DDP."""
    run = tmp_path_factory.mktemp("balanced") / "run"
    finish(start("ddp", SCRIPT, argv(images, run, "--balancing", "aligned_mtl", "--num_clusters", 3)))
    return run


@pytest.mark.parametrize("engine", ["fsdp2"])
def test_gradients_of_clusters_are_balanced_in_shards(engine, images, balanced, tmp_path):
    finish(start(engine, SCRIPT, argv(images, tmp_path / "run", "--balancing", "aligned_mtl", "--num_clusters", 3)))
    assert_same_run(tmp_path / "run", balanced)
    assert any(entry["weights"] != [1, 1, 1] for entry in history(balanced))


@pytest.mark.parametrize("engine", ["deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_refuses_to_balance_gradients_before_anything_is_loaded(engine, images, tmp_path):
    process = start(engine, SCRIPT, argv(images, tmp_path / "run", "--balancing", "pcgrad"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "needs the gradients of every cluster by themselves, which DeepSpeed does not give: use FSDP2" in output
    assert not (tmp_path / "run").exists()


@every_engine
def test_a_run_goes_on_with_another_number_of_processes_and_another_engine(engine, images, alone, tmp_path):
    together, half = argv(images, tmp_path / "run", "--use_ema"), ("--max_train_steps", 2, "--validation_steps", 5)
    resume, one = ("--resume_from_checkpoint", "latest"), ("--gradient_accumulation_steps", 2)
    finish(start(engine, SCRIPT, [*together, *map(str, half)]))
    run_main(load_script(SCRIPT), [*together, *map(str, (*resume, *one, "--max_train_steps", 3))])
    finish(start("fsdp2" if engine.startswith("deep") else "deepspeed_zero3", SCRIPT, [*together, *resume]))
    assert_same_run(tmp_path / "run", alone("ema"))


@every_engine
def test_adapters_are_trained_saved_and_gone_on_with(engine, tmp_path):
    images = make_captioned_images(tmp_path / "images")
    plain = FAMILIES["sd"].save_plain(tmp_path / "plain")
    source = ("--pretrained_model_name_or_path", plain)

    def flags(run: str, *more: object) -> list[str]:
        options = (*STEPS, "--train_batch_size", 2, "--rank", 2, "--validation_prompts", "a one", *more)
        return arguments(images, tmp_path / run, *options, source=source)

    run_main(load_script(TEXT_TO_IMAGE), flags("alone", "--gradient_accumulation_steps", 2))
    finish(start(engine, TEXT_TO_IMAGE, flags("together", "--max_train_steps", 2)))
    finish(start(engine, TEXT_TO_IMAGE, flags("together", "--resume_from_checkpoint", "latest")))
    one, other = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("alone", "together"))
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


@every_engine
def test_a_process_that_is_killed_takes_the_others_down_and_the_run_goes_on(engine, images, alone, tmp_path):
    flags = argv(images, tmp_path / "run")
    process = start(engine, SCRIPT, [*flags, "--max_train_steps", "100000"])
    try:
        wait_for((tmp_path / "run" / "checkpoint-2" / "training_state.json").exists, process)
        os.kill(max(workers(process.pid)), signal.SIGKILL)
        killed = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - killed < 60
    finally:
        kill(process)
    for later in sorted((tmp_path / "run").glob("checkpoint-*")):
        if later.name != "checkpoint-2":
            later.rename(tmp_path / later.name)
    resume = ("--resume_from_checkpoint", "checkpoint-2", "--gradient_accumulation_steps", "2")
    run_main(load_script(SCRIPT), [*flags, *resume])
    files = [run / "transformer" / "diffusion_pytorch_model.safetensors" for run in (tmp_path / "run", alone("plain"))]
    assert_close_weights(*map(load_file, files), 0 if engine == "ddp" else 1e-5)


def workers(launcher: int) -> list[int]:
    """The processes that train, by what `/proc` says of the launcher's children."""
    return [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def test_two_machines_are_one(images, alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ("--main_process_ip", "127.0.0.1", "--main_process_port", port)
    processes = [
        start("two_nodes", SCRIPT, argv(images, tmp_path / "run"), *place, "--machine_rank", r) for r in (1, 0)
    ]
    for process in processes:
        finish(process)
    assert_same_run(tmp_path / "run", alone("plain"), 0)
