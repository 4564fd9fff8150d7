"""The flags that only training on captions has: those of text, guidance and LoRA adapters, and their checks."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from ..ranges import COUNT, NON_NEGATIVE, SHARE


def add_guidance_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flag of denoisers that were distilled from guided predictions.

    Args:
        group: The script's group of its model.
    """
    group.add_argument(
        "--guidance_scale",
        type=NON_NEGATIVE,
        default=3.5,
        help="What a guidance-distilled denoiser (Flux.1 [dev], Flux.2 [dev]) is told, in training and validation.",
    )


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of captions, of their embeddings, and of the prompts of validation."""
    group = parser.add_argument_group("captions")
    add = group.add_argument
    add("--caption_column", default="text", help="Column with the captions: a string or a list of strings per image.")
    add(
        "--proportion_empty_prompts",
        type=SHARE,
        default=0.0,
        help="Share of the captions that are replaced by an empty one, for classifier-free guidance.",
    )
    add("--max_sequence_length", type=COUNT, help="Tokens of a T5 encoder's prompt. Default the pipeline's.")
    add(
        "--cache_text_embeddings",
        action="store_true",
        help="Encode all captions once, before training, and free the memory of the text encoders.",
    )
    add(
        "--validation_prompts",
        nargs="+",
        help="Prompts of the grid's images, in turn. Default the captions of the first images.",
    )


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of LoRA adapters."""
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    add("--rank", type=COUNT, help="Train LoRA adapters of this rank, and nothing else.")
    add("--lora_alpha", type=COUNT, help="Adapters are scaled by this over the rank. Default the rank.")
    add(
        "--route_lora",
        action="store_true",
        help="Route the rank channels of the adapters, by the flags of routing, and leave the denoiser unrouted.",
    )
    add("--lora_layers", nargs="+", help="Names of the layers to adapt, or their ends. Default all of attention.")


def check_text_to_image_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop with a message about arguments of captions and LoRA that do not fit.

    Args:
        parser: Reports the error and exits.
        args: What was parsed.
    """
    if args.rank is None:
        if args.lora_alpha is not None or args.lora_layers is not None:
            parser.error("--lora_alpha and --lora_layers have an effect with --rank only")
        if args.route_lora:
            parser.error("--route_lora has an effect with --rank only")
        return
    if args.route_lora and args.routing_warmup_steps:
        parser.error("--routing_warmup_steps is of the denoiser, which --route_lora leaves unrouted")
    if args.use_ema:
        parser.error("--rank does not go with --use_ema: the average would be of all weights, not of the adapters")
    if args.denoiser_config is not None:
        parser.error("--rank does not go with --denoiser_config: adapters need a denoiser that is trained already")
    if find_spec("peft") is None:
        parser.error('--rank needs peft: pip install "diffusers-dtr[training]"')
