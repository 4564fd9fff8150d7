"""Prompts as the numbers that a denoiser is told, encoded as they are needed or once, before training.

Both ways are a function from texts to named tensors, one row per text. The names are those of the arguments by which
the family's pipeline takes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from datasets.utils import tqdm
from transformers import ProcessorMixin

from ...caches import build_folder, content_key


# From texts to tensors of as many rows, or to lists of rows that differ in length, by name.
TextEncoder = Callable[[list[str]], dict[str, torch.Tensor | list[torch.Tensor]]]

# Part of every cache's name: to be changed whenever what the files mean changes.
_FORMAT = 2
_INDEX = "index.json"

# What a text encoder's config says of the files that it was loaded from.
_NOT_THE_MODEL = {"architectures", "dtype", "torch_dtype", "transformers_version"}


class CachedTextEmbeddings:
    """Text embeddings of a folder that [`cache_text_embeddings`] made, read as they are needed."""

    def __init__(self, folder: Path, device: torch.device):
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        self.device = device
        self._rows = {text: row for row, text in enumerate(index["texts"])}
        self._embeddings = {name: _Rows(folder / name, **layout) for name, layout in index["embeddings"].items()}

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """The embeddings of texts, on the device; a `ValueError` for a text that was not encoded."""
        unknown = [text for text in texts if text not in self._rows]
        if unknown:
            raise ValueError(f"`texts` must be those that were encoded before training, got {unknown[0]!r}.")
        places = [self._rows[text] for text in texts]
        return {name: rows.read(places, self.device) for name, rows in self._embeddings.items()}


class _Rows:
    """The rows of one file, memory-mapped; `ragged` ones may differ in length and are not stacked."""

    def __init__(self, path: Path, dtype: str, shape: list[int], lengths: list[int], ragged: bool):
        self.starts = [0, *accumulate(lengths)]
        self.ragged = ragged
        shape = (self.starts[-1], *shape)
        values = torch.from_file(str(path), shared=False, size=prod(shape), dtype=getattr(torch, dtype))
        self.values = values.view(shape)

    def read(self, places: list[int], device: torch.device) -> torch.Tensor | list[torch.Tensor]:
        rows = [self.values[self.starts[place] : self.starts[place + 1]] for place in places]
        if self.ragged:
            return [row.to(device, non_blocking=True) for row in rows]
        return torch.stack(rows).to(device, non_blocking=True)


def cache_text_embeddings(
    encode: TextEncoder,
    texts: Collection[str],
    tokenizers: Sequence[Any],
    models: Sequence[torch.nn.Module],
    settings: dict[str, Any],
    cache_dir: str | os.PathLike,
    *,
    batch_size: int,
    device: torch.device,
) -> CachedTextEmbeddings:
    """Encodes every text once, or finds that this was done before, in this run or another.

    A cache belongs to its texts and to what encodes them (`settings` is all else that results depend on); anything
    else makes a new one. It is written under another name and renamed when it is complete. With several processes,
    let the main one go first. A cache takes the bytes of one embedding per text, in the text encoders' precision:
    2.7 MB in half precision for Stable Diffusion 3. The result is `encode`'s to within rounding: a text's numbers may
    depend on those encoded along with it.
    """
    texts = sorted(texts)
    tokenizers = [
        tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer for tokenizer in tokenizers
    ]
    description = {
        "format": _FORMAT,
        "texts": texts,
        # The files of a tokenizer also say where it was loaded from. This is what it does; `encode` truncates.
        "tokens": [tokenizer(texts, verbose=False)["input_ids"] for tokenizer in tokenizers],
        "padding": [
            [tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.model_max_length] for tokenizer in tokenizers
        ],
        "chats": [tokenizer.chat_template for tokenizer in tokenizers],
        "models": [type(model).__name__ for model in models],
        "configs": [_describe(model) for model in models],
        "settings": settings,
    }
    folder = Path(cache_dir) / f"text-embeddings-{content_key(description, models)}"
    build_folder(folder, lambda partial: _write(partial, encode, texts, batch_size))
    return CachedTextEmbeddings(folder, device)


def _write(folder: Path, encode: TextEncoder, texts: list[str], batch_size: int) -> None:
    layouts: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(texts), desc="Caching text embeddings") as progress_bar:
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            for name, rows in encode(some).items():
                layout = layouts.setdefault(name, _layout(rows))
                # Written, not mapped: on a full disk a write raises an error, where a memory map ends the process.
                with open(folder / name, "ab") as file:
                    for row in rows:
                        layout["lengths"].append(len(row))
                        file.write(row.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            progress_bar.update(len(some))
    index = {"texts": texts, "embeddings": layouts}
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")


def _layout(rows: torch.Tensor | list[torch.Tensor]) -> dict[str, Any]:
    row = rows[0]
    dtype = str(row.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(row.shape[1:]), "lengths": [], "ragged": isinstance(rows, list)}


def _describe(model: torch.nn.Module) -> dict[str, Any]:
    config = model.config.to_dict()
    return {name: config[name] for name in config if not name.startswith("_") and name not in _NOT_THE_MODEL}
