"""Configs and sizes of a model in a folder or on the Hub, without its weights: of them, only headers are read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from ..config_types import built_from_file, read_object
from ..hub.pushing import check_token


_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Header:
    """The dtypes and shapes of the tensors in a safetensors file, by name."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[str]:
        """How many numbers there are of each dtype."""
        counts: Counter[str] = Counter()
        for dtype, shape in self.tensors.values():
            counts[dtype] += math.prod(shape)
        return counts


class Source(ABC):
    """Files by their path in a folder or repository."""

    @abstractmethod
    def local_file(self, path: str) -> Path | None:
        """A small file on this machine, or None if there is none of this path."""

    @abstractmethod
    def header(self, path: str) -> Header | None:
        """The header of a safetensors file, or None if there is none of this path."""

    def read_json(self, path: str, types: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The JSON object in a file, with values of these types, or None if there is no such file."""
        file = self.local_file(path)
        return None if file is None else read_object(file, path, types)

    def parameter_counts(self, folder: str) -> dict[str, int]:
        """How many parameters a saved model has of each dtype; `folder` ends in `/` or is empty."""
        name = f"{_WEIGHTS}.index.json"
        index = self.read_json(folder + name, {"weight_map": dict})
        if index is None:
            header = self.header(folder + _WEIGHTS)
            return {} if header is None else dict(header.counts)
        files = set(map(str, index.get("weight_map", {}).values()))
        counts: Counter[str] = Counter()
        for file in sorted(files):
            header = None if "/" in file or "\\" in file else self.header(folder + file)
            if header is None:
                raise ValueError(f"`{name}` must name files beside it, got {file!r}.")
            counts.update(header.counts)
        return dict(counts)


@dataclass(frozen=True)
class Folder(Source):
    """A folder on this machine."""

    path: Path

    def local_file(self, path: str) -> Path | None:
        """See [`Source`]."""
        return self.path / path if (self.path / path).is_file() else None

    def header(self, path: str) -> Header | None:
        """See [`Source`]."""
        if not (self.path / path).is_file():
            return None
        with safe_open(self.path / path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
            tensors = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
            return Header(tensors, file.metadata() or {})


@dataclass(frozen=True)
class Repository(Source):
    """A model repository on the Hub. Small files go to the cache; of weights, the first bytes are asked for."""

    repo_id: str
    revision: str | None
    token: str | None

    def local_file(self, path: str) -> Path | None:
        """See [`Source`]."""
        try:
            return Path(hf_hub_download(self.repo_id, path, revision=self.revision, token=self.token))
        except LocalEntryNotFoundError as error:
            # Not in the cache, and nobody to ask: that says nothing about the repository.
            raise LocalEntryNotFoundError(
                f"There is no folder {self.repo_id!r}, and the Hub cannot be asked for a repository of that name: "
                f"{error}"
            ) from error
        except EntryNotFoundError:
            return None

    def header(self, path: str) -> Header | None:
        """See [`Source`]."""
        api = HfApi(token=self.token)
        try:
            with built_from_file(f"The header of `{path}`"):
                file = api.parse_safetensors_file_metadata(self.repo_id, path, revision=self.revision)
        except EntryNotFoundError:
            return None
        tensors = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in file.tensors.items()}
        return Header(tensors, file.metadata)


def open_source(name: str, revision: str | None = None, token: str | None = None) -> Source:
    """A folder of that name, or else a repository on the Hub."""
    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(
                f"There is no folder {name!r}, and no repository on the Hub can have that name. Name one that exists."
            ) from error
        return Repository(name, revision, check_token(token))
    if revision is not None:
        raise ValueError(f"`revision` is one of a repository, but {name!r} is a folder.")
    return Folder(Path(name))
