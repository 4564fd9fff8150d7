"""The images that samples are compared with, read as training reads them."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from diffusers_dtr import training
from diffusers_dtr.ranges import COUNT, WHOLE
from diffusers_dtr.training.config import LabelledDataConfig, ModelConfig, RunConfig, TextConfig


def add_data_arguments(parser, *, captions=False):
    """Flags with the names and meanings of the training scripts'."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Dataset on the Hub, or a local folder that 🤗 datasets can load.")
    group.add_argument("--dataset_config_name", help="Configuration of the dataset, if it has several.")
    group.add_argument("--train_data_dir", help="Folder of images: a folder per class if there are classes.")
    group.add_argument("--train_split", default="train", help="Split of --dataset_name. Default: %(default)s.")
    group.add_argument("--validation_split", help="Split of --dataset_name for what is held out.")
    group.add_argument("--validation_data_dir", help="Folder of images that are held out.")
    group.add_argument("--image_column", default="image", help="Column with the images. Default: %(default)s.")
    group.add_argument("--label_column", help="Column with the class labels; of class folders it is `label`.")
    if captions:
        group.add_argument("--caption_column", help="Column with the captions.")
    group.add_argument("--max_train_samples", type=COUNT, help="Take so many images, drawn with the seed.")
    group.add_argument("--cache_dir", help="Where downloaded datasets are kept, and zip files unpacked.")
    group.add_argument("--dataloader_num_workers", type=WHOLE, default=0, help="Processes that load images.")


def data_config(args, output_dir, resolution, batch_size=64, pretrained=None):
    """The configuration of a run on these data, without crops or flips at random."""
    caption_column = getattr(args, "caption_column", None)
    names = ("dataset_name", "dataset_config_name", "train_data_dir", "train_split", "validation_split")
    names += ("validation_data_dir", "image_column", "label_column", "max_train_samples", "dataloader_num_workers")
    return training.TrainingConfig(
        run=RunConfig(output_dir=str(output_dir), train_batch_size=batch_size, seed=args.seed),
        data=LabelledDataConfig(
            resolution=resolution, center_crop=True, **{name: getattr(args, name) for name in names}
        ),
        text=None if caption_column is None else TextConfig(caption_column=caption_column),
        model=ModelConfig(cache_dir=args.cache_dir, **(pretrained or {})),
    )


def to_bytes(pixel_values):
    """Pixels in [-1, 1] as uint8."""
    return ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _pairs(samples):
    return [(to_bytes(sample["pixel_values"]), sample.get("labels", -1)) for sample in samples]


def read_images(dataset, rows, num_workers=0):
    """uint8 `(n, channels, resolution, resolution)` of some rows of a `TrainingData.dataset`, and their labels."""
    loader = DataLoader(
        dataset,
        sampler=[(0, row) for row in rows],
        batch_size=64,
        collate_fn=_pairs,
        num_workers=num_workers,
        generator=torch.Generator(),
    )
    images, labels = zip(*(sample for batch in loader for sample in batch), strict=True)
    return torch.stack(images), torch.tensor(labels)
