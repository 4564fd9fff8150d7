"""A pair of processes for tests, whose functions run in a group of both."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class ProcessPair:
    """Two processes that stay alive between calls, because starting them is what takes the time."""

    def __init__(self):
        self._executor = ProcessPoolExecutor(2, mp_context=get_context("spawn"))

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns in each of the two processes of a group."""
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            futures = [self._executor.submit(_in_group, store, rank, function, *args) for rank in range(2)]
            return [future.result(timeout=120) for future in futures]

    def close(self) -> None:
        self._executor.shutdown()


def _in_group(store: str, rank: int, function: Callable[..., Any], *args: Any) -> Any:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
