"""`diffusers-dtr inspect`: what is said of folders, checkpoints and repositories, and that no weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from huggingface_hub import HfApi, constants
from PIL import Image
from safetensors.torch import save_file
from tiny_autoencoders import tiny_vae
from tiny_dit import plain_dit, routed_dit

from diffusers_dtr import DTRPipeline, DTRUNet2DModel, mark_routed
from diffusers_dtr.cli import main


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def dit():
    return routed_dit(routing_alpha=2.0, routing_beta=0.5, routing_timestep_range=(0, 499))


@pytest.fixture
def folder(dit, tmp_path):
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    DTRPipeline(scheduler, transformer=dit, vae=tiny_vae()).save_pretrained(tmp_path)
    return tmp_path


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def described(model, capsys, *arguments):
    assert main(["inspect", str(model), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def shown(model, capsys, *arguments):
    """The printed lines by their first word."""
    assert main(["inspect", str(model), *arguments]) == 0
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_a_pipeline_is_described(folder, dit, capsys):
    scheduler = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
    assert described(folder, capsys) == {
        "pipeline": "DTRPipeline",
        "step": None,
        "denoiser": {
            "class": "DTRTransformer2DModel",
            "folder": "transformer",
            "parameters": num_parameters(dit),
            "dtypes": ["float32"],
            "classes": 5,
            "averaged_beside_it": False,
        },
        "adapters": None,
        "routing": {
            "type": "dtr",
            "alpha": 2.0,
            "beta": 0.5,
            "seed": 0,
            "timestep_range": [0, 499],
            "widths": [{"channels": 16, "active": 8}],
        },
        "clusters": None,
        "scheduler": {"class": "DDIMScheduler", **scheduler},
        "vae": "AutoencoderKL",
    }
    assert shown(folder, capsys) == {
        "pipeline": "DTRPipeline",
        "denoiser": "DTRTransformer2DModel in transformer/",
        "parameters": f"{num_parameters(dit):,} float32",
        "classes": "5",
        "routing": "dtr, alpha=2, beta=0.5, timesteps 0 to 499",
        "active": "8 of 16 channels",
        "scheduler": ", ".join(["DDIMScheduler", *(f"{name}={value}" for name, value in scheduler.items())]),
        "vae": "AutoencoderKL",
    }


@pytest.mark.parametrize(
    ("config", "routing", "active"),
    [
        (None, "none, not a routed model", None),
        ({"routing_type": "none"}, "none, all channels are active", "16 of 16 channels"),
        ({"routing_beta": 1.0}, "dtr, alpha=4, beta=1, timesteps 0 to 999", "16 of 16 channels"),
        ({"routing_type": "random"}, "random, beta=0.8, seed=0, timesteps 0 to 999", "12 of 16 channels"),
    ],
)
def test_every_kind_of_routing_is_named(tmp_path, capsys, config, routing, active):
    model = plain_dit() if config is None else routed_dit(**config)
    model.half().save_pretrained(tmp_path)
    lines = shown(tmp_path, capsys)
    assert (lines["routing"], lines.get("active")) == (routing, active)
    assert lines["parameters"].endswith("float16")
    assert lines.keys().isdisjoint({"pipeline", "scheduler", "vae"})


def make_unet(**config):
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    config |= {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return DTRUNet2DModel(down_block_types=down, up_block_types=up, **config)


def test_a_unet_has_a_window_for_every_width(tmp_path, capsys):
    DTRPipeline(DDPMScheduler(), unet=make_unet(num_class_embeds=3)).save_pretrained(tmp_path)
    description = described(tmp_path, capsys)
    assert (description["denoiser"]["folder"], description["denoiser"]["classes"]) == ("unet", 3)
    widths = {width["channels"]: width["active"] for width in description["routing"]["widths"]}
    # The decoder's blocks see what the encoder hands over beside their own input.
    assert widths == {8: 6, 16: 12, 24: 19, 32: 25}


def test_a_checkpoint_and_the_record_of_a_run_are_read(dit, tmp_path, capsys):
    for name in ("transformer", "transformer_ema"):
        dit.save_pretrained(tmp_path / name)
    (tmp_path / "training_state.json").write_text(json.dumps({"global_step": 20, "settings": {}}))
    clusters = {"num_clusters": 3, "boundaries": [0, 100, 400, 1000]}
    (tmp_path / "training_config.json").write_text(json.dumps({"clusters": clusters, "arguments": {}}))
    lines = shown(tmp_path, capsys)
    assert (lines["step"], lines["averaged"]) == ("20", "transformer_ema/")
    assert lines["clusters"] == "3 of timesteps, bounded by 0, 100, 400, 1000"
    assert described(tmp_path, capsys)["clusters"] == clusters


def test_weights_in_several_files_are_counted_together(dit, tmp_path, capsys):
    dit.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert described(tmp_path, capsys)["denoiser"]["parameters"] == num_parameters(dit)


def test_weights_may_be_missing(folder, capsys):
    (folder / WEIGHTS).unlink()
    assert shown(folder, capsys)["parameters"] == "no safetensors weights"


def test_adapters_of_a_folder_a_checkpoint_and_a_repository_are_described(hub, tmp_path, capsys):
    layers = {"a.lora_A.weight": torch.ones(4, 16), "a.lora_B.weight": torch.ones(8, 4)}
    layers |= {"b.lora.down.weight": torch.ones(2, 16), "b.lora.up.weight": torch.ones(8, 2)}
    save_file(layers, tmp_path / LORA)
    assert shown(tmp_path, capsys) == {
        "adapters": "LoRA of rank 2, 4 for 2 layers",
        "parameters": "144 float32",
        "routing": "none, not a routed model",
    }
    config = {"routing_beta": 0.5, "block_out_channels": [8, 16]}
    model = {"class": "DTRUNet2DConditionModel", "config": config, "routed_widths": [8, 16, 24]}
    record = {"model": model, "arguments": {"pretrained_model_name_or_path": "owner/base"}}
    (tmp_path / "training_config.json").write_text(json.dumps(record))
    lines = shown(tmp_path, capsys)
    assert (lines["of"], lines["for"]) == ("DTRUNet2DConditionModel", "owner/base")
    assert lines["active"] == "4 of 8, 8 of 16, 12 of 24 channels"
    expected = described(tmp_path, capsys)
    assert expected["adapters"]["ranks"] == [2, 4]
    (tmp_path / "unet_lora").mkdir()
    (tmp_path / LORA).rename(tmp_path / "unet_lora" / LORA)
    assert described(tmp_path, capsys) == expected
    HfApi().create_repo("owner/lora")
    HfApi().upload_folder(repo_id="owner/lora", folder_path=tmp_path)
    assert described("owner/lora", capsys) == expected


def test_routed_adapters_are_said_to_be(tmp_path, capsys):
    save_file({"a.lora_A.weight": torch.ones(4, 16), "a.lora_B.weight": torch.ones(8, 4)}, tmp_path / LORA)
    mark_routed(tmp_path / LORA, {"": {"routing_beta": 0.5, "routing_type": "dtr"}})
    lines = shown(tmp_path, capsys)
    assert (lines["adapters"], lines["parameters"]) == ("LoRA of rank 4 for 1 layers", "96 float32")
    assert lines["channels"] == "of the rank are routed: beta=0.5, type=dtr"


def test_masks_are_drawn_for_every_width(tmp_path, capsys):
    make_unet().save_pretrained(tmp_path / "unet")
    described(tmp_path, capsys, "--masks", str(tmp_path / "unet.png"))
    routed_dit().save_pretrained(tmp_path / "transformer")
    assert shown(tmp_path, capsys, "--masks", str(tmp_path / "dit.png"))["masks"] == str(tmp_path / "dit.png")
    four, one = (Image.open(tmp_path / name) for name in ("unet.png", "dit.png"))
    assert four.width > 3 * one.width
    assert len(four.convert("L").getcolors()) > 2


def test_a_repositorys_revision_is_described_by_configs_and_a_part_of_its_weights(hub, folder, capsys, monkeypatch):
    DTRPipeline.from_pretrained(folder).push_to_hub("owner/model", private=True)
    revision = HfApi().model_info("owner/model").sha
    routed_dit(num_layers=1).push_to_hub("owner/model", subfolder="transformer", max_shard_size="5KB")
    expected = described(folder, capsys)
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    assert described("owner/model", capsys, "--token", "hf_owner", "--revision", revision) == expected
    weights = [method for method, path in hub.requests if path.endswith(".safetensors")]
    assert weights == ["GET"], "the header alone is asked for, once"
    assert not [*Path(constants.HF_HUB_CACHE).rglob("*.safetensors")]
    new = described("owner/model", capsys, "--token", "hf_owner")["denoiser"]["parameters"]
    assert new == num_parameters(routed_dit(num_layers=1))
    assert main(["inspect", "owner/model"]) == 2
    assert "hf_" not in capsys.readouterr().err
