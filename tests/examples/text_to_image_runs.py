"""Tiny text-to-image training runs, from a pipeline of every family with real components and random weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from safetensors.torch import load_file
from training_runs import EXAMPLES, arguments, load_script, run_main


sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_models import PIXART, SD3, UNET_CONDITION, Family
from tiny_text_encoders import pixart_alpha, stable_diffusion, stable_diffusion_3


SCRIPT = EXAMPLES / "text_to_image" / "train_text_to_image.py"


@dataclass(frozen=True)
class TextToImage:
    """One family of the script."""

    family: Family
    denoiser: str
    pipeline: Callable[[ModelMixin], DiffusionPipeline]
    # What makes runs of this family short.
    flags: tuple = ()

    def save_plain(self, folder: Path) -> Path:
        """A pipeline as diffusers has it."""
        self.pipeline(self.family.plain()).save_pretrained(folder)
        return folder

    def save_routed(self, folder: Path, **config) -> Path:
        self.pipeline(self.family.routed(**config)).save_pretrained(folder)
        return folder


FAMILIES = {
    "sd": TextToImage(UNET_CONDITION, "unet", stable_diffusion),
    "pixart": TextToImage(PIXART, "transformer", pixart_alpha, ("--max_sequence_length", 16)),
    "sd3": TextToImage(SD3, "transformer", stable_diffusion_3, ("--max_sequence_length", 8)),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def make_captioned_images(folder: Path, count: int = 8) -> Path:
    """Noisy images, 8 high and 12 wide, with one or two captions each."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        pixels = random.integers(20 * number, 20 * number + 100, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        words = ["one", "two", "three", "four"][number % 4]
        captions = [f"number {words}", f"a {words}"][: 1 + number % 2]
        lines.append(json.dumps({"file_name": f"{number}.png", "text": captions}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def train(name: str, images: Path, output_dir: Path, pipeline: Path, *flags: object) -> Path:
    """Runs the script in this process."""
    source = ("--pretrained_model_name_or_path", pipeline, *FAMILIES[name].flags)
    return run_main(load_script(SCRIPT), arguments(images, output_dir, *flags, source=source))


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the result, and of the last checkpoint."""
    files = [run / "pytorch_lora_weights.safetensors", *run.glob("*/diffusion_pytorch_model.safetensors")]
    files += (run / "checkpoint-4").rglob("*.safetensors")
    tensors = {}
    for file in filter(Path.exists, files):
        tensors |= {f"{file.relative_to(run)}/{key}": value for key, value in load_file(file).items()}
    return tensors
