"""Kernels of attention, layouts of memory and quantised weights."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from run_config import run_config
from tiny_dit import routed_dit


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_models import SD3, UNET_CONDITION, output
from tiny_pipelines import PIPELINES

from diffusers_dtr.training.computation import check_attention_backend, quantization, set_up_computation
from diffusers_dtr.training.config import LoraConfig, RoutingConfig, RunConfig, data
from diffusers_dtr.training.lora import add_lora, load_adapter, save_adapter
from diffusers_dtr.training.run.start import _check_engine


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_kernels_that_train_here_are_taken(name):
    check_attention_backend(name, CPU, torch.float32)


@pytest.mark.parametrize("name", ["flash", "flex", "sage", "xformers", "flash_hub", "_native_cudnn", "_native_npu"])
def test_kernels_that_do_not_train_here_are_refused(name):
    with pytest.raises(ValueError, match=f"`--attention_backend` must be one that trains in .* on cpu, got {name}: "):
        check_attention_backend(name, CPU, torch.float32)


def test_a_kernel_without_a_gradient_is_refused(monkeypatch):
    monkeypatch.setitem(_AttentionBackendRegistry._backends, "native", lambda query, **_: query.detach())
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, "native", {"query"})
    with pytest.raises(ValueError, match="got native: element 0 of tensors does not require grad"):
        check_attention_backend("native", CPU, torch.float32)


def test_a_kernel_is_the_denoisers_and_no_other_models():
    before = _AttentionBackendRegistry.get_active_backend()
    model = PIPELINES["flux"].pipeline().transformer
    set_up_computation(model, RunConfig("run", attention_backend="_native_math"))
    backends = {module.processor._attention_backend for module in model.modules() if hasattr(module, "processor")}
    assert backends == {"_native_math"}
    assert _AttentionBackendRegistry.get_active_backend() == before


def test_denoisers_whose_attention_is_no_choice_are_refused():
    with pytest.raises(ValueError, match=r"`--attention_backend` must be left out: .* DTRTransformer2DModel"):
        set_up_computation(routed_dit(), RunConfig("run", attention_backend="_native_math"))


def test_channels_last_is_another_layout_of_the_same_model():
    model, inputs = UNET_CONDITION.routed(), UNET_CONDITION.inputs()
    before = output(model, inputs)
    set_up_computation(model, RunConfig("run", channels_last=True))
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 4 and parameter.shape[2] > 1]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    torch.testing.assert_close(output(model, inputs), before)


def test_channels_last_is_refused_without_convolutions():
    model = PIPELINES["flux"].pipeline().transformer
    with pytest.raises(ValueError, match="`--channels_last` is for 2-D convolutions, which a Flux"):
        set_up_computation(model, RunConfig("run", channels_last=True))


@pytest.mark.parametrize(
    ("options", "device", "engine", "message"),
    [
        ({"channels_last": True}, "cuda", "FSDP", "`--channels_last` does not go with FSDP and DeepSpeed"),
        ({"rank": 2, "quantize": "bnb_4bit"}, "cuda", "DEEPSPEED", "`--quantize` does not go with FSDP and DeepSpeed"),
        ({"rank": 2, "quantize": "torchao_int8"}, "cuda", "MULTI_GPU", "`--quantize torchao_int8` is for one process"),
        ({"rank": 2, "quantize": "bnb_8bit"}, "cpu", "NO", "`--quantize bnb_8bit` needs a GPU, got a CPU"),
        (
            {"rank": 2, "quantize": "torchao_int8"},
            "cpu",
            "NO",
            "`--quantize torchao_int8` is for `--mixed_precision no",
        ),
    ],
)
def test_engines_and_devices_that_cannot_are_refused(options, device, engine, message, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda _: True)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType(engine),
        num_processes=2,
        mixed_precision="bf16",
        device=torch.device(device),
        is_fsdp2=True,
        gradient_state=SimpleNamespace(plugin_kwargs={}),
    )
    with pytest.raises(ValueError, match=message):
        _check_engine(run_config(**options), accelerator)


@pytest.mark.parametrize(("name", "package"), [("bnb_4bit", "bitsandbytes"), ("torchao_int8", "torchao")])
def test_quantisation_whose_package_is_missing_is_refused(name, package, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda asked: asked != package or None)
    with pytest.raises(ValueError, match=rf"`--quantize {name}` needs {package}: pip install .*\[quantization\]"):
        LoraConfig(rank=2, quantize=name)


def test_adapters_of_a_quantised_denoiser_are_trained_and_saved(tmp_path):
    pytest.importorskip("torchao")
    SD3.plain().save_pretrained(tmp_path)
    whole = SD3.routed_class.from_pretrained(tmp_path)
    model = SD3.routed_class.from_pretrained(
        tmp_path, dtype=torch.float32, **quantization("torchao_int8", torch.float32)
    )
    add_lora(model, LoraConfig(rank=2), RoutingConfig(), ("to_q", "to_v"))
    expected, found = (output(each, SD3.inputs()) for each in (whole, model))
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    model(**SD3.inputs(), return_dict=False)[0].square().mean().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
    assert torch.equal(output(model, SD3.inputs()), found)
