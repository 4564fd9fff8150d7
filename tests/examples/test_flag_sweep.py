"""Whatever flags are combined, a run trains and can be loaded, or says within seconds which flag it cannot heed."""

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from test_train_unconditional import UNET
from text_to_image_runs import FAMILIES, make_captioned_images
from tiny_autoencoders import tiny_vae
from training_runs import EXAMPLES, MODEL, arguments, load_script, make_images, reset_accelerate, run_main
from transformers import HfArgumentParser

from diffusers_dtr import load_routed_lora


# Channels follow from the autoencoder.
OF_LATENTS = {name: value for name, value in MODEL.items() if name != "in_channels"}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

COMBINATIONS = 200
SECONDS = 60  # that a refusal may take, on a machine that does other things too
SCRIPTS = {
    name: load_script(EXAMPLES / name / f"train_{name}.py")
    for name in ("class_conditional", "unconditional", "text_to_image")
}

# What is drawn from, beside the choices of flags that have some.
VALUES = {
    "adam_beta1": "0 0.9 0.999",
    "adam_beta2": "0 0.99",
    "adam_epsilon": "1e-30 1e-8 1",
    "adam_weight_decay": "0 0.1 10",
    "aspect_ratio_buckets": "auto 8,8;8,16;16,8 8,24 4,4",
    "balancing_update_every": "1 3",
    "caption_column": "text caption",
    "checkpointing_steps": "1 2 3",
    "checkpoints_total_limit": "1 2",
    "class_dropout_prob": "0 0.1 0.9",
    "dataloader_num_workers": "0 1",
    "ema_inv_gamma": "1e-3 1 1e3",
    "ema_max_decay": "0 0.5 1",
    "ema_power": "0.1 0.75 3",
    "ema_sigma_rel": "0.01 0.1 0.28",
    "gradient_accumulation_steps": "1 2",
    "guidance_scale": "0 3.5",
    "image_column": "image picture",
    "input_perturbation": "0 0.1 2",
    "label_column": "label kind",
    "learning_rate": "0 1e-8 1e-3",
    "logging_dir": "logs elsewhere",
    "logging_steps": "1 2 5",
    "logit_mean": "-5 0 0.5",
    "logit_std": "0.1 1 5",
    "lora_alpha": "1 8",
    "lora_layers": "to_q to_v nothing",
    "lr_num_cycles": "1 3",
    "lr_power": "0.5 2",
    "lr_warmup_steps": "0 1 2 5",
    "max_grad_norm": "0 1e-9 1 1e9",
    "max_held_out_images": "1 3 100",
    "max_sequence_length": "1 8 64 1000",
    "max_train_samples": "1 3 1000",
    "noise_offset": "0 0.1 3",
    "num_classes": "3 1",
    "num_clusters": "1 2 5 40",
    "num_train_epochs": "1 3",
    "num_train_timesteps": "1 2 10 40 1000 2000",
    "num_validation_images": "1 2 5",
    "proportion_empty_prompts": "0 0.5 1",
    "rank": "1 2 100",
    "resolution": "1 4 7 8 12 16",
    "routing_alpha": "0.01 4 100",
    "routing_beta": "0.001 0.3 0.8 1",
    "routing_seed": "0 4294967295",
    "routing_timestep_range": ["0 999", "200 800", "10 10", "900 100", "-5 2000"],
    "routing_warmup_steps": "0 1 2 3",
    "seed": "0 9223372036854775807",
    "shuffle_buffer_size": "1 8",
    "snr_gamma": "1e-3 5 100",
    "tracker_project_name": "mine",
    "train_batch_size": "1 2 3 8 64",
    "train_cluster": "0 1 7 8",
    "train_split": "train test",
    "validation_epochs": "1 3",
    "validation_guidance_scale": "0 1 3",
    "validation_num_inference_steps": "1 2 3 20",
    "validation_prompts": ["one", "a number"],
    "validation_split": "train test",
    "validation_steps": "1 2",
    "variant": "fp16",
}
# What most flags of these names are drawn with, because alone they have no effect.
COMPANIONS = {
    flag: companions
    for companions, flags in {
        "--balancing pcgrad --num_clusters 2": "balancing_update_every",
        "--center_crop": "cache_latents",
        "--use_ema": "ema_inv_gamma ema_max_decay ema_power ema_type offload_ema",
        "--use_ema --ema_type power": "ema_sigma_rel",
        "--timestep_sampling logit_normal": "logit_mean logit_std",
        "--rank 2": "lora_alpha lora_layers quantize route_lora",
        "--lr_scheduler cosine_with_restarts": "lr_num_cycles",
        "--lr_scheduler polynomial": "lr_power",
        "--lr_scheduler cosine": "lr_warmup_steps",
        "--routing_type random": "routing_seed",
        "--loss_weighting min_snr": "snr_gamma",
        "--report_to tensorboard": "tracker_project_name",
    }.items()
    for flag in flags.split()
}
# What runs of this test are given anyway, need a network, or take minutes on a CPU.
LEFT_OUT = frozenset(
    re.findall(
        r"\w+",
        """
        help config pretrained_model_name_or_path
        model_config unet_config transformer_config denoiser_config model_preset
        revision dataset_name dataset_config_name train_data_dir validation_data_dir latents_dir cache_dir
        output_dir max_train_steps resume_from_checkpoint allow_changed_settings affinity_path compile push_to_hub
        hub_model_id hub_token hub_private_repo hub_revision hub_create_pr hub_strategy vae_name_or_path
        """,
    )
)


class _Parsed(Exception):
    """Carries a parser out of the script that would have parsed with it."""


def parser_of(script) -> argparse.ArgumentParser:
    def capture(parser, *arguments, **options):
        raise _Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfArgumentParser, "parse_known_args", capture)
        with pytest.raises(_Parsed) as parsed:
            script.parse_args([])
    return parsed.value.args[0]


def flags_of(script) -> list[argparse.Action]:
    return [action for action in parser_of(script)._actions if action.dest not in LEFT_OUT]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_takes_part(name):
    flags = [action for action in flags_of(SCRIPTS[name]) if action.nargs not in (0, "?") and action.choices is None]
    assert [action.dest for action in flags if action.dest not in VALUES] == []


class Sweep:
    """Data and pretrained pipelines, and combinations of flags for them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = {
            name: make_captioned_images(folder / name) if name == "text_to_image" else make_images(folder / name)
            for name in SCRIPTS
        }
        self.vae = folder / "vae"
        tiny_vae().save_pretrained(self.vae)
        self.routed = {name: self.pretrain(name) for name in ("class_conditional", "unconditional")}
        self.families = {name: family.save_plain(folder / f"base-{name}") for name, family in FAMILIES.items()}

    def pretrain(self, name: str) -> list[str]:
        """Flags to fine-tune a pipeline of this kind."""
        config = ["--model_config", MODEL] if name == "class_conditional" else ["--unet_config", UNET]
        run_main(SCRIPTS[name], arguments(self.images[name], self.folder / f"base-{name}", source=config))
        return ["--pretrained_model_name_or_path", str(self.folder / f"base-{name}")]

    def sources(self, name: str) -> list[list[str]]:
        vae = ["--vae_name_or_path", str(self.vae)]
        small = ["--resolution", "8"]
        if name == "class_conditional":
            scratch = ["--model_config", json.dumps(MODEL), *small]
            latents = ["--model_config", json.dumps(OF_LATENTS), *vae, "--resolution", "16"]
            return [scratch, latents, [*self.routed[name], *small]]
        if name == "unconditional":
            unet, transformer = ["--unet_config", json.dumps(UNET)], ["--transformer_config", json.dumps(MODEL)]
            return [
                [*unet, *small],
                [*transformer, *small],
                ["--transformer_config", json.dumps(OF_LATENTS), *vae, "--resolution", "16"],
                [*self.routed[name], *small],
            ]
        return [
            ["--pretrained_model_name_or_path", str(base), *small, *map(str, FAMILIES[family].flags)]
            for family, base in self.families.items()
        ]

    def draw(self, number: int) -> tuple[str, list[str]]:
        """A script, and flags that it may or may not be able to heed."""
        draw = random.Random(number)
        name = draw.choice(list(SCRIPTS))
        argv = list(draw.choice(self.sources(name)))
        argv += ["--train_data_dir", str(self.images[name]), "--cache_dir", str(self.folder / "cache")]
        argv += ["--train_batch_size", "4", "--max_train_steps", "2", "--report_to", "none"]
        argv += ["--num_validation_images", "2", "--validation_num_inference_steps", "2"]
        if draw.random() < 0.3:
            argv += ["--validation_data_dir", str(self.images[name])]
        flags = flags_of(SCRIPTS[name])
        for action in draw.sample(flags, draw.randint(1, 7)):
            if draw.random() < 0.8:
                argv += COMPANIONS.get(action.dest, "").split()
            argv.append(action.option_strings[0])
            if action.nargs not in (0, "?"):
                values = action.choices or VALUES[action.dest]
                argv += str(draw.choice(values.split() if isinstance(values, str) else list(values))).split()
        return name, argv


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Sweep:
    return Sweep(tmp_path_factory.mktemp("sweep"))


def refusal(name: str, argv: list[str]) -> str | None:
    """What the script says against these flags, or None after it has trained."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            args = SCRIPTS[name].parse_args(argv)
        SCRIPTS[name].main(args)
    except SystemExit:
        return stderr.getvalue().rpartition("error: ")[2]
    except (ValueError, ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        reset_accelerate()
    return None


def names_a_flag(message: str, name: str) -> bool:
    flags = {option for action in parser_of(SCRIPTS[name])._actions for option in action.option_strings}
    named = {f"--{word.lstrip('-')}" for word in re.findall(r"--\w+|`\w+`", message.replace("`--", "--"))}
    return bool(flags & {word.replace("`", "") for word in named})


def assert_loads(name: str, argv: list[str], output_dir: Path) -> None:
    """The result is there whole, and finite."""
    if "--rank" in argv:
        pipeline = DiffusionPipeline.from_pretrained(argv[argv.index("--pretrained_model_name_or_path") + 1])
        # PixArt's pipelines take no adapters, its denoiser does.
        load_routed_lora(pipeline if hasattr(pipeline, "load_lora_weights") else pipeline.transformer, output_dir)
    else:
        DiffusionPipeline.from_pretrained(output_dir)
    files = [*output_dir.glob("*.safetensors"), *output_dir.glob("*/diffusion_pytorch_model.safetensors")]
    assert files
    tensors = (tensor for file in files for tensor in load_file(file).values())
    assert all(tensor.isfinite().all() for tensor in tensors if torch.is_floating_point(tensor))


@pytest.mark.parametrize("number", range(COMBINATIONS))
def test_a_run_trains_and_can_be_loaded_or_names_the_flag_that_it_cannot_heed(number, sweep, tmp_path):
    name, argv = sweep.draw(number)
    argv += ["--output_dir", str(tmp_path / "run")]
    print(f"train_{name}.py", *argv)
    start = time.monotonic()
    message = refusal(name, argv)
    if message is None:
        assert_loads(name, argv, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    else:
        print(message)
        assert names_a_flag(message, name), message
        assert time.monotonic() - start < SECONDS
