"""What an engine does to a denoiser that is seen in one process."""

import json
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_models import SD3, UNET, UNET_CONDITION, of_families, output

from diffusers_dtr.training.engine import Engine, read_tensors


@of_families((UNET, UNET_CONDITION, SD3))
def test_a_shared_model_is_compiled_by_blocks_and_only_once(family, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    model, later = family.routed().eval(), family.inputs(torch.tensor([5, 6, 7, 999]))
    engine, expected = Engine(Accelerator(cpu=True), model), output(model, later)
    engine.sharded = True
    engine.compile()
    assert model._compiled_call_impl is None
    assert any(module._compiled_call_impl for module in model.modules())
    output(model, family.inputs())
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(output(model, later), expected)


def test_a_lost_shard_is_noticed(tmp_path):
    whole = torch.arange(8.0).reshape(4, 2)
    files = [tmp_path / f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]
    for start, file in zip((0, 2), files, strict=True):
        metadata = {CUSTOM_METADATA_KEY: json.dumps({"weight": {SAVED_OFFSETS_KEY: [start, 0]}}), "format": "pt"}
        save_file({"weight": whole[start : start + 2].contiguous()}, file, metadata)
    found = {"weight": torch.zeros(4, 2)}
    read_tensors(tmp_path, found)
    assert torch.equal(found["weight"], whole)
    messages = ("all shards of this model, but lacks one, with a part of weight", "the tensors .*: weight .* in part")
    for lost, message in zip(files, messages, strict=True):
        content = lost.read_bytes()
        lost.unlink()
        with pytest.raises(ValueError, match=f"must hold {message}"):
            read_tensors(tmp_path, found)
        lost.write_bytes(content)
