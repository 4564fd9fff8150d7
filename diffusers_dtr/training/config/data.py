"""What a run begins with: pretrained parts, images or videos, captions, adapters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from PIL import Image

from ...config_types import parse_object, read_object, shortened
from .options import Count, NonNegative, Options, Positive, Share, Whole, option


# A JSON object, in a file or typed; a dictionary in Python.
JSONConfig = dict | str | None
INTERPOLATION_MODES = tuple(sorted(mode.name.lower() for mode in Image.Resampling))
Interpolation = Literal[INTERPOLATION_MODES]


@dataclass(frozen=True)
class ModelConfig(Options):
    """Which pretrained parts a run begins with."""

    _argument_group_name = "model"

    pretrained_model_name_or_path: str | None = option(None, "Pipeline to fine-tune.")
    revision: str | None = option(None, "Revision of the pretrained pipeline's repository.")
    variant: str | None = option(None, "Variant of the pretrained pipeline's weights, such as fp16.")
    vae_name_or_path: str | None = option(
        None, "Autoencoder in whose latent space the model works. Default the pretrained pipeline's, or pixels."
    )
    cache_dir: str | None = option(None, "Where downloaded datasets and models are kept, and zip files unpacked.")

    def __post_init__(self):
        for name in self.names():
            if name.endswith("_config"):
                object.__setattr__(self, name, _json_config(f"--{name}", getattr(self, name)))
        super().__post_init__()


def _json_config(flag: str, value: JSONConfig) -> dict | None:
    if isinstance(value, str):
        try:
            value = parse_object(value, "text") if value.lstrip().startswith("{") else read_object(Path(value))
        except (OSError, ValueError) as error:
            raise ValueError(f"`{flag}` must be a JSON object or a file that holds one: {error}") from error
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, str) for key in value):
        raise ValueError(f"`{flag}` must have names as keys, got {', '.join(map(str, value))}.")
    return {key: item for key, item in value.items() if not key.startswith("_")}


def check_one_source(model: ModelConfig, *names: str) -> None:
    """Refuse a configuration in which not exactly one of these options says what to train."""
    given = [f"--{name}" for name in names if getattr(model, name) is not None]
    if len(given) != 1:
        flags = ", ".join(f"--{name}" for name in names)
        raise ValueError(f"Exactly one of {flags} must be given, got {' and '.join(given) or 'none'}.")


@dataclass(frozen=True)
class SourceConfig(Options):
    """Where images come from, and their preparation."""

    _argument_group_name = "data"

    dataset_name: str | None = option(None, "Dataset on the Hub, or a local folder that 🤗 datasets can load.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset, if it has several.")
    train_data_dir: str | None = option(
        None, "Folder of images: a folder per class if there are classes, a metadata.jsonl if there are captions."
    )
    train_split: str = option("train", "Split of --dataset_name to train on.")
    image_column: str = option("image", "Column with the images.")
    resolution: Count | None = option(
        None, "Side of the training images in pixels. Default that of the model (its `sample_size`), or 32."
    )
    image_interpolation_mode: Interpolation = option("bilinear", "How images are resized.")
    max_train_samples: Count | None = option(None, "Train on so many images, drawn with the seed. Default all.")
    center_crop: bool = option(False, "Crop the middle rather than a random part.")
    random_flip: bool = option(False, "Mirror half of the images.")
    dataloader_num_workers: Whole = option(0, "Processes that load images.")

    def __post_init__(self):
        super().__post_init__()
        self._check_source()
        self.effect_only(self.dataset_name is not None, "with --dataset_name", "dataset_config_name", "train_split")

    def _check_source(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError("Exactly one of --dataset_name and --train_data_dir must be given.")


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The images of a run, in training and for the held-out loss."""

    latents_dir: str | None = option(
        None,
        "Folder of precompute_latents.py to train from, in place of --dataset_name or --train_data_dir.",
    )
    cache_latents: bool = option(False, "Encode all images once, before training.")
    streaming: bool = option(False, "Read --dataset_name as training goes on, and keep nothing of it on disk.")
    shuffle_buffer_size: Count = option(
        1000,
        "Rows that a stream shuffles at a time; resuming may skip or repeat as many. 1: in the order of the files.",
    )
    validation_split: str | None = option(None, "Split of --dataset_name for the held-out loss.")
    validation_data_dir: str | None = option(
        None, "Folder of images for the held-out loss, laid out as --train_data_dir."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.validation_split is not None and self.dataset_name is None:
            raise ValueError(
                "`--validation_split` needs --dataset_name: with --train_data_dir use --validation_data_dir."
            )
        if self.validation_split is not None and self.validation_data_dir is not None:
            raise ValueError("At most one of --validation_split and --validation_data_dir can be given.")
        if self.cache_latents and not self.center_crop:
            raise ValueError("`--cache_latents` needs --center_crop: a random crop would be encoded anew every time.")
        self.effect_only(self.streaming, "with --streaming", "shuffle_buffer_size")
        if self.streaming and self.dataset_name is None:
            raise ValueError(
                "`--streaming` needs --dataset_name: a dataset on the Hub, or a folder of parquet or tars."
            )
        self.effect_only(not self.streaming, "without --streaming", "cache_latents", "max_train_samples")

    def _check_source(self) -> None:
        if self.latents_dir is None:
            super()._check_source()
            return
        for name in ("dataset_name", "train_data_dir", "max_train_samples", "cache_latents"):
            if not self.is_default(name):
                raise ValueError(f"`--{name}` does not go with --latents_dir: it is for precompute_latents.py.")
        if not self.center_crop:
            raise ValueError("`--latents_dir` needs --center_crop, as its images were cropped.")


@dataclass(frozen=True)
class LabelledDataConfig(DataConfig):
    """Images with class labels."""

    label_column: str | None = option("label", "Column with the class labels.")
    num_classes: Count | None = option(None, "Number of classes of a stream whose labels are integers without names.")

    def __post_init__(self):
        super().__post_init__()
        self.effect_only(self.streaming, "with --streaming", "num_classes")


@dataclass(frozen=True)
class CaptionedDataConfig(DataConfig):
    """Images with captions."""

    aspect_ratio_buckets: str | None = option(
        None,
        "Heights and widths, such as '512,512;448,576', or auto: images are resized and cropped to those of the "
        "nearest ratio, and all images of a step are of one size. Default squares of --resolution.",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("streaming", "latents_dir"):  # both before sizes are known
            self.effect_only(not getattr(self, name), f"without --{name}", "aspect_ratio_buckets")
        ratios = [Fraction(*size) for size in self.bucket_sizes or ()]
        if len(set(ratios)) < len(ratios):
            raise ValueError(
                f"`--aspect_ratio_buckets` must have one size of a ratio of sides, got {self.aspect_ratio_buckets}."
            )

    @property
    def bucket_sizes(self) -> list[tuple[int, int]] | None:
        """Height and width of every bucket; None without, or if they are still to be found."""
        if self.aspect_ratio_buckets in (None, "auto"):
            return None
        if not re.fullmatch(r"[1-9]\d{0,5},[1-9]\d{0,5}(;[1-9]\d{0,5},[1-9]\d{0,5})*", self.aspect_ratio_buckets):
            raise ValueError(
                "`--aspect_ratio_buckets` must be auto, or heights and widths such as '512,512;448,576', got "
                f"{shortened(self.aspect_ratio_buckets)}."
            )
        return [tuple(map(int, size.split(","))) for size in self.aspect_ratio_buckets.split(";")]


@dataclass(frozen=True)
class VideoConfig(Options):
    """The videos of a run and their preparation."""

    _argument_group_name = "data"

    train_data_dir: str = option(help="Folder of videos or of folders of frames, with a metadata.jsonl.")
    validation_data_dir: str | None = option(
        None, "Folder of videos for the held-out loss, laid out as --train_data_dir."
    )
    resolution: Count = option(256, "Side of the clips in pixels.")
    num_frames: Count = option(17, "Frames of a clip.")
    frame_stride: Count = option(1, "How many frames of a video apart they are.")
    frame_rate: Positive = option(25.0, "Frames of a clip that are shown in a second, which LTX-Video is told.")
    image_interpolation_mode: Interpolation = option("bilinear", "How frames are resized.")
    center_crop: bool = option(False, "Take the middle of frames and videos rather than a random part.")
    random_flip: bool = option(False, "Mirror half of the clips.")
    dataloader_num_workers: Whole = option(0, "Processes that load videos.")


@dataclass(frozen=True)
class TextConfig(Options):
    """Captions, their embeddings, and the prompts of validation."""

    _argument_group_name = "captions"

    caption_column: str = option("text", "Column with the captions: a string or a list of strings per image.")
    proportion_empty_prompts: Share = option(
        0.0, "Share of the captions that are replaced by an empty one, for classifier-free guidance."
    )
    max_sequence_length: Count | None = option(None, "Tokens of a T5 encoder's prompt. Default the pipeline's.")
    cache_text_embeddings: bool = option(
        False, "Encode all captions once, before training, and free the memory of the text encoders."
    )
    validation_prompts: list[str] | None = option(
        None, "Prompts of the grid's images, in turn. Default the captions of the first images."
    )
    guidance_scale: NonNegative = option(
        3.5, "What a guidance-distilled denoiser (Flux.1 [dev], Flux.2 [dev]) is told, in training and validation."
    )


@dataclass(frozen=True)
class LoraConfig(Options):
    """LoRA adapters, if they are what is trained."""

    _argument_group_name = "LoRA"

    rank: Count | None = option(None, "Train LoRA adapters of this rank, and nothing else.")
    lora_alpha: Count | None = option(None, "Adapters are scaled by this over the rank. Default the rank.")
    route_lora: bool = option(
        False, "Route the rank channels of the adapters, by the flags of routing, and leave the denoiser unrouted."
    )
    lora_layers: list[str] | None = option(
        None, "Names of the layers to adapt, or their ends. Default all of attention."
    )

    quantize: Literal["bnb_4bit", "bnb_8bit", "torchao_int8"] | None = option(
        None, "Quantise the frozen denoiser: by bitsandbytes, on a GPU, or by torchao."
    )

    def __post_init__(self):
        super().__post_init__()
        self.effect_only(self.rank is not None, "with --rank", "lora_alpha", "lora_layers", "route_lora", "quantize")
        package = None if self.quantize is None else {"bnb": "bitsandbytes"}.get(self.quantize[:3], "torchao")
        if package is not None and find_spec(package) is None:
            raise ValueError(
                f'`--quantize {self.quantize}` needs {package}: pip install "diffusers-dtr[quantization]".'
            )
        if self.rank is not None and find_spec("peft") is None:
            raise ValueError('`--rank` needs peft: pip install "diffusers-dtr[training]".')
