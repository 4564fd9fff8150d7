"""What routing costs in every family: a routed model beside the diffusers model that it routes, at real widths.

Both models of a pair share their weights and take turns in one process, so that a drift of the machine's speed hits
both. Widths and resolutions are those of published models; depths are cut to a few blocks, which does not flatter
routing, as its cost is per block. A train step is forward, backward and SGD. Prints JSON with the ratios of routed to
plain time.

    python examples/benchmarks/benchmark_routing_overhead.py --families unet_2d sd3 --repeats 15
    python examples/benchmarks/benchmark_routing_overhead.py --compile
"""

import argparse
import gc
import json
import sys
from functools import partial

import diffusers
import torch
from measuring import CLOCKS, compare, environment, seconds_by_turns

import diffusers_dtr
from diffusers_dtr.ranges import COUNT, WHOLE
from diffusers_dtr.user_errors import run_script


def unet_2d(batch):
    """All of google/ddpm-cifar10-32."""
    config = {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
    }
    return "UNet2DModel", config, {"sample": torch.randn(batch, 3, 32, 32)}


def unet_2d_condition(batch):
    """Stable Diffusion 1.5, with one layer per block in place of two."""
    config = {"sample_size": 64, "cross_attention_dim": 768, "layers_per_block": 1}
    inputs = {"sample": torch.randn(batch, 4, 64, 64), "encoder_hidden_states": torch.randn(batch, 77, 768)}
    return "UNet2DConditionModel", config, inputs


def pixart(batch):
    """PixArt-α at 512 pixels, with 4 blocks in place of 28."""
    config = {"sample_size": 64, "num_layers": 4, "caption_channels": 4096}
    inputs = {
        "hidden_states": torch.randn(batch, 4, 64, 64),
        "encoder_hidden_states": torch.randn(batch, 120, 4096),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return "PixArtTransformer2DModel", config, inputs


def sd3(batch):
    """Stable Diffusion 3 medium at 512 pixels, with 3 blocks in place of 24."""
    config = {"num_layers": 3, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    inputs = {
        "hidden_states": torch.randn(batch, 16, 64, 64),
        "encoder_hidden_states": torch.randn(batch, 154, 4096),
        "pooled_projections": torch.randn(batch, 2048),
    }
    return "SD3Transformer2DModel", config, inputs


def flux(batch):
    """Flux.1 at 512 pixels, with one block of each kind in place of 19 and 38."""
    inputs = {
        "hidden_states": torch.randn(batch, 1024, 64),
        "encoder_hidden_states": torch.randn(batch, 128, 4096),
        "pooled_projections": torch.randn(batch, 768),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(32.0), torch.arange(32.0)),
        "txt_ids": torch.zeros(128, 3),
    }
    return "FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1}, inputs


def qwen_image(batch):
    """Qwen-Image at 512 pixels, with 2 blocks in place of 60."""
    inputs = {
        "hidden_states": torch.randn(batch, 1024, 64),
        "encoder_hidden_states": torch.randn(batch, 128, 3584),
        "encoder_hidden_states_mask": torch.ones(batch, 128, dtype=torch.bool),
        "img_shapes": [[(1, 32, 32)]] * batch,
    }
    return "QwenImageTransformer2DModel", {"num_layers": 2}, inputs


def wan(batch):
    """Wan 2.1 with 14 billion parameters, for 5 frames at 256 pixels, with 2 blocks in place of 40."""
    inputs = {
        "hidden_states": torch.randn(batch, 16, 2, 32, 32),
        "encoder_hidden_states": torch.randn(batch, 128, 4096),
    }
    return "WanTransformer3DModel", {"num_layers": 2}, inputs


FAMILIES = {family.__name__: family for family in (unet_2d, unet_2d_condition, pixart, sd3, flux, qwen_image, wan)}
# What pipelines pass is σ and not σ · 1000.
SIGMA = ("flux", "qwen_image")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--batch_size", type=COUNT, default=2)
    parser.add_argument("--repeats", type=COUNT, default=11, help="Timed runs of each model; medians are reported.")
    parser.add_argument("--warmup", type=WHOLE, default=2, help="Untimed runs of each model first.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="Autocast type.")
    parser.add_argument("--compile", action="store_true", help="Then measure both models compiled, too.")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="Processor time is the steadier one on a CPU that others use."
    )
    return parser.parse_args()


def build(family, args):
    """The two models, and a batch at timesteps as the family's pipelines pass them."""
    torch.manual_seed(0)
    name, config, inputs = FAMILIES[family](args.batch_size)
    with torch.device(args.device):
        plain = getattr(diffusers, name)(**config)
        routed = getattr(diffusers_dtr, f"DTR{name}")(**config)
    routed.load_state_dict(plain.state_dict(), assign=True)
    inputs["timestep"] = torch.linspace(50, 950, args.batch_size) / (1000 if family in SIGMA else 1)
    inputs = {key: value.to(args.device) if torch.is_tensor(value) else value for key, value in inputs.items()}
    return {"routed": routed, "plain": plain}, inputs


def autocast(args):
    return torch.autocast(args.device, dtype=getattr(torch, args.dtype), enabled=args.dtype != "float32")


@torch.no_grad()
def forward(model, call, inputs, args):
    with autocast(args):
        call(**inputs)


def train_step(model, call, inputs, args):
    with autocast(args):
        loss = call(**inputs).sample.square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-6)
    model.zero_grad()


def overhead(models, calls, inputs, args):
    report = {}
    for run in (forward, train_step):
        runs = {name: partial(run, model, calls[name], inputs, args) for name, model in models.items()}
        seconds = seconds_by_turns(runs, args.repeats, args.warmup, args.device, CLOCKS[args.clock])
        report[run.__name__] = compare(seconds)
    return report


def measure_family(family, args):
    models, inputs = build(family, args)
    report = {
        "model": FAMILIES[family].__doc__,
        "parameters": sum(parameter.numel() for parameter in models["plain"].parameters()),
        "eager": overhead(models, models, inputs, args),
    }
    if args.compile:
        calls = {name: torch.compile(model, fullgraph=True) for name, model in models.items()}
        report["compiled"] = overhead(models, calls, inputs, args)
        torch.compiler.reset()
    return report


def main():
    args = parse_args()
    report = {
        "command": vars(args),
        **environment(args.device),
        "families": {},
    }
    for family in args.families:
        report["families"][family] = measure_family(family, args)
        print(f"{family} is measured", file=sys.stderr)
        gc.collect()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main)
