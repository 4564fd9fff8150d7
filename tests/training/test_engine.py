"""What an engine does to a denoiser that is seen in one process."""

import sys
from functools import partialmethod
from pathlib import Path

import torch
from accelerate import Accelerator


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_models import SD3, UNET, UNET_CONDITION, of_families, output

from diffusers_dtr.training.engine import Engine


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
