"""Configs and sizes of a model in a folder or on the Hub, without its weights: of them, only headers are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo, validate_repo_id
from safetensors import safe_open

from ..config_types import built_from_file, read_object
from ..hub import check_token


_WEIGHTS = "diffusion_pytorch_model.safetensors"


class Source:
    """A folder of that name, or else a repository, whose small files go to the client's cache."""

    def __init__(self, name: str, revision: str | None = None, token: str | None = None):
        self.name, self.revision, self.api = name, revision, HfApi(token=check_token(token))
        self.is_folder = Path(name).is_dir()
        if self.is_folder:
            if revision is not None:
                raise ValueError(f"`revision` must be left out for a folder, which {name!r} is.")
            return
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(
                f"There is no folder {name!r}, and no repository on the Hub can have that name. Name one that exists."
            ) from error

    def read_json(self, path: str, types: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The JSON object in a file, with values of these types, or None if there is no such file."""
        file = Path(self.name, path) if self.is_folder else self._fetch(path)
        return None if file is None or not file.is_file() else read_object(file, path, types)

    def _fetch(self, path: str) -> Path | None:
        try:
            return Path(self.api.hf_hub_download(self.name, path, revision=self.revision))
        except LocalEntryNotFoundError as error:
            # Not in the cache, and nobody to ask: that says nothing about the repository.
            raise LocalEntryNotFoundError(
                f"There is no folder {self.name!r}, and the Hub cannot be asked for a repository of that name: {error}"
            ) from error
        except EntryNotFoundError:
            return None

    def header(self, path: str) -> SafetensorsFileMetadata | None:
        """The header of a safetensors file, or None if there is no such file."""
        if not self.is_folder:
            try:
                with built_from_file(f"The header of `{path}`"):
                    return self.api.parse_safetensors_file_metadata(self.name, path, revision=self.revision)
            except EntryNotFoundError:
                return None
        if not Path(self.name, path).is_file():
            return None
        with safe_open(Path(self.name, path), "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
            infos = {key: TensorInfo(part.get_dtype(), part.get_shape(), (0, 0)) for key, part in slices.items()}
            return SafetensorsFileMetadata(file.metadata() or {}, infos)

    def parameter_counts(self, folder: str) -> Counter[str]:
        """How many parameters a saved model has of each dtype; `folder` ends in `/` or is empty."""
        name = f"{_WEIGHTS}.index.json"
        index = self.read_json(folder + name, {"weight_map": dict})
        if index is None:
            header = self.header(folder + _WEIGHTS)
            return Counter() if header is None else Counter(header.parameter_count)
        counts: Counter[str] = Counter()
        for file in sorted(set(map(str, index.get("weight_map", {}).values()))):
            header = None if "/" in file or "\\" in file else self.header(folder + file)
            if header is None:
                raise ValueError(f"`{name}` must name files beside it, got {file!r}.")
            counts.update(header.parameter_count)
        return counts
