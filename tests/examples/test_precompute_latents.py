"""Latents made ahead of training: by several processes, after interruptions, and what is trained from them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from text_to_image_runs import FAMILIES, make_captioned_images
from text_to_image_runs import train as train_text_to_image
from tiny_autoencoders import tiny_vae
from training_runs import (
    EXAMPLES,
    MODEL,
    assert_close_weights,
    assert_equal_weights,
    finish,
    launch,
    load_script,
    make_images,
    reset_accelerate,
    run_main,
    same_weights,
    train,
    weights,
)
from training_runs import SCRIPT as TRAIN

from diffusers_dtr.training import Trainer
from diffusers_dtr.training.data import precompute as making
from diffusers_dtr.training.data.latent_shards import LatentShards


SCRIPT = EXAMPLES / "precompute" / "precompute_latents.py"
DENOISER = ("--model_config", {name: value for name, value in MODEL.items() if name != "in_channels"})
# An epoch is of six steps: the images are seen again, with other flips and other samples of the posterior.
SIX = ("--resolution", 16, "--center_crop", "--random_flip", "--max_train_steps", 7)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With images in folders of classes, and an autoencoder."""
    folder = tmp_path_factory.mktemp("data")
    make_images(folder / "images")
    tiny_vae(force_upcast=False).save_pretrained(folder / "vae")
    return folder


def flags(folder: Path, output_dir: Path, *others: object) -> list[str]:
    argv = ["--train_data_dir", folder / "images", "--label_column", "label", "--vae_name_or_path", folder / "vae"]
    argv += ["--resolution", 16, "--center_crop", "--random_flip", "--batch_size", 4, "--shard_size", 8]
    return [*map(str, [*argv, "--cache_dir", folder / "cache", "--output_dir", output_dir, *others])]


def precompute(folder: Path, output_dir: Path, *others: object) -> Path:
    script = load_script(SCRIPT)
    try:
        script.main(script.parse_args(flags(folder, output_dir, *others)))
    finally:
        reset_accelerate()
    return output_dir


@pytest.fixture(scope="module")
def latents(folder, tmp_path_factory) -> Path:
    return precompute(folder, tmp_path_factory.mktemp("latents") / "of images")


def shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_equal_shards(one: Path, other: Path) -> None:
    torch.testing.assert_close(shards(one), shards(other), rtol=0, atol=0)
    assert (one / "latents.json").read_text() == (other / "latents.json").read_text()
    assert not [*other.glob("*.partial")]


def train_flags(latents: Path, output_dir: Path, folder: Path, *others: object) -> list[str]:
    argv = [
        *DENOISER,
        "--vae_name_or_path",
        folder / "vae",
        *SIX,
        "--latents_dir",
        latents,
        "--output_dir",
        output_dir,
    ]
    argv += ["--train_batch_size", 4, "--learning_rate", 1e-2, "--num_validation_images", 3]
    argv += ["--validation_num_inference_steps", 2, "--report_to", "none", *others]
    return [json.dumps(word) if isinstance(word, dict) else str(word) for word in argv]


def train_from(latents: Path, output_dir: Path, folder: Path, *others: object) -> Path:
    return run_main(load_script(TRAIN), train_flags(latents, output_dir, folder, *others))


@pytest.fixture(scope="module")
def from_images(folder, tmp_path_factory) -> Path:
    source = (*DENOISER, "--vae_name_or_path", folder / "vae")
    flags = (*SIX, "--validation_data_dir", folder / "images", "--checkpointing_steps", 4)
    return train(folder / "images", tmp_path_factory.mktemp("runs") / "images", *flags, source=source)


def test_latents_train_what_their_images_and_cached_latents_train(folder, latents, from_images, tmp_path):
    source = (*DENOISER, "--vae_name_or_path", folder / "vae")
    cached = train(folder / "images", tmp_path / "cached", *SIX, "--cache_latents", source=source)
    held_out = ("--validation_data_dir", folder / "images", "--cache_dir", folder / "cache")
    run = train_from(latents, tmp_path / "run", folder, *held_out, "--dataloader_num_workers", 1)
    assert_equal_weights(run, cached)
    assert_close_weights(weights(run), weights(from_images), 1e-6)
    assert_equal_weights(run, from_images, "vae")
    results = [json.loads((path / "training_config.json").read_text())["results"] for path in (run, from_images)]
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert not same_weights(run, train_from(latents, tmp_path / "other", folder, "--seed", 1))


def test_a_run_has_no_autoencoder_in_memory_but_while_it_samples(folder, latents, tmp_path, monkeypatch):
    devices = {}
    for name in ("_backward", "validate"):
        method = getattr(Trainer, name)

        def watched(self, *args, name=name, method=method):
            devices.setdefault(name, {parameter.device.type for parameter in self.data.vae.parameters()})
            return method(self, *args)

        monkeypatch.setattr(Trainer, name, watched)
    train_from(latents, tmp_path / "run", folder, "--max_train_steps", 1)
    assert devices == {"_backward": {"meta"}, "validate": {"meta"}}


def test_a_run_of_images_goes_on_with_their_latents(folder, latents, from_images, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(from_images / "checkpoint-4", run / "checkpoint-4")
    train_from(latents, run, folder, "--resume_from_checkpoint", "latest")
    assert_close_weights(weights(run), weights(from_images), 1e-6)


def test_captions_are_kept_and_text_to_image_trains_the_same(tmp_path):
    images, base = make_captioned_images(tmp_path / "images"), FAMILIES["pixart"].save_plain(tmp_path / "base")
    source = ("--train_data_dir", images, "--caption_column", "text", "--pretrained_model_name_or_path", base)
    script, latents = load_script(SCRIPT), tmp_path / "latents"
    sizes = ("--resolution", 8, "--center_crop", "--batch_size", 4, "--output_dir", latents)
    script.main(script.parse_args([*map(str, (*source, *sizes))]))
    reset_accelerate()
    common = ("--center_crop", "--cache_text_embeddings", "--proportion_empty_prompts", 0.3)
    cached = train_text_to_image("pixart", images, tmp_path / "cached", base, *common, "--cache_latents")
    config = json.loads((cached / "run_config.json").read_text())
    del config["train_data_dir"], config["cache_latents"]
    given = tmp_path / "config.json"
    given.write_text(json.dumps({**config, "latents_dir": str(latents), "output_dir": str(tmp_path / "run")}))
    run = run_main(load_script(EXAMPLES / "text_to_image" / "train_text_to_image.py"), ["--config", str(given)])
    assert_equal_weights(run, cached)


def test_an_interrupted_run_goes_on_where_it_stopped(folder, latents, tmp_path, monkeypatch):
    saved, save = [], making.save_file

    def interrupted(tensors, path):
        if len(saved) == 2:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        saved.append(path)
        save(tensors, path)

    monkeypatch.setattr(making, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        precompute(folder, tmp_path / "latents")
    assert len(shards(tmp_path / "latents")) == 2
    with pytest.raises(ValueError, match=r"lacks 1 of its 3 shards: run precompute_latents\.py again with the same"):
        train_from(tmp_path / "latents", tmp_path / "run", folder)
    (tmp_path / "latents" / "latents-00002-of-00003.safetensors.1.partial").write_bytes(b"of a killed process")
    del saved[:1]
    precompute(folder, tmp_path / "latents")
    assert len(saved) == 2  # the third alone
    assert_equal_shards(latents, tmp_path / "latents")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: next((folder / "images" / "a").iterdir()).unlink(), "`images`"),
        (lambda folder: [(folder / "images" / "a").rename(folder / "images" / "z")][:0], "`labels and captions`"),
        (lambda folder: tiny_vae(norm_num_groups=1).save_pretrained(folder / "vae"), "`config of the autoencoder`"),
        (lambda folder: ["--resolution", 8], "`resolution` is 16 there and 8 here"),
        (lambda folder: ["--dtype", "bfloat16"], "`autoencoder` is AutoencoderKL in torch.float32 there"),
        (lambda folder: ["--shard_size", 4], "`shard_size` is 8 there and 4 here"),
    ],
    ids=["images", "classes", "autoencoder", "resolution", "precision", "shards"],
)
def test_a_folder_of_other_latents_is_refused_and_left_as_it_is(change, named, folder, latents, tmp_path):
    for source, name in ((folder / "images", "images"), (folder / "vae", "vae"), (latents, "latents")):
        shutil.copytree(source, tmp_path / name)
    others = change(tmp_path) or ()
    with pytest.raises(ValueError, match=r"`--output_dir`='.*latents' holds latents of other .*" + named):
        precompute(tmp_path, tmp_path / "latents", *others)
    assert_equal_shards(latents, tmp_path / "latents")


def test_training_refuses_latents_of_another_autoencoder_or_transform_or_none(folder, latents, tmp_path):
    vae = tiny_vae(force_upcast=False)
    vae.encoder.conv_in.bias.data.add_(1)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"`--latents_dir`='.* another autoencoder .*`weights of the autoencoder` is"):
        train_from(latents, tmp_path / "run", tmp_path)
    with pytest.raises(ValueError, match="`resolution` is 16 there and 8 here"):
        train_from(latents, tmp_path / "run", folder, "--resolution", 8)
    with pytest.raises(ValueError, match=r"`--latents_dir` must be a folder that precompute_latents\.py made"):
        train_from(folder, tmp_path / "run", folder)
    with pytest.raises(ValueError, match="`label_column` must be one of the dataset's columns, image, label, got"):
        train_from(latents, tmp_path / "run", folder, "--label_column", "kind")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def lessen(path: Path) -> None:
    save_file({name: rows[:3].clone() for name, rows in load_file(path).items()}, path)


def set_index(**values: object):
    def change(path: Path) -> None:
        index = path.with_name("latents.json")
        index.write_text(json.dumps(json.loads(index.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"00001-of-00003\.safetensors must be a shard of 8 rows, got a damaged one .*: delete it, and run"),
        (lambda path: path.write_bytes(b""), "must be a shard of 8 rows, got a damaged one .*: delete it"),
        (lessen, r"latents-00001-of-00003\.safetensors must be a shard of 8 rows, got 3: delete it, and run"),
        (set_index(num_rows="24"), "`num_rows` of .*latents.json` must be an integer, got '24'"),
        (set_index(shard_size=0), "`shard_size` of .*latents.json must be at least 1, got 0: make .* anew"),
        (lambda path: path.with_name("latents.json").unlink(), "has shards, but no latents.json|must be a folder"),
    ],
)
def test_what_is_damaged_is_named_before_training_and_before_more_is_made(damage, message, folder, latents, tmp_path):
    shutil.copytree(latents, tmp_path / "latents")
    damage(tmp_path / "latents" / "latents-00001-of-00003.safetensors")
    with pytest.raises(ValueError, match=message):
        train_from(tmp_path / "latents", tmp_path / "run", folder)
    with pytest.raises(ValueError, match=message):
        precompute(folder, tmp_path / "latents")


def test_training_refuses_latents_of_some_of_the_images(folder, latents, tmp_path):
    shutil.copytree(latents, tmp_path / "latents")
    (tmp_path / "latents" / "latents-00002-of-00003.safetensors").unlink()
    for number in (0, 1):
        path = tmp_path / "latents" / f"latents-{number:05d}-of-00003.safetensors"
        path.rename(path.with_name(path.name.replace("00003", "00002")))
    set_index(num_rows=16)(path)
    with pytest.raises(ValueError, match="`num_rows` is 16 there and 24 here"):
        train_from(tmp_path / "latents", tmp_path / "run", folder)


def test_one_run_at_a_time_makes_latents_in_a_folder(folder, latents, tmp_path):
    shutil.copytree(latents, tmp_path / "latents")
    lock = FileLock(tmp_path / "latents" / ".run.lock")
    with lock, pytest.raises(ValueError, match="is in use by another run: wait for it"):
        precompute(folder, tmp_path / "latents")
    assert_equal_shards(latents, precompute(folder, tmp_path / "latents"))
    assert not (tmp_path / "latents" / ".run.lock").exists()


@pytest.mark.slow
def test_two_processes_make_what_one_makes_and_go_on_where_one_was_killed(folder, latents, tmp_path):
    shutil.copytree(latents, tmp_path / "latents")
    for number in (1, 2):
        (tmp_path / "latents" / f"latents-{number:05d}-of-00003.safetensors").unlink()
    finish(launch(flags(folder, tmp_path / "latents"), num_processes=2, script=SCRIPT))
    assert_equal_shards(latents, tmp_path / "latents")
    argv = flags(folder, tmp_path / "anew", "--dataloader_num_workers", "1")
    output = finish(launch(argv, num_processes=2, script=SCRIPT))
    assert output.count("24 images in 3 shards") == 1  # they are of one group
    assert "4/4" in output  # batches of the first process, which has two of the shards
    assert_equal_shards(latents, tmp_path / "anew")


@pytest.mark.slow
def test_two_processes_train_from_latents_what_one_that_accumulates_does(folder, latents, tmp_path):
    one = train_from(latents, tmp_path / "one", folder, "--gradient_accumulation_steps", 2)
    finish(launch(train_flags(latents, tmp_path / "two", folder), num_processes=2))
    assert_equal_weights(tmp_path / "two", one)


def test_a_folder_whose_index_is_lost_is_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"must have a latents\.json, which says what its shards are of: make it anew"
    ):
        LatentShards.read_index(tmp_path)
