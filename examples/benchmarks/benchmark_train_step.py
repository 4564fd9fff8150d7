"""What routing costs: a train step of DTRTransformer2DModel beside one of diffusers' DiTTransformer2DModel.

Both models have the same shape and take turns in one process, so that a drift of the machine's speed hits both. A step
is forward, backward, AdamW and the update of diffusers' EMAModel. Prints JSON.

    python examples/benchmarks/benchmark_train_step.py --preset DiT-S/4 --batch_size 16 --repeats 9
"""

import argparse
import json
from functools import partial

import torch
from diffusers import DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from measuring import compare, environment, seconds_by_turns

from diffusers_dtr import DTRTransformer2DModel
from diffusers_dtr.ranges import COUNT, WHOLE
from diffusers_dtr.user_errors import run_script


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="DiT-S/4", help="A size that DTRTransformer2DModel.from_preset knows.")
    parser.add_argument("--batch_size", type=COUNT, default=16)
    parser.add_argument("--repeats", type=COUNT, default=9, help="Timed steps of each model; the median is reported.")
    parser.add_argument("--warmup", type=WHOLE, default=2, help="Untimed steps of each model first.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="Autocast type.")
    parser.add_argument("--compile", action="store_true", help="Compile both models.")
    return parser.parse_args()


def build(model_class, config, device, compile_model):
    model = model_class.from_config(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    ema = EMAModel(model.parameters(), foreach=True)
    forward = torch.compile(model, fullgraph=True) if compile_model else model
    return model, forward, optimizer, ema


def train_step(model, forward, optimizer, ema, batch, dtype):
    sample, timestep, class_labels, noise = batch
    with torch.autocast(sample.device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
        output = forward(sample, timestep, class_labels).sample
    loss = torch.nn.functional.mse_loss(output.float()[:, : noise.shape[1]], noise)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.step(model.parameters())


def main():
    args = parse_args()
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = dict(DTRTransformer2DModel.from_preset(args.preset).config)
    plain_config = {key: value for key, value in config.items() if not key.startswith("routing_")}
    subjects = {
        "routed": build(DTRTransformer2DModel, config, device, args.compile),
        "diffusers": build(DiTTransformer2DModel, plain_config, device, args.compile),
    }
    shape = (args.batch_size, config["in_channels"], config["sample_size"], config["sample_size"])
    batch = [
        torch.randn(shape, generator=generator),
        torch.randint(1000, (args.batch_size,), generator=generator),
        torch.randint(config["num_embeds_ada_norm"], (args.batch_size,), generator=generator),
        torch.randn(shape, generator=generator),
    ]
    batch = [tensor.to(device) for tensor in batch]

    steps = {name: partial(train_step, *subject, batch, args.dtype) for name, subject in subjects.items()}
    seconds = seconds_by_turns(steps, args.repeats, args.warmup, device)
    report = {
        "command": vars(args),
        **environment(device),
        "parameters": {name: sum(p.numel() for p in subject[0].parameters()) for name, subject in subjects.items()},
        **compare(seconds),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main)
