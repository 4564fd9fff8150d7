"""Files that anybody may have written: whatever they hold, a command ends soon, small, and with one line."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from tiny_autoencoders import tiny_vae
from tiny_dit import routed_dit

from diffusers_dtr import DTRPipeline
from diffusers_dtr.cli import main
from diffusers_dtr.conversion import original_dit_state_dict


WRONG = [None, True, 0, -1, 2.5, "", "many", [], [[]], {}, {"a": 1}, [None], 10**400, 2**63, float("nan"), "\x1b[2J\n"]
SECONDS, BYTES = 10, 2**30


# ---- what wants time and memory


def written(folder: Path, name: str, content: str | bytes) -> Path:
    """A saved pipeline in which one file is another."""
    DTRPipeline(DDPMScheduler(), transformer=routed_dit()).save_pretrained(folder)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def absurd_sizes(folder: Path) -> Path:
    config = {**routed_dit().config, "_class_name": "DTRTransformer2DModel", "num_layers": 10**12}
    return written(folder, "transformer/config.json", json.dumps({**config, "sample_size": 10**9}))


def repeated_number(folder: Path) -> Path:
    state = original_dit_state_dict(routed_dit(norm_eps=1e-6, freq_shift=0))
    name = next(name for name in state if name.endswith("mlp.fc1.weight"))
    state[name] = torch.ones(1).expand(4 * 1024, 256 * 1024)
    folder.mkdir()
    torch.save({"ema": state}, folder / "dit.pt")
    return folder / "dit.pt"


NESTED = '{"a": ' + "[" * 10**6 + "]" * 10**6 + "}"
LONG_NUMBER = '{"_class_name": "DTRTransformer2DModel", "a": ' + "9" * 10**6 + "}"
SCHEDULER, WEIGHTS = "scheduler/scheduler_config.json", "transformer/diffusion_pytorch_model.safetensors"
HOSTILE = {
    "absurd sizes": (absurd_sizes, "inspect", 0),
    "nested config": (lambda f: written(f, "transformer/config.json", NESTED), "inspect", 2),
    "nested scheduler": (lambda f: written(f, SCHEDULER, NESTED), "sample", 2),
    "long number": (lambda f: written(f, "transformer/config.json", LONG_NUMBER), "inspect", 2),
    "endless header to sample": (lambda f: written(f, WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"), "sample", 2),
    "repeated number": (repeated_number, "convert", 2),
}

# Imports first, which need more than a gigabyte of addresses; what comes after has one.
_LIMITED = f"""
import contextlib, io, json, resource, sys, time
from diffusers_dtr.cli import main
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {BYTES}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with contextlib.suppress(MemoryError):
    bytearray(2 * {BYTES})
    sys.exit("There is no limit")
results = []
for arguments in json.loads(sys.argv[1]):
    error, start = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    results.append([code, time.process_time() - start, error.getvalue()])
print(json.dumps(results))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="/proc is not there to read the size of a process")
def test_hostile_files_end_soon_and_small(tmp_path):
    outputs = {"sample": ["--output", str(tmp_path / "grid.png")], "convert": [str(tmp_path / "new"), "--no_vae"]}
    lines = []
    for number, (make, command, _) in enumerate(HOSTILE.values()):
        lines.append([command, str(make(tmp_path / str(number))), *outputs.get(command, [])])
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.pt")) < 10**6
    run = [sys.executable, "-c", _LIMITED, json.dumps(lines)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (code, seconds, error) in zip(HOSTILE, json.loads(done.stdout), strict=True):
        assert (code, seconds < SECONDS) == (HOSTILE[name][2], True), (name, code, seconds, error)
        if code:
            assert error.splitlines()[-1].startswith(f"diffusers-dtr {HOSTILE[name][1]}: "), name
            assert len(error.splitlines()[-1]) < 1000, name
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "grid.png").exists()


# ---- what has other types


@pytest.fixture
def folder(tmp_path):
    """A run's folder, with every JSON file that a command reads."""
    pipeline = DTRPipeline(DDPMScheduler(), transformer=routed_dit(), vae=tiny_vae(), id2label={0: "cat", 1: "dog"})
    pipeline.save_pretrained(tmp_path / "run")
    clusters = {"num_clusters": 3, "boundaries": [0, 100, 400, 1000]}
    model = {"class": "DTRTransformer2DModel", "config": {"routing_beta": 0.8}, "routed_widths": [16]}
    record = {"clusters": clusters, "arguments": {"seed": 0}, "model": model, "command": "python train.py"}
    files = {"training_state.json": {"global_step": 20, "settings": {}}, "training_config.json": record}
    for name, content in files.items():
        (tmp_path / "run" / name).write_text(json.dumps(content))
    return tmp_path / "run"


def places(value, path=()):
    """Where values are in a JSON object, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutated(content, draw):
    content = copy.deepcopy(content)
    *path, last = draw.choice([*places(content)])
    parent = content
    for key in path:
        parent = parent[key]
    match draw.randrange(5):
        case 0 if isinstance(parent, dict):
            del parent[last]
        case 1:
            parent[last] = [parent[last]]
        case 2 if isinstance(parent, dict):
            parent[draw.choice(["", "\x1b[2J", "_module", "1" * 100])] = draw.choice(WRONG)
        case _:
            parent[last] = draw.choice(WRONG)
    return content if draw.random() > 0.05 else draw.choice(WRONG)


SWEEPS = [
    (["inspect"], 60),
    (["inspect", "adapters"], 20),
    (["sample", "--labels", "dog", "--num_images", "1", "--num_inference_steps", "1", "--output", "{number}.png"], 20),
    (["convert", "{number}"], 20),
    (["card", "--output", "card{number}"], 20),
]


@pytest.mark.parametrize(("arguments", "times"), SWEEPS, ids=lambda value: str(value)[:20])
def test_a_command_on_a_mutated_folder_succeeds_or_is_one_line(folder, capsys, monkeypatch, arguments, times):
    monkeypatch.chdir(folder.parent)
    command, *rest = arguments
    if rest == ["adapters"]:
        rest, record = [], folder / "training_config.json"
        folder = folder.parent / "lora"
        folder.mkdir()
        save_file({"a.lora_A.weight": torch.ones(2, 2)}, folder / "pytorch_lora_weights.safetensors")
        record.rename(folder / record.name)
    draw, succeeded = random.Random(1), 0
    files = sorted(path for path in folder.rglob("*.json"))
    for number in range(times):
        path = draw.choice(files)
        original = path.read_text()
        path.write_text(json.dumps(mutated(json.loads(original), draw)))
        try:
            code = main([command, str(folder), *(part.format(number=number) for part in rest)])
        except Exception as error:
            raise AssertionError(f"{path.relative_to(folder)}: {path.read_text()[:2000]}") from error
        last = capsys.readouterr().err.splitlines()[-1:]
        assert code == 0 or (code == 2 and last[0].startswith(f"diffusers-dtr {command}: ")), last
        succeeded += code == 0
        path.write_text(original)
    assert times / 10 < succeeded
    assert command == "card" or succeeded < times
