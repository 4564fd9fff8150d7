"""Encode images and captions ahead of training, by all processes, into shards that training takes as `--latents_dir`.

Run with `accelerate launch precompute_latents.py --help`; README.md beside this file has complete commands.
"""

import argparse
import logging
from dataclasses import dataclass

import datasets
import torch
from accelerate import Accelerator, PartialState
from transformers import HfArgumentParser

from diffusers_dtr import training
from diffusers_dtr.ranges import COUNT, SEED
from diffusers_dtr.training.config import ModelConfig, RunConfig, SourceConfig, TextConfig, TrainingConfig, option
from diffusers_dtr.training.data import precompute_latents, precompute_text_embeddings
from diffusers_dtr.training.families import TEXT_TO_IMAGE_FAMILIES, denoiser_family
from diffusers_dtr.user_errors import run_script


@dataclass(frozen=True)
class LabelledOrCaptionedConfig(SourceConfig):
    """Images, with labels or captions if their columns are given."""

    label_column: str | None = option(
        None, "Column with class labels; any name, such as label, for folders of classes."
    )
    caption_column: str | None = option(None, "Column with captions.")


def parse_args(argv=None):
    parser = HfArgumentParser(
        [ModelConfig, LabelledOrCaptionedConfig],
        usage="%(prog)s [options; --help lists them]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("latents").add_argument
    add("--output_dir", required=True, help="Folder of the shards, which all processes share.")
    add("--batch_size", type=COUNT, default=32, help="Images that a process encodes at once. Default 32.")
    add("--shard_size", type=COUNT, default=1024, help="Images of a file, which is whole or not there. Default 1024.")
    add("--seed", type=SEED, default=0, help="What --max_train_samples draws with.")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="Precision of all encoders. Text-to-image runs have them in their --mixed_precision, others in float32.",
    )
    add("--text_embeddings", action="store_true", help="Encode captions too, for train_text_to_image.py.")
    add("--max_sequence_length", type=COUNT, help="Tokens of a T5 encoder's prompt. Default the pipeline's.")
    try:
        model, data, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        run = RunConfig(args.output_dir, seed=args.seed, train_batch_size=args.batch_size, report_to="none")
        for name in ("caption_column", "pretrained_model_name_or_path") if args.text_embeddings else ():
            if {**vars(data), **vars(model)}[name] is None:
                raise ValueError(f"`--text_embeddings` needs --{name}.")
        if args.max_sequence_length is not None and not args.text_embeddings:
            raise ValueError("`--max_sequence_length` has an effect with --text_embeddings only.")
        text = None
        if data.caption_column is not None:
            text = TextConfig(data.caption_column, max_sequence_length=args.max_sequence_length)
        args.config = TrainingConfig(run, data, model, text=text)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(args):
    main_process = Accelerator(mixed_precision="no").is_main_process
    if not main_process:
        datasets.disable_progress_bars()
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, format="%(levelname)s %(message)s")
    dtype = getattr(torch, args.dtype)
    family = denoiser_family(args.config, TEXT_TO_IMAGE_FAMILIES) if args.text_embeddings else None
    vae = training.load_vae(args.config.model, dtype)
    if vae is None:
        raise ValueError("`--vae_name_or_path` must be given, or a `--pretrained_model_name_or_path` with one.")
    encoding = None if family is None else training.load_text_encoding(args.config, family, dtype).to("cpu")
    precompute_latents(args.config, vae, shard_size=args.shard_size)
    del vae
    if encoding is not None:
        encoding = encoding.to(PartialState().device)
        precompute_text_embeddings(args.config, encoding, shard_size=args.shard_size)


if __name__ == "__main__":
    run_script(main, parse_args())
