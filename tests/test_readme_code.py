"""What the READMEs say to type: Python runs, and commands name scripts and flags that there are."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from tiny_dit import routed_dit
from torch import nn

from diffusers_dtr import DenoisingLoss, DTRPipeline, TimestepClusters
from diffusers_dtr.cli import main as cli


sys.path.append(str(Path(__file__).parent / "models"))
sys.path.append(str(Path(__file__).parent / "examples"))

from tiny_models import PIXART, SD3, UNET, UNET_CONDITION
from tiny_pipelines import PIPELINES
from tiny_text_encoders import pixart_alpha, stable_diffusion, stable_diffusion_3
from training_runs import load_script, make_images, reset_accelerate

from diffusers_dtr.training.config import LoraConfig, RoutingConfig
from diffusers_dtr.training.lora import add_lora, save_lora


ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("examples/*/README.md"))]


def blocks(language: str) -> list:
    """The blocks of code of a language, with the name of their README's folder and their number in it."""
    found = []
    for path in READMES:
        texts = re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        name = "" if path.parent == ROOT else path.parent.name
        found += [
            pytest.param((name, number), text, id=f"{name or 'README'}-{number}") for number, text in enumerate(texts)
        ]
    return found


# ---- Python: what a block finds in its folder, and the names that the text before it has


def class_conditional_demo() -> None:
    names = {number: str(number) for number in range(10)}
    denoiser = routed_dit(num_embeds_ada_norm=10, in_channels=1, out_channels=1)
    DTRPipeline(DDIMScheduler(), transformer=denoiser, id2label=names).save_pretrained("demo/pipeline")


def image_folder() -> None:
    make_images(Path("images"), count=6)


def any_denoiser() -> None:
    pixart_alpha(PIXART.plain()).save_pretrained("Qwen/Qwen-Image")


class PaintBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, text, x):
        return text, x + self.linear(x)


class PaintModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, hidden_size: int = 16):
        super().__init__()
        self.layers = nn.ModuleList([PaintBlock(hidden_size)])

    def forward(self, x, t):
        for layer in self.layers:
            _, x = layer("text", x=x)
        return x


def declared_model() -> dict:
    return {"PaintModel": PaintModel, "__name__": __name__}


def loop() -> dict:
    model = UNET.routed(num_class_embeds=None)
    loader = [torch.randn(8, *UNET.inputs()["sample"].shape[1:])]
    return {"torch": torch, "model": model, "loader": loader, "generator": None, "noise_scheduler": DDPMScheduler()}


def affinity() -> dict:
    clean, noise = torch.randn(2, 4, 4, 8, 8)
    parts = {"model": routed_dit(), "labels": torch.tensor([0, 1, 0, 1]), "noise_scheduler": DDPMScheduler()}
    return {"clean": clean, "noise": noise, **parts}


def negative_transfer() -> dict:
    scheduler = DDPMScheduler()
    latents, embeddings = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    clusters = TimestepClusters([0, 990, 992, 996, 1000])
    specialists, joints = ([UNET_CONDITION.routed() for _ in range(2)] for _ in range(2))
    return {
        **{"torch": torch, "latents": latents, "embeddings": embeddings, "clusters": clusters},
        **{"specialists": specialists, "joints": joints, "DenoisingLoss": DenoisingLoss, "noise_scheduler": scheduler},
    }


def fine_tuned() -> None:
    stable_diffusion(UNET_CONDITION.routed()).save_pretrained("sd-dtr")


def adapters() -> None:
    base = stable_diffusion(UNET_CONDITION.plain())
    base.save_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    unet = UNET_CONDITION.conversion(base.unet, routing_beta=0.5)
    add_lora(unet, LoraConfig(rank=2), RoutingConfig(), ("to_q",))
    base.unet = unet
    base.scheduler = type(base.scheduler).from_config(base.scheduler.config, prediction_type="v_prediction")
    save_lora(base, "unet", "sd-dtr-lora")
    config = {name: value for name, value in unet.config.items() if name.startswith("routing_")}
    Path("sd-dtr-lora/training_config.json").write_text(json.dumps({"model": {"config": config}}))


def routed_adapters() -> None:
    pipeline = stable_diffusion(UNET_CONDITION.plain())
    pipeline.save_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    routing = RoutingConfig(routing_alpha=2.0, routing_beta=0.5)
    add_lora(pipeline.unet, LoraConfig(rank=2, route_lora=True), routing, ("to_q",))
    save_lora(pipeline, "unet", "sd-routed-lora")


def video_adapters() -> None:
    base = PIPELINES["wan"].pipeline()
    base.save_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    add_lora(base.transformer, LoraConfig(rank=2), RoutingConfig(), ("to_q",))
    save_lora(base, "transformer", "wan-dtr-lora")
    config = {"model": {"config": {"routing_beta": 0.5, "num_layers": 1}}}
    Path("wan-dtr-lora/training_config.json").write_text(json.dumps(config))


def text_to_image_digits() -> None:
    stable_diffusion(UNET_CONDITION.routed()).save_pretrained("digits-sd/run")
    pixart_alpha(PIXART.routed()).save_pretrained("digits-pixart/run")
    stable_diffusion_3(SD3.routed()).save_pretrained("digits-sd3/run")


def unconditional_digits() -> None:
    DTRPipeline(DDIMScheduler(), unet=UNET.routed(num_class_embeds=None)).save_pretrained("unconditional-digits")


PREPARE: dict[tuple[str, int], Callable[[], dict | None]] = {
    ("", 0): any_denoiser,
    ("", 1): dict,
    ("", 2): declared_model,
    ("", 3): loop,
    ("", 4): image_folder,
    ("", 5): class_conditional_demo,
    ("analysis", 0): affinity,
    ("analysis", 1): negative_transfer,
    ("text_to_image", 0): fine_tuned,
    ("text_to_image", 1): adapters,
    ("text_to_image", 2): routed_adapters,
    ("text_to_image", 3): text_to_image_digits,
    ("text_to_video", 0): video_adapters,
    ("unconditional", 0): unconditional_digits,
}
# The same in less time.
SMALLER = {
    "train_batch_size=64, max_train_steps=20_000": "train_batch_size=2, max_train_steps=2",
    "resolution=32": "resolution=8",
    '"DiT-S/4", **size': '"DiT-S/8", **{**size, "sample_size": 8}',
    '"DiT-B/2"': '"DiT-S/8"',
    "timesteps=100": "timesteps=9",
}


@pytest.mark.parametrize(("place", "code"), blocks("python"))
def test_python_of_the_readmes_runs(place, code, tmp_path, monkeypatch):
    assert place in PREPARE, f"say in {__file__} what this block needs"
    monkeypatch.chdir(tmp_path)
    names = PREPARE[place]() or {}
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    try:
        exec(code, names)
    finally:
        reset_accelerate()
    pipe = names.get("pipe")
    if place == ("text_to_image", 1):
        assert pipe.scheduler.config.prediction_type == "v_prediction"
    if place == ("text_to_image", 2):
        assert pipe.unet.routed_adapters
    if place in (("text_to_image", 1), ("text_to_video", 0)):
        denoiser = pipe.unet if place[0] == "text_to_image" else pipe.transformer
        assert denoiser.config.routing_beta == 0.5
        assert pipe.get_active_adapters()


# ---- commands


def commands(text: str) -> list[list[str]]:
    found, command = [], ""
    for line in text.replace("\\\n", " ").split("\n"):
        command += f"{line} "
        with contextlib.suppress(ValueError):  # else a quoted argument goes on
            found.append(shlex.split(command, comments=True))
            command = ""
    return found


def printed_by(action: Callable[[], object]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        action()
    return printed.getvalue()


@cache
def help_of(name: str) -> str:
    """What a script or a command says of its flags."""
    if not name.endswith(".py"):
        return printed_by(lambda: cli([name, "--help"]))
    (path,) = ROOT.glob(f"examples/*/{name}")
    source = path.read_text(encoding="utf-8")
    if "def parse_args(argv" not in source:
        return source
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        return printed_by(lambda: load_script(path).parse_args(["--help"]))


@pytest.mark.parametrize(("place", "text"), blocks("bash"))
def test_commands_of_the_readmes_name_flags_that_there_are(place, text):
    for words in commands(text):
        scripts = [number for number, word in enumerate(words) if word.endswith(".py")]
        if scripts:
            said, flags = help_of(Path(words[scripts[0]]).name), words[scripts[0] + 1 :]
            flags = flags[: flags.index("--")] if "--" in flags else flags
        elif words[:1] == ["train"]:
            said, flags = help_of("train_text_to_image.py"), words[1:]
        elif words[:1] == ["diffusers-dtr"]:
            said, flags = help_of(words[1]), words[2:]
        else:
            continue
        unknown = [flag for flag in flags if flag.startswith("--") and not re.search(rf"{flag}\b", said)]
        assert unknown == [], words


ON_THE_HUB = {"facebook/DiT-XL-2-256", "stable-diffusion-v1-5/stable-diffusion-v1-5", "google/ddpm-cifar10-32"}
ON_THE_HUB |= {"stabilityai/sd-vae-ft-ema", "Qwen/Qwen-Image", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}
ON_THE_HUB |= {"PixArt-alpha/PixArt-XL-2-1024-MS"}


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_models_of_a_folder_are_not_written_like_repositories(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(
        r"(?:pretrained\(\"|model_name_or_path |vae_name_or_path |--pipeline |diffusers-dtr \w+ )([^\s\"]+)", text
    )
    named = {name for name in named if not re.match(r"\./|path/to/|owner/|user/|-|\"", name) and "/" in name}
    assert named <= ON_THE_HUB
