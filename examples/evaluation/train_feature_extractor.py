r"""Train a small classifier whose features `evaluate.py` can compare images with, where no other network is at hand.

It is saved as TorchScript with its accuracy on held-out images. Its distances can be compared with those of the same
file only, never with published FIDs.

    python train_feature_extractor.py --dataset_name path/to/cifar10 --label_column label --validation_split test \
        --random_flip --output cifar10-features.pt
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from evaluation_data import add_data_arguments, data_config, read_images
from torch import nn

from diffusers_dtr import training
from diffusers_dtr.ranges import COUNT, NON_NEGATIVE, SEED, Range
from diffusers_dtr.run_record import public_command
from diffusers_dtr.user_errors import run_script


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--output", required=True, help="TorchScript file to write.")
    parser.add_argument(
        "--resolution", type=Range("[8, inf)", int), default=32, help="Side of the images. Default: %(default)s."
    )
    parser.add_argument("--random_flip", action="store_true", help="Mirror half of the images.")
    parser.add_argument("--width", type=COUNT, default=32, help="Channels of the first layer. Default: %(default)s.")
    parser.add_argument("--num_train_epochs", type=COUNT, default=16, help="Default: %(default)s.")
    parser.add_argument("--batch_size", type=COUNT, default=128, help="Default: %(default)s.")
    parser.add_argument("--learning_rate", type=NON_NEGATIVE, default=0.2, help="Peak of SGD. Default: %(default)s.")
    parser.add_argument("--seed", type=SEED, default=0)
    return parser.parse_args(argv)


class Classifier(nn.Module):
    """A residual network for small images: uint8 `(n, 3, side, side)` to features `(n, 4 width)` and logits."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(
            *(_conv(3, width), nn.MaxPool2d(2)),
            *(_conv(width, 2 * width), nn.MaxPool2d(2), _Residual(2 * width)),
            *(_conv(2 * width, 4 * width), nn.MaxPool2d(2), _Residual(4 * width)),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits of uint8 images."""
        features = self.body(images.to(self.head.weight.dtype) / 127.5 - 1).mean([2, 3])
        return features, self.head(features)


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


def _conv(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def augment(images, flip, generator):
    """Shift images by up to an eighth of their side, and mirror half of them."""
    count, _, side, _ = images.shape
    shift = side // 8
    padded = F.pad(images.float(), (shift,) * 4, mode="reflect")
    places = torch.randint(2 * shift + 1, (2, count, 1), generator=generator) + torch.arange(side)
    rows, columns = places
    if flip:
        columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns.flip(1), columns)
    number = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def train(model, images, labels, args, device):
    generator = torch.Generator().manual_seed(args.seed)
    batches = range(0, len(images) - 1, args.batch_size)  # a last image alone has no variance to normalise by
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = args.num_train_epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, steps, cycle_momentum=False)
    for epoch in range(args.num_train_epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for rows in (order[start : start + args.batch_size] for start in batches):
            batch = augment(images[rows], args.random_flip, generator)
            batch = batch.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                _, logits = model(batch)
            loss = F.cross_entropy(logits.float(), labels[rows].to(device), label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if not loss.isfinite():
            raise FloatingPointError(f"The loss is {loss.item()} in epoch {epoch + 1}: lower `--learning_rate`.")
        print(f"epoch {epoch + 1} of {args.num_train_epochs}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(model, images, labels, device):
    model.eval()
    right = [model(part.to(device))[1].argmax(1).cpu() for part in images.split(500)]
    return (torch.cat(right) == labels).double().mean().item()


def main(args):
    if args.validation_split is None and args.validation_data_dir is None:
        raise ValueError("`--validation_split` or `--validation_data_dir` must be given, to say how good it is.")
    if Path(args.output).exists():
        raise ValueError(f"`--output` must be a new file, got {args.output}: statistics may be by it.")
    args.label_column = args.label_column or "label"
    data = training.load_data(data_config(args, Path(args.output).parent, args.resolution))
    (images, labels), (held_out, held_out_labels) = (
        read_images(part, range(len(part)), args.dataloader_num_workers) for part in (data.dataset, data.held_out)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    model = Classifier(args.width, data.num_classes).to(device, memory_format=torch.channels_last)
    start, cpu_start = time.perf_counter(), time.process_time()
    train(model, images, labels, args, device)
    report = {
        "architecture": "small residual classifier",
        "accuracy": accuracy(model, held_out, held_out_labels, device),
        "held_out_images": len(held_out),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "command": public_command(sys.argv, ["python"]),
    }
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    partial = f"{args.output}.partial"
    scripted = torch.jit.script(model.eval().to("cpu", memory_format=torch.contiguous_format))
    torch.jit.save(scripted, partial, _extra_files={"metadata.json": json.dumps(report)})
    os.replace(partial, args.output)  # an interruption leaves the old file or the new one
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main, parse_args())
