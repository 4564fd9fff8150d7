"""What cannot be done is one line on stderr and exit code 2, and leaves every file as it was."""

from __future__ import annotations

import json
from contextlib import suppress
from shutil import copytree

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import constants
from original_checkpoints import Reference
from safetensors.torch import save_file
from tiny_autoencoders import tiny_vae
from tiny_dit import plain_dit, routed_dit

from diffusers_dtr import DTRPipeline
from diffusers_dtr.cli import main
from diffusers_dtr.conversion import original_dit_state_dict


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what the command lines below name."""
    world = tmp_path_factory.mktemp("world")
    model = routed_dit(in_channels=3, out_channels=3)
    pipeline = DTRPipeline(DDIMScheduler(), transformer=model, id2label={0: "1", 1: "cat, tabby"})
    pipeline.save_pretrained(world / "dit")
    for name in ("no_index", "no_header", "no_weights", "elsewhere"):
        copytree(world / "dit", world / name)
    (world / "no_weights" / WEIGHTS).unlink()
    (world / "no_index/model_index.json").write_text("[]")
    (world / "no_header" / WEIGHTS).write_text("no")
    index = {"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}
    (world / "elsewhere" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    plain_dit().save_pretrained(world / "plain")
    routed_dit(routing_type="random").save_pretrained(world / "random")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(8, **blocks, layers_per_block=1, norm_num_groups=4)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(world / "unet")
    for name, channels in (("vae", 4), ("wide", 16)):
        tiny_vae(latent_channels=channels).save_pretrained(world / name)
    for name in ("empty", "lora", "sd"):
        (world / name).mkdir()
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, world / "lora" / "pytorch_lora_weights.safetensors")
    index = {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}
    (world / "sd/model_index.json").write_text(json.dumps(index))
    masked = Reference().with_masks()
    torch.save(masked, world / "masked.pt")
    torch.save({"ema": masked, "model": masked}, world / "run.pt")
    imagenet = routed_dit(norm_eps=1e-6, freq_shift=0, num_embeds_ada_norm=1000)
    torch.save(original_dit_state_dict(imagenet), world / "imagenet.pt")
    texts = {"mine.png": "mine", "ten.json": '{"10": "ten"}', "list.json": '["zero"]', "one.json": '{"0": 1}'}
    for name, text in texts.items():
        (world / name).write_text(text)
    return world


def contents(world):
    return {path: path.read_bytes() if path.is_file() else None for path in world.rglob("*")}


PIXELS = "--num_attention_heads 4 --no_vae"
KNOWN = f"{PIXELS} --noise_schedule linear"
IMAGENET = "convert imagenet.pt new --num_attention_heads 2 --noise_schedule linear"
MISTAKES = {
    "card owner/digits": "give `--output FOLDER` or `--push`",
    "card dit --push": "`--hub_model_id owner/name`",
    "card dit/transformer": "must hold one of model_index.json",
    "card dit --push --hub_model_id owner/typo": "owner/typo",
    "convert missing.pt new": "There is no file 'missing.pt'.",
    "convert run.pt new.pt --to_original": "`--to_original` takes a pipeline",
    f"convert run.pt new {KNOWN} --routing_beta 0.3": "checkpoint's masks",
    f"convert run.pt unet {KNOWN}": "'unet' exists already and is not",
    f"convert run.pt new {PIXELS}": "`--noise_schedule` must be given",
    f"convert masked.pt new {PIXELS}": "`--noise_schedule` must be given",
    "convert dit run.pt --to_original": "'run.pt' exists already",
    "convert dit new --num_attention_heads 4 --no_vae": "`--no_vae` would have no effect for a pipeline",
    "convert dit new.pt --to_original --routing_beta 0.5": "would have no effect for --to_original",
    "convert run.pt new --revision main": "`--revision` would have no effect for a file",
    "convert unet new": "whose `transformer` is a DiT of diffusers or ours, got none",
    "convert dit new.txt --to_original": "The output must end in `.pt`, got 'new.txt'",
    f"convert run.pt new {KNOWN} --labels ten.json": "`--labels` must be names of classes below 10",
    f"convert run.pt new {KNOWN} --labels one.json": "`--labels` must be names of classes below 10",
    f"convert run.pt new {KNOWN} --labels list.json": "`--labels list.json` must hold a JSON object, got list",
    f"convert run.pt new {KNOWN} --labels unet": "`--labels` must be a pipeline with names of classes",
    f"{IMAGENET} --vae_name_or_path vae": "The names of the classes in facebook/DiT-XL-2-256 could not be loaded ... "
    "Give `--labels` a JSON file or a pipeline that has them, or `--no_labels`.",
    f"{IMAGENET} --no_labels": "The autoencoder stabilityai/sd-vae-ft-ema could not be loaded ... "
    "Give `--vae_name_or_path` its folder or repository, or `--no_vae`",
    f"{IMAGENET} --no_labels --vae_name_or_path wide": "an autoencoder with 4 latent channels ... but wide has 16",
    "inspect empty": "There is no diffusers model",
    "inspect no_index": "must hold a JSON object, got list",
    "inspect no_header": "header",
    "inspect elsewhere": "must name files beside it, got '../vae/diffusion_pytorch_model.safetensors'",
    "inspect dit --revision main": "`revision` must be left out for a folder",
    "inspect ./my-modle": "There is no folder './my-modle', and no repository",
    "inspect dit --masks mine.png": "'mine.png' exists already",
    "inspect random --masks new.png": "`--masks` shows routing of type",
    "inspect plain --masks new.png": "`--masks` shows routing of type",
    "sample plain": "`diffusers-dtr inspect` says what it is",
    "sample lora": "`load_lora_weights`",
    "sample sd": "got a StableDiffusionPipeline ... diffusers.StableDiffusionPipeline.from_pretrained('sd')",
    "sample unet --labels 1": "`--labels` must be left out",
    # Labels are checked before weights are loaded.
    "sample no_weights --labels dog": "`--labels` has no class named 'dog'. Known names: 1, cat",
    "sample no_weights --labels 5": "`--labels` must be names of classes or numbers in [0, 4], got 5.",
    "sample no_weights --labels=-1": "no class named '-1'",
    "sample dit --height 9": "`height` must be a multiple of",
    "sample dit --width 9": "`width` must be a multiple of",
    "sample dit --guidance_scale 2": "`guidance_scale`=2.0, which is above 1, needs `--labels`",
    "sample dit --output grid.jpeg": "The output must end in `.png`, got 'grid.jpeg'.",
    "sample dit --output mine.png": "'mine.png' exists already",
    "sample dit --scheduler DDPMPipeline": "must be a scheduler of diffusers ... got 'DDPMPipeline'",
    "sample dit --scheduler utils": "must be a scheduler of diffusers, such as DDIMScheduler, got 'utils'",
    "sample dit --device cuda:99": "must be a device of this machine, such as cpu, got 'cuda:99'",
    "sample dit --device nonsense": "must be a device of this machine, such as cpu, got 'nonsense'",
}


@pytest.mark.parametrize("command_line", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(hub, world, monkeypatch, capsys, command_line):
    monkeypatch.chdir(world)
    before = contents(world)
    command, *arguments = command_line.split()
    with suppress(SystemExit):
        assert main([command, *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"diffusers-dtr {command}: ")
    assert all(part in last for part in MISTAKES[command_line].split(" ... "))
    assert contents(world) == before


def test_a_name_that_is_no_folder_is_told_from_one_that_cannot_be_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["inspect", "my-modle"]) == 2
    assert "There is no folder 'my-modle', and the Hub cannot be asked" in capsys.readouterr().err
