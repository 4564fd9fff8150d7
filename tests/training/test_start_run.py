"""What flags and accelerate's configuration can both decide has one value."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from run_config import run_config

from diffusers_dtr.training.computation import check_processes
from diffusers_dtr.training.run.start import agree_with_accelerate


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset()
    yield
    reset()


def reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def settle(
    given: int | None = None, *, deepspeed: dict | None = None, fsdp: SimpleNamespace | None = None, **flags: object
) -> int:
    """The steps of accumulation in the end; with a DeepSpeed configuration, without DeepSpeed itself."""
    options = {"gradient_accumulation_steps": given, "train_batch_size": 4, "max_grad_norm": 0.5}
    config = run_config(**options, **flags)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=given or 1, mixed_precision=config.run.mixed_precision
    )
    plugin = None if deepspeed is None else SimpleNamespace(deepspeed_config=deepspeed)
    with patch.multiple(AcceleratorState, create=True, deepspeed_plugin=plugin, fsdp_plugin=fsdp):
        agree_with_accelerate(config, accelerator)
    return accelerator.gradient_accumulation_steps


@pytest.mark.parametrize(("given", "environment", "settled"), [(None, None, 1), (3, None, 3), (None, 2, 2), (2, 2, 2)])
def test_accumulation_comes_from_the_flag_or_the_environment(given, environment, settled, monkeypatch):
    if environment is not None:
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(environment))
    assert settle(given) == settled


@pytest.mark.parametrize(
    ("variable", "flags", "message"),
    [
        ("GRADIENT_ACCUMULATION_STEPS 2", {"given": 3}, r"`--gradient_accumulation_steps` is 3, but .* sets 2\."),
        ("MIXED_PRECISION bf16", {"mixed_precision": "no"}, r"`--mixed_precision` is no, but .* sets bf16\."),
        ("MIXED_PRECISION fp16", {"mixed_precision": "bf16"}, r"`--mixed_precision` is bf16, but .* sets fp16\."),
        ("DYNAMO_BACKEND eager", {"compile": True}, "`--compile` and the dynamo backend of accelerate's"),
    ],
)
def test_a_flag_and_an_environment_that_disagree_are_both_named(variable, flags, message, monkeypatch):
    monkeypatch.setenv(*f"ACCELERATE_{variable}".split())
    with pytest.raises(ValueError, match=message):
        settle(**flags)


def test_deepspeed_gets_what_its_file_leaves_open():
    config = {"gradient_clipping": "auto"}
    assert settle(2, deepspeed=config) == 2
    assert config == {"gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 4}


def test_accumulation_may_come_from_a_deepspeed_file():
    assert settle(deepspeed={"gradient_accumulation_steps": 3}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train_micro_batch_size_per_gpu", r"`--train_batch_size` is 4, but .* sets 8, as DeepSpeed's `train_micro"),
        ("gradient_clipping", r"`--max_grad_norm` is 0\.5, but .* sets 8, as DeepSpeed's `gradient_clipping`"),
        ("gradient_accumulation_steps", r"`--gradient_accumulation_steps` is 2, but .* sets 8\."),
    ],
)
def test_a_flag_and_a_deepspeed_file_that_disagree_are_both_named(name, message):
    with pytest.raises(ValueError, match=message):
        settle(2, deepspeed={name: 8})


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    Accelerator(cpu=True)
    check_processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes()  # set by something else than a launcher
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"2 processes were launched, but accelerate knows of 1\. Without a GPU set"):
        check_processes()


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_an_engine_that_accelerate_does_not_give_is_refused(engine, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    given = {"device": torch.device("cpu"), "distributed_type": DistributedType.MULTI_CPU}
    state = SimpleNamespace(fsdp_plugin=None)
    with pytest.raises(ValueError, match=f"asks for {engine}, of which accelerate has none on cpu: take .*ddp.yaml"):
        agree_with_accelerate(run_config(), SimpleNamespace(**given, num_processes=2, state=state))


def test_half_precision_that_needs_a_gpu_is_refused_on_a_cpu():
    options = {
        "mixed_precision": "fp16",
        "device": torch.device("cpu"),
        "distributed_type": DistributedType.NO,
        "num_processes": 1,
    }
    accelerator = SimpleNamespace(**options, state=SimpleNamespace(fsdp_plugin=None))
    with pytest.raises(ValueError, match="`--mixed_precision fp16` needs a GPU"):
        agree_with_accelerate(run_config(), accelerator)


@pytest.mark.parametrize(("flag", "environment"), [(None, "bf16"), ("bf16", "bf16"), ("bf16", "no"), ("no", "no")])
def test_a_precision_comes_from_the_flag_or_the_environment(flag, environment, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)  # the launcher's default is "no"
    settle(mixed_precision=flag)


def test_activations_are_computed_twice_by_one_of_the_two():
    fsdp = SimpleNamespace(activation_checkpointing=True)
    with pytest.raises(ValueError, match="`--gradient_checkpointing` and `fsdp_activation_checkpointing`"):
        settle(fsdp=fsdp, gradient_checkpointing=True)
    settle(fsdp=fsdp)
