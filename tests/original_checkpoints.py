"""Checkpoints of the authors' code: weights with inputs and outputs, and the objects that files hold beside them.

OmegaConf is not needed: its classes are made here, pickled under their own names, and gone again.
"""

from __future__ import annotations

import sys
import types
import typing
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from tiny_dit import output

from diffusers_dtr.conversion import convert_original_dit
from diffusers_dtr.conversion.masks import MASK_BUFFER, mask_table


# float32 against float32, computed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Reference:
    """A checkpoint under the authors' names, with inputs and the outputs of the authors' implementation."""

    def __init__(self, name="dtr_dit_tiny"):
        with safe_open(Path(__file__).parent / "fixtures" / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
            self.metadata = {key: int(value) if value.isdecimal() else value for key, value in file.metadata().items()}
        weights = [key for key in self.tensors if key.startswith("checkpoint.")]
        self.state_dict = {key.removeprefix("checkpoint."): self.tensors.pop(key) for key in weights}
        self.heads, self.routing_beta = self.metadata["num_heads"], float(self.metadata["beta"])

    def convert(self, **config):
        return convert_original_dit(self.state_dict, self.heads, **{"routing_beta": self.routing_beta, **config})

    def with_masks(self, num_channels=None, blocks=None):
        """The state dict with what DTR's code saves beside the weights."""
        table = mask_table(1000, num_channels or self.metadata["hidden_size"], 4.0, self.routing_beta)
        blocks = range(self.metadata["depth"]) if blocks is None else blocks
        return self.state_dict | {f"blocks.{block}.{MASK_BUFFER}": table for block in blocks}

    def outputs(self, model):
        names = {"hidden_states": "sample", "timestep": "timestep", "class_labels": "class_labels"}
        return output(model, **{argument: self.tensors[name] for argument, name in names.items()})


@contextmanager
def fake_omegaconf():
    """Modules `omegaconf.*` with classes that are pickled as OmegaConf's are: by name, and with all of their state."""
    names = {
        "omegaconf": (),
        "omegaconf.base": ("ContainerMetadata", "Metadata"),
        "omegaconf.dictconfig": ("DictConfig",),
        "omegaconf.listconfig": ("ListConfig",),
        "omegaconf.nodes": ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "PathNode"),
    }
    modules = {}
    for module, classes in names.items():
        modules[module] = types.ModuleType(module)
        for name in classes:
            setattr(modules[module], name, type(name, (), {"__module__": module}))
    sys.modules.update(modules)
    try:
        yield modules
    finally:
        for module in modules:
            del sys.modules[module]


def _made(cls, **state):
    made = cls()
    vars(made).update(state)
    return made


def omegaconf_of(modules, value, parent=None, key=None):
    """A value as OmegaConf keeps it: nodes in containers that know their parents and types."""
    metadata = {"optional": True, "key": key, "flags": {}, "flags_root": False, "resolver_cache": defaultdict(dict)}
    if isinstance(value, (dict, list)):
        is_dict = isinstance(value, dict)
        module, name = ("dictconfig", "DictConfig") if is_dict else ("listconfig", "ListConfig")
        metadata |= {"ref_type": typing.Any, "object_type": type(value), "key_type": typing.Any}
        metadata["resolver_cache"]["oc.env"]["HOME"] = "/home/somebody"
        container = _made(getattr(modules[f"omegaconf.{module}"], name), _parent=parent)
        container._metadata = _made(modules["omegaconf.base"].ContainerMetadata, element_type=typing.Any, **metadata)
        items = value.items() if is_dict else enumerate(value)
        nodes = {inner: omegaconf_of(modules, item, container, inner) for inner, item in items}
        container._content = nodes if is_dict else list(nodes.values())
        return container
    kinds = {bool: "BooleanNode", int: "IntegerNode", float: "FloatNode", str: "AnyNode"}
    node = _made(getattr(modules["omegaconf.nodes"], kinds.get(type(value), "PathNode")), _parent=parent, _val=value)
    node._metadata = _made(modules["omegaconf.base"].Metadata, ref_type=type(value), object_type=None, **metadata)
    return node


def same(state_dict, expected):
    """Whether two state dicts have the same tensors, to the bit and of the same dtypes."""
    assert state_dict.keys() == expected.keys()
    return all(value.dtype == expected[key].dtype and value.equal(expected[key]) for key, value in state_dict.items())
