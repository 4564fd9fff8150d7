"""The same step in two processes that wait for each other, to be timed from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from measuring import synchronise


@contextmanager
def two_processes(make_step: Callable[..., Callable[[], None]], *args: Any) -> Iterator[Callable[[], None]]:
    """A function that lets both take the step that `make_step(device, *args)` returns there."""
    spawn = get_context("spawn")
    with TemporaryDirectory() as folder:
        pipes = [spawn.Pipe() for _ in range(2)]
        threads = max(1, torch.get_num_threads() // 2)
        ranks = [
            spawn.Process(
                target=_serve, args=(there, rank, Path(folder) / "store", threads, make_step, args), daemon=True
            )
            for rank, (_, there) in enumerate(pipes)
        ]
        for rank, (_, there) in zip(ranks, pipes, strict=True):
            rank.start()
            there.close()  # so that a process that fails ends our waiting for it

        def step() -> None:
            for here, _ in pipes:
                here.send(True)
            for here, _ in pipes:
                here.recv()

        yield step
        for here, _ in pipes:
            here.send(False)
        for rank in ranks:
            rank.join()


def _serve(connection: Connection, rank: int, store: Path, threads: int, make_step: Callable, args: tuple) -> None:
    torch.set_num_threads(threads)
    gpus = torch.cuda.device_count()
    device = f"cuda:{rank % gpus}" if gpus else "cpu"
    # NCCL refuses two processes on one GPU.
    dist.init_process_group("nccl" if gpus > 1 else "gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    step = make_step(device, *args)
    while connection.recv():
        step()
        synchronise(device)
        connection.send(None)
    dist.destroy_process_group()
