"""What training on videos has of its own: its flags, its family and its clips. The rest is that of text-to-image."""

from __future__ import annotations

import argparse

from ..ranges import COUNT, POSITIVE, WHOLE
from .families import DenoiserFamily
from .images import INTERPOLATION_MODES, ImageTransform
from .samples import ImageDataset
from .text_to_image import denoiser_family
from .text_to_video_families import TEXT_TO_VIDEO_FAMILIES
from .videos import VideoTransform, load_training_videos


def add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of videos and their preparation, in place of those of images."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--train_data_dir", required=True, help="Folder of videos or of folders of frames, with a metadata.jsonl.")
    add("--validation_data_dir", help="Folder of videos for the held-out loss, laid out as --train_data_dir.")
    add("--cache_dir", help="Where downloaded models are kept, and zip files unpacked.")
    add("--resolution", type=COUNT, default=256, help="Side of the clips in pixels. Default %(default)s.")
    add("--num_frames", type=COUNT, default=17, help="Frames of a clip. Default %(default)s.")
    add("--frame_stride", type=COUNT, default=1, help="How many frames of a video apart they are. Default 1.")
    add(
        "--frame_rate",
        type=POSITIVE,
        default=25.0,
        help="Frames of a clip that are shown in a second, which LTX-Video is told. Default %(default)s.",
    )
    add(
        "--image_interpolation_mode",
        choices=INTERPOLATION_MODES,
        default="bilinear",
        help="How frames are resized. Default %(default)s.",
    )
    add("--center_crop", action="store_true", help="Take the middle of frames and videos rather than a random part.")
    add("--random_flip", action="store_true", help="Mirror half of the clips.")
    add("--dataloader_num_workers", type=WHOLE, default=0, help="Processes that load videos.")
    add("--vae_name_or_path", help="Another autoencoder than the pipeline's.")
    # Flags of images that there are none of here.
    parser.set_defaults(
        dataset_name=None,
        dataset_config_name=None,
        validation_split=None,
        cache_latents=False,
        max_train_samples=None,
        unreadable_images="error",
    )


def text_to_video_family(args: argparse.Namespace) -> DenoiserFamily:
    """The family of `--pretrained_model_name_or_path`, as [`denoiser_family`] finds it."""
    return denoiser_family(args, TEXT_TO_VIDEO_FAMILIES)


def video_dataset(args: argparse.Namespace, folder: str | None, *, held_out: bool = False) -> ImageDataset | None:
    """Clips of a folder's videos as samples, which [`~diffusers_dtr.training.CaptionedDataset`] gives their captions.

    Args:
        args: Parsed flags of [`add_video_arguments`].
        folder: The folder; None makes None.
        held_out: Whether clips are the middle of frames and videos, the same for every run.

    Raises:
        ValueError: As [`~diffusers_dtr.training.videos.load_training_videos`].
    """
    if folder is None:
        return None
    length = (args.num_frames, args.frame_stride)
    videos = load_training_videos(folder, args.caption_column, *length, args.cache_dir)
    crop, flip = args.center_crop or held_out, args.random_flip and not held_out
    frames = ImageTransform(args.resolution, 3, crop, flip, args.image_interpolation_mode)
    transform = VideoTransform(frames, args.num_frames, args.frame_stride)
    return ImageDataset(videos, transform, seed=0 if held_out else args.seed)
