"""A compiled run is compiled once: nothing of a graph is broken off, and no step makes another."""

from functools import partialmethod

import pytest
import torch
from torch._dynamo.utils import counters
from training_runs import make_images, train


@pytest.mark.slow
def test_two_hundred_compiled_steps_are_one_graph(tmp_path, monkeypatch):
    # The graph is what is tested here, not what a backend makes of it.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    flags = ["--compile", "--max_train_steps", 200, "--routing_warmup_steps", 100, "--validation_steps", 50]
    train(make_images(tmp_path / "images"), tmp_path / "run", *flags)
    # Of steps; of samples, without gradients; and of the result's samples, whose share of channels is the config's.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
