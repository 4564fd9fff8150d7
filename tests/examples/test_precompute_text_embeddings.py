"""Embeddings of captions made ahead of training: by several processes, after interruptions, and what is trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_to_image_runs import FAMILIES, make_captioned_images
from text_to_image_runs import SCRIPT as TRAINING
from text_to_image_runs import train as train_from_images
from training_runs import (
    EXAMPLES,
    assert_equal_weights,
    files,
    finish,
    launch,
    load_script,
    reset_accelerate,
    run_main,
)

from diffusers_dtr.training import TextPipeline
from diffusers_dtr.training.data import text_embeddings
from diffusers_dtr.training.data.encoder_cache import CachedRows
from diffusers_dtr.user_errors import USER_ERRORS


SCRIPT = EXAMPLES / "precompute" / "precompute_latents.py"
# "", "a four", "a two", "number four", "number one", "number three", "number two": two shards, of two batches each.
SIZES = ("--resolution", 8, "--center_crop", "--batch_size", 2, "--shard_size", 4)
COMMON = ("--center_crop", "--proportion_empty_prompts", 0.3, "--train_batch_size", 2, "--validation_prompts", "a two")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_captioned_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: family.save_plain(folder / name) for name, family in FAMILIES.items()}


def flags(name: str, images: Path, base: Path, output_dir: Path, *others: object) -> list[str]:
    source = ("--train_data_dir", images, "--caption_column", "text", "--pretrained_model_name_or_path", base)
    argv = [*source, *SIZES, *FAMILIES[name].flags, "--text_embeddings", "--output_dir", output_dir]
    return [*map(str, [*argv, "--cache_dir", images.parent / "cache", *others])]


def precompute(*args: object) -> Path:
    script = load_script(SCRIPT)
    try:
        script.main(script.parse_args(flags(*args)))
    finally:
        reset_accelerate()
    return args[3]


@pytest.fixture(scope="module")
def latents(images, bases, tmp_path_factory) -> Path:
    return precompute("sd", images, bases["sd"], tmp_path_factory.mktemp("latents") / "of images")


def train(name: str, latents: Path, base: Path, output_dir: Path, *others: object) -> Path:
    argv = ["--pretrained_model_name_or_path", base, *FAMILIES[name].flags, "--latents_dir", latents, *COMMON]
    argv += ["--resolution", 8, "--max_train_steps", 3, "--learning_rate", 1e-2, "--num_validation_images", 3]
    argv += ["--validation_num_inference_steps", 2, "--report_to", "none", "--output_dir", output_dir, *others]
    return run_main(load_script(TRAINING), [*map(str, argv)])


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_train_what_cached_embeddings_train(name, images, bases, tmp_path, monkeypatch):
    latents, caching = tmp_path / "latents", ("--cache_latents", "--cache_text_embeddings")
    precompute(name, images, bases[name], latents)
    cached = train_from_images(name, images, tmp_path / "cached", bases[name], *COMMON, *caching)
    moves = []
    monkeypatch.setattr(text_embeddings.TextEncoding, "to", lambda *_: moves.append("to the device"))
    run = train(name, latents, bases[name], tmp_path / "run")
    assert moves == []
    assert not (run / "text_embeddings").exists()
    assert_equal_weights(run, cached, FAMILIES[name].denoiser)
    assert (run / "text_encoder").is_dir()


def test_a_damaged_text_encoder_is_found_before_images_are_encoded(images, bases, tmp_path):
    base = shutil.copytree(bases["sd"], tmp_path / "base")
    (file,) = (base / "text_encoder").glob("*.safetensors")
    file.write_bytes(b"no")
    with pytest.raises(USER_ERRORS):
        precompute("sd", images, base, tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


def test_prompts_that_were_not_made_ahead_are_encoded_before_training(latents, bases, tmp_path, monkeypatch):
    seen = {}
    conditions = TextPipeline.conditions

    def watched(self, batch):
        seen["encoder"] = self.pipeline.text_encoder
        return conditions(self, batch)

    monkeypatch.setattr(TextPipeline, "conditions", watched)
    prompts = ("--validation_prompts", "a two", "a fifth", "a sixth")
    run = train("sd", latents, bases["sd"], tmp_path / "run", *prompts)
    (cache,) = (run / "text_embeddings").iterdir()
    assert len(json.loads((cache / "index.json").read_text())["prompt_embeds"]["shapes"]) == 2
    assert seen == {"encoder": None}


def test_an_interrupted_run_goes_on_where_it_stopped(images, bases, latents, tmp_path, monkeypatch):
    made, made_once = [], CachedRows.made_once

    def interrupted(folder, batches):
        if made:
            (folder.parent / ".shard-abc.partial").mkdir()
            raise KeyboardInterrupt
        made.append(folder)
        return made_once(folder, batches)

    with monkeypatch.context() as patch:
        patch.setattr(CachedRows, "made_once", interrupted)
        with pytest.raises(KeyboardInterrupt):
            precompute("sd", images, bases["sd"], tmp_path / "latents")
    with pytest.raises(
        ValueError, match=r"text_embeddings' lacks 1 of its 2 shards: run precompute_latents\.py again"
    ):
        train("sd", tmp_path / "latents", bases["sd"], tmp_path / "run")
    (first,) = made
    before = (first / "prompt_embeds").stat().st_mtime_ns
    precompute("sd", images, bases["sd"], tmp_path / "latents")
    assert files(tmp_path / "latents" / "text_embeddings") == files(latents / "text_embeddings")
    assert (first / "prompt_embeds").stat().st_mtime_ns == before


def other_encoder(base: Path) -> tuple:
    (file,) = (base / "text_encoder").glob("*.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return ()


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("sd", other_encoder, "`weights of the text encoders` is"),
        ("pixart", lambda base: ("--max_sequence_length", 12), "`max_sequence_length` is 16 there and 12 here"),
        (
            "sd",
            lambda base: ("--mixed_precision", "bf16"),
            "CLIPTextModel in torch.float32 there and CLIPTextModel in",
        ),
    ],
    ids=["weights", "length", "precision"],
)
def test_other_embeddings_are_refused(name, change, named, images, bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases[name], base)
    if named.startswith("CLIP"):  # else the latents are refused
        config = base / "vae" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": True}))
    latents = precompute(name, images, base, tmp_path / "latents")
    others = change(base)
    with pytest.raises(ValueError, match=f"holds text embeddings of other captions, text encoders or .*{named}"):
        train(name, latents, base, tmp_path / "run", *others)
    if "--mixed_precision" not in others:
        before = files(latents)
        with pytest.raises(ValueError, match=f"`--output_dir`=.* holds text embeddings of other .*{named}"):
            precompute(name, images, base, latents, *others)
        assert files(latents) == before


@pytest.mark.parametrize(
    ("others", "left_out", "message"),
    [
        ((), "--caption_column", "`--text_embeddings` needs --caption_column."),
        ((), "--pretrained_model_name_or_path", "`--text_embeddings` needs --pretrained_model_name_or_path."),
        (("--max_sequence_length", 8), "--text_embeddings", "`--max_sequence_length` has an effect with --text_emb"),
    ],
)
def test_what_embeddings_need_is_said(others, left_out, message, capsys):
    argv = flags("sd", Path("images"), Path("base"), Path("latents"), *others)
    place = argv.index(left_out)
    del argv[place : place + (1 if left_out == "--text_embeddings" else 2)]
    with pytest.raises(SystemExit):
        load_script(SCRIPT).parse_args(argv)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_what_one_makes(images, bases, latents, tmp_path):
    argv = flags("sd", images, bases["sd"], tmp_path / "latents")
    assert finish(launch(argv, num_processes=2, script=SCRIPT)).count("7 texts in 2 shards") == 1
    one, two = (files(folder / "text_embeddings") for folder in (latents, tmp_path / "latents"))
    assert one == two
    assert torch.equal(
        *(load_file(next(folder.glob("*00000*")))["moments"] for folder in (latents, tmp_path / "latents"))
    )
