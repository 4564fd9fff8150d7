"""Runs a script with accelerate's FSDP or DeepSpeed on CPU processes (gloo), which accelerate itself refuses."""

import os
import runpy
import sys
from pathlib import Path

import accelerate.utils.dataclasses
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


if __name__ == "__main__":
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    accelerate.utils.dataclasses.is_cuda_available = lambda *args, **kwargs: False
    torch.cpu.current_device = lambda: torch.device("cpu")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == "cpu"
    runpy.run_path(sys.argv[0], run_name="__main__")
