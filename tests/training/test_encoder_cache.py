"""Latents and text embeddings that are encoded once: those encoded as they are needed, and when they are made anew."""

import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from test_images import noise_image
from tiny_autoencoders import tiny_taesd, tiny_vae


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_text_encoders import clip_text_model, clip_tokenizer
from transformers import CLIPTokenizer

from diffusers_dtr.latents import encode_images
from diffusers_dtr.training.data.encoder_cache import cache_latents
from diffusers_dtr.training.data.images import ImageTransform, UnreadableImageError
from diffusers_dtr.training.data.samples import ImageDataset
from diffusers_dtr.training.data.text_embeddings import CachedTextEmbeddings, TextEncoding, cache_text_embeddings
from diffusers_dtr.training.data.training_images import TrainingImages, load_training_images
from diffusers_dtr.training.randomness import posterior_generators


NORMALISATION = {"scaling_factor": 0.5, "shift_factor": 0.2}
TRANSFORM = ImageTransform(resolution=8, center_crop=True, random_flip=True)
TEXTS = {"", "one", "two", "a handwritten three", "four"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for row in range(6):
        path = tmp_path / "data" / "ab"[row // 3] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(12, 8, row).save(path)
    return tmp_path / "data"


def caches(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache").iterdir())


def load(folder: Path, **options) -> TrainingImages:
    return load_training_images(train_data_dir=folder, cache_dir=folder.parent / "datasets", **options)


def cache(folder: Path, *, vae=None, transform=TRANSFORM, images=None, **options):
    images = load(folder) if images is None else images
    options = {"seed": 7, "batch_size": 4} | options
    return cache_latents(vae or tiny_vae(**NORMALISATION), images, transform, folder.parent / "cache", **options)


@pytest.mark.parametrize("make_vae", [tiny_vae, tiny_taesd])
@pytest.mark.parametrize("random_flip", [False, True])
def test_cached_latents_are_those_encoded_on_the_fly_in_every_epoch(folder, make_vae, random_flip):
    vae, images, transform = make_vae(), load(folder), replace(TRANSFORM, random_flip=random_flip)
    cached = cache(folder, vae=vae, images=images, transform=transform)
    fresh = ImageDataset(images, transform, seed=7)
    for place in [(0, 0), (0, 3), (1, 0), (2, 5)]:
        left, right = cached[place], fresh[place]
        generators = posterior_generators(7, *([number] for number in place))
        torch.testing.assert_close(left["latents"], encode_images(vae, right["pixel_values"][None], generators)[0])
        assert left["labels"] == right["labels"]
        assert all(torch.equal(left[name], right[name]) for name in ("original_size", "crop_top_left"))


def test_a_pickled_dataset_does_not_hold_the_latents(folder):
    cached = cache(folder)
    pickled = pickle.dumps(cached)
    assert len(pickled) < len(pickle.dumps(cached.images)) + 2000
    assert torch.equal(pickle.loads(pickled)[0, 1]["latents"], cached[0, 1]["latents"])


def test_labels_are_not_part_of_the_cache(folder):
    assert "labels" not in cache(folder, images=load(folder, label_column=None))[0, 0]
    images = load(folder)
    for number in range(2):
        relabelled = replace(images, labels=images.labels + number)
        assert cache(folder, images=relabelled)[0, 0]["labels"] == number
    assert len(caches(folder)) == 2


def test_a_second_run_encodes_no_image(folder, monkeypatch, tmp_path):
    vae = tiny_vae(**NORMALISATION)
    first = cache(folder, vae=vae)[2, 3]["latents"]
    vae.save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *_: pytest.fail("encoded again"))
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert torch.equal(cache(folder, vae=loaded)[2, 3]["latents"], first)
    assert not torch.equal(cache(folder, seed=8)[2, 3]["latents"], first)


def test_neither_workers_nor_the_global_generator_matter(folder):
    vae, images, state = tiny_vae(**NORMALISATION), load(folder), torch.get_rng_state()
    alone = cache(folder, vae=vae, images=images).rows.read(range(6))
    assert torch.equal(torch.get_rng_state(), state)
    shutil.rmtree(folder.parent / "cache")
    again = cache(folder, num_workers=2).rows.read(range(6))
    assert all(torch.equal(again[name], alone[name]) for name in ("moments", "original_size"))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda vae, folder: vae.decoder.conv_out.bias.data.add_(1), {}),
        (lambda vae, folder: vae.register_to_config(scaling_factor=0.6), {}),
        (lambda vae, folder: Image.new("RGB", (8, 8), "red").save(folder / "a" / "0.png"), {}),
        (lambda vae, folder: None, {"transform": replace(TRANSFORM, resolution=4)}),
        (lambda vae, folder: None, {"transform": replace(TRANSFORM, random_flip=False)}),
    ],
    ids=["weights", "config", "images", "resolution", "flips"],
)
def test_other_latents_have_another_cache(change, options, folder):
    vae = tiny_vae(**NORMALISATION)
    cache(folder, vae=vae)
    change(vae, folder)
    cache(folder, vae=vae, **options)
    assert len(caches(folder)) == 2


def test_an_interrupted_run_leaves_no_cache(folder):
    (folder / "b" / "5.png").write_bytes(b"broken")
    with pytest.raises(UnreadableImageError, match=r"5\.png \(row 5\)"):
        cache(folder, batch_size=2)
    assert caches(folder) == []


# ---- text embeddings


class Encoder:
    """A text encoder that counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float32, ragged: bool = False):
        self.tokenizer, self.model, self.calls = clip_tokenizer(), clip_text_model().to(dtype), 0
        self.ragged = ragged

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        self.calls += 1
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        hidden = self.model(tokens.input_ids)[0]
        if self.ragged:
            hidden = [row[: 3 + len(text)] for row, text in zip(hidden, texts, strict=True)]
        return {"prompt_embeds": hidden, "prompt_attention_mask": tokens.attention_mask}


def cache_texts(folder: Path, encoder: Encoder, texts=TEXTS, **settings) -> CachedTextEmbeddings:
    encoding = TextEncoding(encoder, [encoder.tokenizer], [encoder.model], settings)
    return cache_text_embeddings(encoding, texts, folder.parent / "cache", batch_size=2, device=torch.device("cpu"))


@pytest.mark.parametrize(("dtype", "ragged"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_cached_embeddings_are_those_encoded_as_they_are_needed(dtype, ragged, folder):
    encoder, texts = Encoder(dtype, ragged), ["two", "", "two", "one"]
    cached, fresh = cache_texts(folder, encoder)(texts), encoder(texts)
    assert cached.keys() == fresh.keys()
    assert cached["prompt_embeds"][0].dtype == dtype
    torch.testing.assert_close(cached, fresh)


def test_a_text_that_was_not_encoded_is_named(folder):
    with pytest.raises(ValueError, match="`texts` must be those that were encoded before training, got 'five'"):
        cache_texts(folder, Encoder())(["one", "five"])


def test_a_second_run_encodes_no_text_wherever_the_encoder_was_loaded_from(folder, tmp_path):
    first, second = Encoder(), Encoder()
    expected = cache_texts(folder, first)(["one"])["prompt_embeds"]
    for part in ("tokenizer", "model"):
        getattr(first, part).save_pretrained(tmp_path / part)
        setattr(second, part, type(getattr(first, part)).from_pretrained(tmp_path / part))
    assert torch.equal(cache_texts(folder, second)(["one"])["prompt_embeds"], expected)
    assert (first.calls, second.calls) == (3, 0)


def swapped_letters(encoder):
    vocabulary = encoder.tokenizer.get_vocab()
    vocabulary["o"], vocabulary["n"] = vocabulary["n"], vocabulary["o"]
    encoder.tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda encoder: encoder.model.get_input_embeddings().weight.data.add_(1), {}),
        (lambda encoder: setattr(encoder.model.config, "layer_norm_eps", 0.1), {}),
        (swapped_letters, {}),
        (lambda encoder: setattr(encoder.tokenizer, "model_max_length", 8), {}),
        (lambda encoder: setattr(encoder.tokenizer, "pad_token", "a</w>"), {}),
        (lambda encoder: encoder.model.to(torch.bfloat16), {}),
        (lambda encoder: None, {"texts": TEXTS | {"five"}}),
        (lambda encoder: None, {"max_sequence_length": 4}),
    ],
    ids=["weights", "config", "tokens", "length", "padding", "precision", "texts", "settings"],
)
def test_other_embeddings_have_another_cache(change, options, folder):
    encoder = Encoder()
    cache_texts(folder, encoder)
    change(encoder)
    cache_texts(folder, encoder, **options)
    assert len(caches(folder)) == 2


def test_embeddings_are_read_from_the_file_and_not_held_in_memory(folder):
    cached = cache_texts(folder, Encoder())
    (cache_folder,) = caches(folder)
    size = cached(["one"])["prompt_embeds"].nbytes
    with open(cache_folder / "prompt_embeds", "r+b") as file:
        file.seek(sorted(TEXTS).index("one") * size)
        file.write(bytes(size))
    assert not cached(["one"])["prompt_embeds"].any()
    assert cached(["two"])["prompt_embeds"].any()
