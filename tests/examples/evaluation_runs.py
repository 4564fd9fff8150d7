"""Tiny evaluations: data, a network and pipelines, and the command's flags."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    UNet2DModel,
)
from text_to_image_runs import FAMILIES, make_captioned_images
from tiny_autoencoders import tiny_vae
from tiny_dit import plain_dit, with_random_weights
from torch import nn
from training_runs import EXAMPLES, NUM_CLASSES, load_script, make_images, run_main

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel


SCRIPT = EXAMPLES / "evaluation" / "evaluate.py"


class Colours(nn.Module):
    """A network of six features and three logits."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.float().flatten(2) / 255
        features = torch.cat([pixels.mean(2), pixels.std(2)], 1)
        return features, 5 * features[:, :3]


def tiny_unet(**config) -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    unet = UNet2DModel(8, **blocks, layers_per_block=1, norm_num_groups=2, add_attention=False, **config)
    return with_random_weights(unet)


def evaluation_folder(tmp_path_factory) -> Path:
    """Data, a network and pipelines, which tests leave as they are."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_images(folder / "images")
    make_images(folder / "held out", count=9)
    make_captioned_images(folder / "captioned")
    torch.jit.script(Colours()).save(folder / "colours.pt")
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "patch_size": 4}
    dit = with_random_weights(DTRTransformer2DModel(**config, sample_size=8, num_embeds_ada_norm=NUM_CLASSES))
    names = dict(enumerate("abc"))
    DTRPipeline(DDIMScheduler(), transformer=dit, id2label=names).save_pretrained(folder / "labelled")
    DiTPipeline(plain_dit(), tiny_vae(), DDIMScheduler()).save_pretrained(folder / "dit")
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder / "unconditional")
    FAMILIES["sd"].save_plain(folder / "text")
    return folder


def use_small_shards(monkeypatch) -> None:
    """Shards of four samples, so that few samples make several."""
    load_script(SCRIPT)
    monkeypatch.setattr(sys.modules["evaluation_samples"], "SHARD", 4)


def flags(folder: Path, output_dir: Path, *more: object, pipeline: str = "labelled") -> list[str]:
    data = ["--train_data_dir", folder / "images", "--cache_dir", folder / "cache"]
    few = ["--num_samples", 10, "--num_inference_steps", 2, "--batch_size", 4]
    network = ["--feature_extractor", folder / "colours.pt", "--output_dir", output_dir]
    return [str(flag) for flag in ["--pipeline", folder / pipeline, *data, *few, *network, *more]]


def evaluate(argv: list[str]) -> dict:
    output_dir = run_main(load_script(SCRIPT), argv)
    return json.loads((output_dir / "evaluation.json").read_text())


def samples(output_dir: Path) -> np.ndarray:
    return np.concatenate([np.load(path)["images"] for path in sorted((output_dir / "samples").iterdir())])
