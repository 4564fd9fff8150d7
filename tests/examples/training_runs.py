"""Tiny training runs as users start them: in this process through `main`, or in others through `accelerate launch`."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file


EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "class_conditional" / "train_class_conditional.py"

MODEL = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "patch_size": 2,
}
NUM_CLASSES = 3


def load_script(path: Path) -> ModuleType:
    """A script as a module; as when it is run, it finds the modules beside it."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_images(folder: Path, count: int = 24, num_classes: int = NUM_CLASSES) -> Path:
    """Noisy images, 8 high and 12 wide, whose grey value tells their class, in an image folder."""
    random = np.random.default_rng(0)
    for number in range(count):
        label = number % num_classes
        pixels = random.integers(30 * label, 30 * label + 100, (8, 12), dtype=np.uint8)
        path = folder / "abcdefgh"[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def arguments(images: Path, output_dir: Path, *flags: object, source: tuple = ("--model_config", MODEL)) -> list[str]:
    """The flags of a run of three steps; later flags win over earlier ones."""
    common = ["--train_data_dir", images, "--cache_dir", images.parent / "cache", "--output_dir", output_dir]
    small = ["--resolution", 8, "--train_batch_size", 4, "--max_train_steps", 3, "--learning_rate", 1e-2]
    grid = ["--num_validation_images", 3, "--validation_num_inference_steps", 2, "--report_to", "none"]
    values = [*source, *common, *small, *grid, *flags]
    return [json.dumps(value) if isinstance(value, dict) else str(value) for value in values]


def train(images: Path, output_dir: Path, *flags: object, **options) -> Path:
    """Runs the script in this process."""
    script = load_script(SCRIPT)
    return run_main(script, arguments(images, output_dir, *flags, **options))


def run_main(script: ModuleType, argv: list[str]) -> Path:
    args = script.parse_args(argv)
    try:
        script.main(args)
    finally:
        reset_accelerate()
    return Path(getattr(args, "run", args).output_dir)


def reset_accelerate() -> None:
    """Forgets the state that accelerate keeps for the whole process, so that the next run begins with its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def launch(argv: list[str], num_processes: int = 1, script: Path = SCRIPT) -> subprocess.Popen:
    """Starts the script as users do, in a process group of its own, so that all of it can be killed."""
    if num_processes == 1:
        launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    else:  # on a CPU, accelerate leaves several processes to others
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, str(script), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # As in a terminal: a job that a shell starts in the background ignores Ctrl-C, and so would its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        # The same kernels with and without a launcher, to the bit.
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(condition, process: subprocess.Popen, timeout: float = 240) -> None:
    """Waits until a condition holds or the process ends."""
    deadline = time.monotonic() + timeout
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def weights(output_dir: Path, name: str = "transformer") -> dict[str, torch.Tensor]:
    return load_file(output_dir / name / "diffusion_pytorch_model.safetensors")


def assert_equal_weights(one: Path, other: Path, name: str = "transformer") -> None:
    left, right = weights(one, name), weights(other, name)
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def assert_close_weights(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """
    But for the biases of keys, unless the tolerance is 0: softmax does not see them, so that their gradients are
    rounding alone, which Adam makes steps of.
    """
    assert one.keys() == other.keys()
    kept = [name for name in one if tolerance == 0 or not name.endswith(("to_k.bias", "add_k_proj.bias"))]
    pairs = ({name: tensors[name] for name in kept} for tensors in (one, other))
    torch.testing.assert_close(*pairs, rtol=0, atol=tolerance)


def same_weights(one: Path, other: Path, name: str = "transformer") -> bool:
    left, right = weights(one, name), weights(other, name)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def configs(folder: Path) -> dict[str, dict]:
    """The class and the settings of every component of a pipeline, but for versions and where it was loaded from."""
    notes = ("_diffusers_version", "_name_or_path", "transformers_version", "is_local", "local_files_only")
    files = [*folder.glob("[!c]*/*config.json")]  # not those of checkpoints
    read = {path.parent.name: json.loads(path.read_text()) for path in files}
    return {name: {key: value for key, value in config.items() if key not in notes} for name, config in read.items()}


def assert_same_configs(before: Path, after: Path, plain: str | None = None) -> None:
    """That a run changed the class and the settings of no component; a plain denoiser, which it routes, has more."""
    one, other = configs(before), configs(after)
    assert "scheduler" in one
    assert one.keys() == other.keys()
    if plain is not None:
        del one[plain]["_class_name"]
        other[plain] = {key: other[plain].get(key) for key in one[plain]}
    assert one == other


def record(output_dir: Path) -> dict:
    return json.loads((output_dir / "training_config.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train_in_this_process(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: object) -> list[dict]:
    """Trains here what a script launches in other processes, with some more flags; returns the records of the runs."""
    records = []

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        (place,) = (number for number, word in enumerate(command) if word.endswith(".py"))
        argv = [*command[place + 1 :], *map(str, flags)]
        records.append(record(run_main(load_script(Path(command[place])), argv)))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
    return records
