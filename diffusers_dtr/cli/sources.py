"""Configs and sizes of a model in a folder or on the Hub, without its weights: of them, only headers are read."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open


_WEIGHTS = "diffusion_pytorch_model.safetensors"


class Source(ABC):
    """Files by their path in a folder or repository."""

    @abstractmethod
    def local_file(self, path: str) -> Path | None:
        """A small file on this machine, or None if there is none of this path."""

    @abstractmethod
    def sizes(self, path: str) -> dict[str, int] | None:
        """How many numbers a safetensors file has of each dtype, such as `{"F32": 100}`, or None if there is none."""

    def read_json(self, path: str) -> dict[str, Any] | None:
        """The JSON object in a file, or None if there is none of this path.

        Raises:
            ValueError: If the file holds anything else.
        """
        file = self.local_file(path)
        if file is None:
            return None
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"`{path}` is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"`{path}` must hold a JSON object, got {type(value).__name__}.")
        return value

    def parameter_counts(self, folder: str) -> dict[str, int]:
        """How many parameters a saved model has of each dtype, in one file or several.

        Args:
            folder: The model's folder, ending in `/`, or "" for the whole source.

        Returns:
            As [`sizes`]; empty if there are no safetensors weights of the usual name.

        Raises:
            ValueError: If the index of the files names one elsewhere, or one that is not there.
        """
        index = self.read_json(f"{folder}{_WEIGHTS}.index.json")
        if index is None:
            return self.sizes(folder + _WEIGHTS) or {}
        counts: Counter[str] = Counter()
        for name in sorted(set(index["weight_map"].values())):
            sizes = None if "/" in name or "\\" in name else self.sizes(folder + name)
            if sizes is None:
                raise ValueError(f"`{_WEIGHTS}.index.json` must name files beside it, got {name!r}.")
            counts.update(sizes)
        return dict(counts)


@dataclass(frozen=True)
class Folder(Source):
    """A folder on this machine."""

    path: Path

    def local_file(self, path: str) -> Path | None:
        """See [`Source`]."""
        return self.path / path if (self.path / path).is_file() else None

    def sizes(self, path: str) -> dict[str, int] | None:
        """See [`Source`]."""
        if not (self.path / path).is_file():
            return None
        counts: Counter[str] = Counter()
        with safe_open(self.path / path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_slice(key)
                counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
        return dict(counts)


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
        except LocalEntryNotFoundError:
            # Not in the cache, and nobody to ask: that says nothing about the repository.
            raise
        except EntryNotFoundError:
            return None

    def sizes(self, path: str) -> dict[str, int] | None:
        """See [`Source`]."""
        api = HfApi(token=self.token)
        try:
            return api.parse_safetensors_file_metadata(self.repo_id, path, revision=self.revision).parameter_count
        except EntryNotFoundError:
            return None


def open_source(name: str, revision: str | None = None, token: str | None = None) -> Source:
    """A folder of that name, or else a repository.

    Args:
        name: Path of a folder, or name of a repository.
        revision: Branch, tag or commit of the repository.
        token: Access token, or None for the one that is logged in.

    Raises:
        ValueError: If `revision` is given for a folder.
    """
    if not Path(name).is_dir():
        return Repository(name, revision, token)
    if revision is not None:
        raise ValueError(f"`revision` is one of a repository, but {name!r} is a folder.")
    return Folder(Path(name))
