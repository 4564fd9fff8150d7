"""File names of a run, and the scrubbing of its record: no token and no local path is published."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


__all__ = ["RECORD_FILE", "public_command", "publishable"]

# Names of files that others look for: they stay. Of a pipeline and of adapters, as diffusers calls them.
PIPELINE_INDEX = "model_index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"

RECORD_FILE = "training_config.json"
RUN_CONFIG = "run_config.json"  # the options of a run, from which it can be started again
HISTORY_FILE = "loss_history.jsonl"
LOSSES_PICTURE = "loss_per_cluster.png"
METRICS_FILE = "metrics.json"  # what evaluations write, with `save_metrics`
CHECKPOINT_PREFIX = "checkpoint-"
RUN_LOCK = ".run.lock"  # held by the process that trains, which it names in a file beside it

# Folders of what is computed once, and of what is not complete or not yet pushed.
LATENTS = "latents"
TEXT_EMBEDDINGS = "text_embeddings"
PARTIAL_PIPELINE = ".pipeline.partial"
PREVIOUS_PIPELINE = ".pipeline.previous"
PUSH_SNAPSHOTS = ".push"

# What a run leaves that is of no use to others, or not complete. A `*` matches `/` too.
_PRIVATE_FOLDERS = (PARTIAL_PIPELINE, PREVIOUS_PIPELINE, PUSH_SNAPSHOTS)
_PRIVATE_FOLDERS += tuple(f"{name}*" for name in (CHECKPOINT_PREFIX, LATENTS, TEXT_EMBEDDINGS))
PRIVATE_FILES = (*(f"{folder}/*" for folder in _PRIVATE_FOLDERS), f"{RUN_LOCK}*", RUN_CONFIG, "*.partial")

LOCAL_PREFIX = "path/to/"

_SECRET_NAME = re.compile(r"(token|password|secret|api_key)$")
# What huggingface.co's tokens look like, wherever they were typed, and the user part of an address.
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/\s]+@")

# Arguments whose values may be a file or folder without a `/`.
_PATH_NAME = re.compile(r"(_dir|_path|_file|_checkpoint|_config|_name)$")
# `events.out.tfevents.<time>.<host>.<process>.<number>`; a host may have dots, an address of numbers too.
_EVENT_FILE = re.compile(r"(events\.out\.tfevents\.\d+)\.[^/]+(\.\d+\.\d+)$")
_ABSOLUTE = re.compile(r"(/|~|\.\.?(/|\\|$)|[A-Za-z]:[\\/]|\\\\|file://)")


def publishable(value: Any, name: str = "") -> Any:
    """A JSON value as it may be published: without secrets, and with `path/to/...` for what lies on this machine.

    In dictionaries and lists, every value is looked at; `name` is that of the argument or key whose value it is. A
    string is a path of this machine if it is absolute or begins with `~` or `.`. One that is relative is, if it
    exists, and has a `/` or a `name` that says that paths may come. What remains of it is its last component. An id on
    the Hub stays as it is. Applied again, nothing changes.
    """
    if isinstance(value, dict):
        return {key: publishable(item, str(key)) for key, item in value.items() if not _SECRET_NAME.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [publishable(item, name) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    if value.startswith("{"):
        return _publishable_json(value)
    return _SECRET_VALUE.sub("", _without_folders(value) if _is_local(value, name) else value)


def public_command(argv: Sequence[str], launcher: Sequence[str] = ("accelerate", "launch")) -> str:
    """A command line as [`publishable`] leaves it, quoted for a shell, to be typed again with paths for placeholders.

    Args:
        argv: Script and arguments, as in `sys.argv`. A script that was called by a relative path keeps it.
        launcher: What the script is started with.
    """
    script, *arguments = argv
    elsewhere = _ABSOLUTE.match(script) or ".." in Path(script).parts
    words = [*launcher, Path(script).name if elsewhere else script]
    name = ""
    for argument in arguments:
        prefix, value = "", argument
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            name, prefix = flag.removeprefix("--").replace("-", "_"), flag + equals
        if not _SECRET_NAME.search(name):
            words.append(prefix + (publishable(value, name) if value else ""))
    return shlex.join(words)


def published_path(path: str) -> str:
    """The path of a file in a repository: TensorBoard's names lose the name of the machine."""
    return _EVENT_FILE.sub(r"\1\2", path)


def _publishable_json(text: str) -> str:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return _SECRET_VALUE.sub("", text)
    published = publishable(value)
    return text if published == value else json.dumps(published, ensure_ascii=False)


def _is_local(value: str, name: str = "") -> bool:
    if value.startswith(LOCAL_PREFIX):
        return False
    if _ABSOLUTE.match(value):
        return True
    may_be_path = _PATH_NAME.search(name) or ("/" in value and not name.endswith("_id"))
    return bool(may_be_path and os.path.exists(value))


def _without_folders(path: str) -> str:
    last = (PureWindowsPath if "\\" in path else PurePosixPath)(path.removeprefix("file://")).name
    # A home folder is called like its user.
    return LOCAL_PREFIX + ("folder" if last in ("", "~", "..", Path.home().name) else last)
