"""How a run's processes hold the denoiser and its optimizer: alone, or by DDP, FSDP2 or DeepSpeed through accelerate.

The one place that knows it. Beside a forward call, whatever is said to be collective needs all processes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType, compile_regions_deepspeed
from diffusers import ModelMixin
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from . import zero
from .optimizer import load_named_state, named_state


class Engine:
    """A denoiser as the processes of a run hold it.

    Args:
        accelerator: Of the run.
        model: The denoiser, before anything is sharded.

    Attributes:
        sharded: Whether every process holds a part of the weights only, so that a forward call is collective.
    """

    def __init__(self, accelerator: Accelerator, model: ModelMixin):
        self.accelerator, self.model = accelerator, model
        self._deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.sharded = accelerator.is_fsdp2 or (self._deepspeed and accelerator.deepspeed_plugin.zero_stage == 3)
        self._lowered = self._deepspeed and accelerator.mixed_precision != "no"
        # What whole weights are put into, in order to be saved
        self._blank = _without_weights(model) if self.sharded or self._deepspeed else None

    @property
    def saves_parts(self) -> bool:
        """Whether every process can save what it holds by itself."""
        return self.accelerator.is_fsdp2

    def autocast(self) -> AbstractContextManager:
        """For forward calls of a model that was cast to a lower precision, whose inputs were not."""
        return torch.autocast(self.accelerator.device.type, self.model.dtype) if self._lowered else nullcontext()

    def compile(self) -> None:
        """Compile the denoiser whole; or block by block, where weights or DeepSpeed's hooks come between."""
        if self.sharded or self._deepspeed:
            compile_regions_deepspeed(self.model)  # in place, and not of DeepSpeed alone
        else:
            self.model.compile(fullgraph=True)

    def prepare(self, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Shard the denoiser in place, and wrap it and its optimizer for training."""
        # As DeepSpeed would make masters of what it has cast to a lower precision
        masters = {name: each.detach() for name, each in self._trained().items()} if self._lowered else {}
        self._wrapper, self._optimizer = self.accelerator.prepare(self.model, optimizer)
        for name, parameter in self._trained().items() if self._lowered else ():
            zero.set_master(parameter, masters[name].float())
        return self._wrapper, self._optimizer

    def weights(self) -> list[Tensor]:
        """What this process holds of the trained parameters, in the precision of their training, but for ZeRO-2's."""
        return [_part(parameter) for parameter in self._trained().values()]

    @contextmanager
    def computing_with(self, weights: list[Tensor] | None) -> Iterator[None]:
        """Let the model compute with other weights for a while, or with its own; collective."""
        if weights is None:
            yield
            return
        own = [weight.clone() for weight in self.weights()]
        self.put(weights)
        try:
            yield
        finally:
            self.put(own)

    @contextmanager
    def whole_model(self, weights: list[Tensor] | None = None) -> Iterator[ModelMixin | None]:
        """An ordinary model for the main process, with all its weights, or these; None for others; collective."""
        main = self.accelerator.is_main_process
        if self._blank is None:
            with self.computing_with(weights):
                yield self.model if main else None
            return
        state = {}
        for name, tensor in self._state(weights):
            tensor = _whole(tensor)
            if main:
                state[name] = tensor.cpu()
        if main:
            self._blank.load_state_dict(state, assign=True)
        try:
            yield self._blank if main else None
        finally:
            self._blank = _without_weights(self._blank)

    def save_parts(self, folder: Path, weights: list[Tensor] | None = None) -> None:
        """Save all weights, or these, as sharded safetensors files, each process what it holds; collective."""
        self._write(folder, dict(self._state(weights)))
        if self.accelerator.is_main_process:
            self._blank.save_config(folder)

    def save_trained(self, folder: Path, weights: list[Tensor]) -> None:
        """Save tensors like [`weights`] by the names of their parameters; collective."""
        self._write(folder, self._named(weights))

    def read(self, folder: Path, weights: list[Tensor]) -> None:
        """Fill tensors like [`weights`] from the safetensors files of a folder, sharded or not; collective."""
        tensors = self._named(weights)
        read_tensors(folder, tensors, some=True)
        for (name, parameter), weight in zip(self._trained().items(), weights, strict=True):
            if zero.is_partitioned(parameter):
                zero.scatter(tensors[name], weight)

    def save_optimizer(self, folder: Path) -> None:
        """Save what the optimizer has learned of every parameter, by `state.<parameter>.<what>`; collective."""
        self._write(folder, self._optimizer_state())

    def load_optimizer(self, folder: Path) -> None:
        """Go on with what [`save_optimizer`] saved, under this engine or another; collective."""
        if self._deepspeed:
            zero.load_optimizer_state(self._optimizer.optimizer, self._trained(), partial(read_state, folder))
        else:
            load_named_state(self._wrapper, self._optimizer.optimizer, partial(read_state, folder))

    @torch.no_grad()
    def put(self, weights: list[Tensor]) -> None:
        """Let the model compute with other weights, as [`weights`] returns them, from now on; collective."""
        for parameter, weight in zip(self._trained().values(), weights, strict=True):
            if zero.is_partitioned(parameter):
                zero.put(parameter, zero.gather(parameter, weight.to(parameter.device)))
            else:
                _part(parameter).copy_(weight)

    def _trained(self) -> dict[str, nn.Parameter]:
        if self.accelerator.is_fsdp2:
            # After a forward call without a backward one, its root would still have all processes' parts.
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _named(self, weights: list[Tensor]) -> dict[str, Tensor]:
        trained = self._trained()
        return dict(zip(trained, map(_spread, trained.values(), weights), strict=True))

    def _state(self, weights: list[Tensor] | None) -> Iterator[tuple[str, Tensor]]:
        trained = self._trained()
        given = {} if weights is None else dict(zip(trained, weights, strict=True))
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name in given:
                yield name, _spread(tensor, given[name])  # one by one: whole, they may not fit
            elif self._deepspeed and name in trained:
                yield name, zero.master(tensor)
            else:
                yield name, tensor

    def _optimizer_state(self) -> dict[str, Tensor]:
        if self._deepspeed:
            return zero.optimizer_state(self._optimizer.optimizer, self._trained())
        return named_state(self._wrapper, self._optimizer.optimizer)

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        if self.accelerator.is_main_process:
            folder.mkdir()
        self.accelerator.wait_for_everyone()
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        with _one_process_is_fine():
            dcp.save(tensors, storage_writer=writer)


def read_state(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill an optimizer's state as [`read_tensors`] does; of parameters that never had a gradient there is none."""
    saved = {_parameter(name) for name in _saved(folder)}
    read_tensors(folder, {name: tensor for name, tensor in tensors.items() if _parameter(name) in saved})
    for name, tensor in tensors.items():
        if _parameter(name) not in saved and name.endswith(".step"):
            tensor.zero_()


def _parameter(name: str) -> str:
    return name.rpartition(".")[0]


def read_tensors(folder: Path, tensors: dict[str, Tensor], some: bool = False) -> None:
    """Fill tensors, or what this process holds of them, by their names from a folder's safetensors files.

    They are all that the folder has, or `some` of it.

    Raises:
        ValueError: If the folder has none, damaged ones, or not these tensors.
    """
    saved = _saved(folder)
    others = tensors.keys() - saved if some else tensors.keys() ^ saved.keys()
    # Without the last of its shards, a tensor looks like a smaller one.
    others |= {name for name in tensors.keys() & saved if saved[name] != tensors[name].size()}
    if others:
        listed = ", ".join(sorted(others)[:3])
        raise ValueError(
            f"{folder} must hold the tensors of this model, and all their shards: {listed} ... are others, or in part."
        )
    with _whole_files(folder), _one_process_is_fine():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


def _saved(folder: Path) -> dict[str, torch.Size]:
    """The tensors in a folder."""
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} must hold *.safetensors, but has none.")
    with _whole_files(folder):
        saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, tensor in saved.items():
        # torch takes what no file has for there, and leaves the tensor as it was.
        if sum(chunk.sizes.numel() for chunk in tensor.chunks) < tensor.size.numel():
            raise ValueError(f"{folder} must hold all shards of this model, but lacks one, with a part of {name}.")
    return {name: tensor.size for name, tensor in saved.items()}


@contextmanager
def _whole_files(folder: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, SafetensorError) as error:
        # Of several processes' errors, each with its traceback, one is enough.
        cause = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        raise ValueError(f"{folder} must hold whole safetensors files of this model: {cause[0]}") from error


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _without_weights(model: ModelMixin) -> ModelMixin:
    """A copy whose parameters take no memory."""
    empty = {id(each): nn.Parameter(each.detach().to("meta"), each.requires_grad) for each in model.parameters()}
    return copy.deepcopy(model, empty)


def _part(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter."""
    if isinstance(parameter, DTensor):
        return parameter.detach().to_local()
    return zero.local_part(parameter) if zero.is_partitioned(parameter) else parameter.detach()


def _spread(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """A tensor of which every process holds a part, as it does of a parameter: a DTensor, or gathered."""
    if isinstance(parameter, DTensor):
        layout = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(part, parameter.device_mesh, parameter.placements, run_check=False, **layout)
    return zero.gather(parameter, part) if zero.is_partitioned(parameter) else part


def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor()
    return zero.whole(tensor) if zero.is_partitioned(tensor) else tensor.detach()
