"""Objects for checkpoints: what the authors' files hold beside weights, and what nobody should run.

OmegaConf is not needed: its classes are made here, pickled under their own names, and gone again.
"""

from __future__ import annotations

import os
import sys
import types
import typing
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch


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


class Executes:
    """Unpickled, this runs a shell command that leaves a file behind."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch '{self.proof}'",)


class Evaluates(Executes):
    """The same with a builtin function."""

    def __reduce__(self):
        return eval, (f"open({str(self.proof)!r}, 'w')",)


class Imports(Executes):
    """The same by way of an attribute that is looked up in a harmless module."""

    def __reduce__(self):
        return getattr(torch.serialization, "os").system, (f"touch '{self.proof}'",)  # noqa: B009 - says what it is
