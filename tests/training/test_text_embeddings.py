import sys
from pathlib import Path

import pytest
import torch


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_text_encoders import clip_text_model, clip_tokenizer
from transformers import CLIPTokenizer

from diffusers_dtr.training.data.encoder_cache import CachedTextEmbeddings, cache_text_embeddings


TEXTS = {"", "one", "two", "a handwritten three", "four"}
CPU = torch.device("cpu")


class Encoder:
    """A text encoder that counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.tokenizer, self.model, self.calls = clip_tokenizer(), clip_text_model().to(dtype), 0

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        self.calls += 1
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        hidden = self.model(tokens.input_ids)[0]
        return {"prompt_embeds": hidden, "prompt_attention_mask": tokens.attention_mask}


def cache(folder: Path, encoder: Encoder, texts=TEXTS, **settings) -> CachedTextEmbeddings:
    parts = [encoder.tokenizer], [encoder.model]
    return cache_text_embeddings(encoder, texts, *parts, settings, folder / "cache", batch_size=2, device=CPU)


def caches(folder: Path) -> list[Path]:
    return sorted((folder / "cache").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_embeddings_are_those_encoded_as_they_are_needed(dtype, tmp_path):
    encoder, texts = Encoder(dtype), ["two", "", "two", "one"]
    cached, fresh = cache(tmp_path, encoder)(texts), encoder(texts)
    assert cached.keys() == fresh.keys()
    for name, embeddings in fresh.items():
        assert cached[name].dtype == embeddings.dtype
        torch.testing.assert_close(cached[name], embeddings)


def test_a_text_that_was_not_encoded_is_named(tmp_path):
    with pytest.raises(ValueError, match="`texts` must be those that were encoded before training, got 'five'"):
        cache(tmp_path, Encoder())(["one", "five"])


def test_a_second_run_encodes_nothing(tmp_path):
    first, second = Encoder(), Encoder()
    expected = cache(tmp_path, first)(["one"])["prompt_embeds"]
    assert torch.equal(cache(tmp_path, second)(["one"])["prompt_embeds"], expected)
    assert (first.calls, second.calls) == (3, 0)
    assert len(caches(tmp_path)) == 1


def test_where_an_encoder_was_loaded_from_does_not_matter(tmp_path):
    encoder, loaded = Encoder(), Encoder()
    cache(tmp_path, encoder)
    for part in ("tokenizer", "model"):
        getattr(encoder, part).save_pretrained(tmp_path / part)
        setattr(loaded, part, type(getattr(encoder, part)).from_pretrained(tmp_path / part))
    cache(tmp_path, loaded)
    assert len(caches(tmp_path)) == 1


def change_weights(encoder):
    encoder.model.get_input_embeddings().weight.data[0, 0] += 1


def change_config(encoder):
    encoder.model.config.layer_norm_eps = 0.1


def change_tokens(encoder):
    vocabulary = encoder.tokenizer.get_vocab()
    vocabulary["o"], vocabulary["n"] = vocabulary["n"], vocabulary["o"]
    encoder.tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def change_length(encoder):
    encoder.tokenizer.model_max_length = 8


def change_padding(encoder):
    encoder.tokenizer.pad_token = "a</w>"


def change_precision(encoder):
    encoder.model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change", [change_weights, change_config, change_tokens, change_length, change_padding, change_precision]
)
def test_another_encoder_has_another_cache(change, tmp_path):
    encoder = Encoder()
    cache(tmp_path, encoder)
    change(encoder)
    cache(tmp_path, encoder)
    assert len(caches(tmp_path)) == 2


def test_other_texts_or_settings_have_another_cache(tmp_path):
    encoder = Encoder()
    for change in ({}, {"texts": TEXTS | {"five"}}, {"max_sequence_length": 4}):
        cache(tmp_path, encoder, **change)
    assert len(caches(tmp_path)) == 3


def test_embeddings_are_read_from_the_file_and_not_held_in_memory(tmp_path):
    cached = cache(tmp_path, Encoder())
    (folder,) = caches(tmp_path)
    row = sorted(TEXTS).index("one")
    size = cached(["one"])["prompt_embeds"].nbytes
    with open(folder / "prompt_embeds", "r+b") as file:
        file.seek(row * size)
        file.write(bytes(size))
    assert not cached(["one"])["prompt_embeds"].any()
    assert cached(["two"])["prompt_embeds"].any()


def test_texts_of_their_own_lengths_are_cached_as_they_are(tmp_path):
    encoder = Encoder()

    def ragged(texts):
        encoded = encoder(texts)
        return {
            "prompt_embeds": [row[: 3 + len(text)] for row, text in zip(encoded["prompt_embeds"], texts, strict=True)]
        }

    parts = [encoder.tokenizer], [encoder.model]
    cached = cache_text_embeddings(ragged, TEXTS, *parts, {}, tmp_path, batch_size=2, device=CPU)
    torch.testing.assert_close(cached(["two", "", "one"]), ragged(["two", "", "one"]))
