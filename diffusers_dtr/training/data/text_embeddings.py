"""What frozen text encoders make of captions, once: before a run, or ahead of all runs in shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets.utils import tqdm
from transformers import ProcessorMixin

from ...caches import content_key
from ...run_record import TEXT_EMBEDDINGS
from .captions import Captions
from .encoder_cache import FORMAT, CachedRows, Rows
from .latent_shards import Shards


# The names are those of the arguments by which the family's pipeline takes them.
TextEncoder = Callable[[list[str]], Rows]

# What a text encoder's config says of the files that it was loaded from.
_NOT_THE_MODEL = {"architectures", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True)
class TextEncoding:
    """How a pipeline encodes texts.

    Attributes:
        encode: From texts to their embeddings.
        tokenizers: What it tokenizes them with.
        models: What it encodes tokens with.
        settings: All else that results depend on.
    """

    encode: TextEncoder
    tokenizers: Sequence[Any]
    models: Sequence[torch.nn.Module]
    settings: dict[str, Any]

    def to(self, device: torch.device) -> TextEncoding:
        """The same, with its models on a device."""
        for model in self.models:
            model.to(device)
        return self

    def describe(self, texts: Sequence[str]) -> dict[str, Any]:
        """What the embeddings of texts depend on, by the words of messages."""
        tokenizers = [part.tokenizer if isinstance(part, ProcessorMixin) else part for part in self.tokenizers]
        hashed = {
            "texts": texts,
            # The files of a tokenizer also say where it was loaded from. This is what it does; `encode` truncates.
            "tokenizers": [
                *(tokenizer([*texts], verbose=False)["input_ids"] for tokenizer in tokenizers),
                *([part.pad_token_id, part.padding_side, part.model_max_length] for part in tokenizers),
                *(tokenizer.chat_template for tokenizer in tokenizers),
            ],
            "configs of the text encoders": [_describe(model) for model in self.models],
        }
        described = {
            "format": FORMAT,
            "text encoders": ", ".join(f"{type(model).__name__} in {model.dtype}" for model in self.models),
            **{name: content_key({name: value}, [])[:16] for name, value in hashed.items()},
            "weights of the text encoders": content_key({}, self.models)[:16],
            **self.settings,
        }
        return json.loads(json.dumps(described, default=str))  # as it comes back from an index


def _describe(model: torch.nn.Module) -> dict[str, Any]:
    config = model.config.to_dict()
    return {name: config[name] for name in config if not name.startswith("_") and name not in _NOT_THE_MODEL}


@dataclass(frozen=True)
class CachedTextEmbeddings:
    """A [`TextEncoder`] of texts that were encoded before, by the files that they are in and their places there."""

    places: dict[str, tuple[CachedRows, int]]
    device: torch.device

    def __call__(self, texts: list[str]) -> Rows:
        """The embeddings of texts, on the device; a `ValueError` for a text that was not encoded."""
        for text in texts:
            if text not in self.places:
                raise ValueError(f"`texts` must be those that were encoded before training, got {text!r}.")
        rows = [rows.read([place]) for rows, place in map(self.places.get, texts)]
        joined = {name: [row[name] for row in rows] for name in rows[0]}
        joined = {
            name: torch.cat(parts) if isinstance(parts[0], torch.Tensor) else [part[0] for part in parts]
            for name, parts in joined.items()
        }
        return send_to_device(joined, self.device, non_blocking=True)


def cache_text_embeddings(
    encoding: TextEncoding,
    texts: Collection[str],
    cache_dir: str | os.PathLike,
    *,
    batch_size: int,
    device: torch.device,
) -> CachedTextEmbeddings:
    """Encodes every text once, or finds that this was done before, in this run or another.

    A cache belongs to its texts and to what encodes them; anything else makes a new one. With several processes, let
    the main one go first. A cache takes the bytes of one embedding per text, in the text encoders' precision: 2.7 MB
    in half precision for Stable Diffusion 3. The result is `encode`'s to within rounding: a text's numbers may depend
    on those encoded along with it.
    """
    texts = sorted(texts)
    folder = Path(cache_dir) / f"text-embeddings-{content_key(encoding.describe(texts), [])}"
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    rows = CachedRows.made_once(
        folder, lambda: map(encoding.encode, tqdm(batches, "Caching text embeddings", unit="batch"))
    )
    return CachedTextEmbeddings({text: (rows, place) for place, text in enumerate(texts)}, device)


class TextShards(Shards):
    """Embeddings of texts in folders of [`CachedRows`]."""

    index, format, pattern = "text_embeddings.json", FORMAT, "text-embeddings-{:05d}-of-{:05d}"
    of_others = "text embeddings of other captions, text encoders or settings"

    def count(self, path: Path) -> int:
        """As [`Shards.count`]."""
        return len(CachedRows(path))


def precomputed_texts(captions: Captions) -> list[str]:
    """Those whose embeddings are made ahead of training, in their order: all captions, and the empty one."""
    return sorted({"", *captions.all()})


def load_text_embeddings(
    latents_dir: str, encoding: TextEncoding, captions: Captions, device: torch.device
) -> CachedTextEmbeddings | None:
    """The embeddings of the captions of a folder of latents, or None if it has none.

    A `ValueError` if they are of other text encoders, tokenizers or settings, or not complete.
    """
    folder = Path(latents_dir) / TEXT_EMBEDDINGS
    if not folder.exists():
        return None
    index, texts = TextShards.read_index(folder), precomputed_texts(captions)
    advice = "Train with what they were made with, or make others."
    wanted = {**encoding.describe(texts), "num_rows": len(texts)}
    TextShards.check(index, wanted, f"`--latents_dir`={latents_dir!r}", advice)
    shards, places = TextShards.complete(folder, index), {}
    for number in range(len(shards)):
        rows = CachedRows(shards.path(number))
        places |= {texts[row]: (rows, place) for place, row in enumerate(shards.rows(number))}
    return CachedTextEmbeddings(places, device)
