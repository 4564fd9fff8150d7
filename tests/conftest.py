"""What all tests share: no telemetry, no network, and a Hub of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer


# `huggingface_hub` reads its endpoint and folders once, at import, and copies them around. So the Hub listens before
# that import and the address is in the environment, for this process and for those that tests start. A test that
# does not ask for `hub` and still goes to the Hub finds one where nothing is.
if "huggingface_hub" in sys.modules:
    raise RuntimeError("huggingface_hub was imported before tests/conftest.py could point it to the tests' own Hub")
_HUB = HubServer()
_HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING")) or name == "TRANSFORMERS_OFFLINE"]:
    del os.environ[_name]
os.environ |= {
    "HF_ENDPOINT": _HUB.url,
    "HF_HOME": _HOME.name,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DO_NOT_TRACK": "1",
    "NO_PROXY": "127.0.0.1",
}
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub that the real clients talk to, with an empty cache, logged in as `owner`."""
    _HUB.reset()
    shutil.rmtree(_HOME.name)
    Path(_HOME.name).mkdir()
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    yield _HUB
    assert not _HUB.errors, f"the test Hub itself failed: {_HUB.errors}"
    _HUB.reset()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums are split between threads, and equal to the bit only where they are split alike."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def short_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` waits five seconds at the end of a stream that it has read by threads."""
    import datasets

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs Python code in a new process with an empty cache; what it prints is JSON and comes back as a value."""

    def run(code: str, **environment: str) -> Any:
        home = tmp_path_factory.mktemp("home")
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=home,
            env={**os.environ, "HF_HOME": str(home), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Makes `time.sleep` return at once; the seconds asked for are collected here."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked
