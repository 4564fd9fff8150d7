"""Short videos with captions: files or folders of frames that a `metadata.jsonl` lists, and clips of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image

from ...config_types import parse_object, shortened
from .captions import Captions
from .image_folder import IMAGE, METADATA, OTHER, found, image_suffixes, report, scan_folder
from .images import Augmentation, ImageTransform, UnreadableImageError, decode_frames, decoding


_UNLISTED = "not listed in the metadata"


@dataclass(frozen=True)
class Video:
    """A video whose frames are decoded as they are needed: a file for Pillow or PyAV, or a folder of `frames`.

    `size` is its width and height.
    """

    path: Path
    num_frames: int
    frames: tuple[str, ...] = ()
    size: tuple[int, int] | None = None

    @classmethod
    def open(cls, path: Path, frames: Sequence[str] = ()) -> Video:
        """A video at a path; a folder's frames are in the order of their numbers."""
        with decoding(f"The video {path} cannot be read: "):
            if frames:
                frames = tuple(sorted(frames, key=_numbered))
                _check_frames(frames)
                num_frames = len(frames)
            elif _is_image(path):
                with Image.open(path) as image:
                    num_frames = getattr(image, "n_frames", 1)
            else:
                num_frames = sum(1 for _ in _decode(path))
                if num_frames == 0:
                    raise UnreadableImageError("it has no frames")
        video = cls(path, num_frames, frames)
        return replace(video, size=video.read([0])[0].size)

    def read(self, numbers: Sequence[int]) -> list[Image.Image]:
        """Decode frames, see [`~diffusers_dtr.training.data.images.decode_image`]."""
        with decoding(f"The video {self.path} cannot be read: "):
            if self.frames:
                return [_decode_frame(self.frames[number]) for number in numbers]
            if _is_image(self.path):
                return decode_frames(self.path, numbers)
            decoded = enumerate(islice(_decode(self.path), numbers[-1] + 1))
            return [_upright(frame) for number, frame in decoded if number in numbers]


def _check_frames(files: Sequence[str]) -> None:
    """Refuse files that are no frames of one video; of each, only the header is read."""
    (stem, number), *_ = Counter(Path(file).stem for file in files).most_common(1)
    if number > 1:
        raise UnreadableImageError(f"there are several files for its frame {stem}")
    sizes = {}
    for file in files:
        with Image.open(file) as image:
            sizes.setdefault(image.size, os.path.basename(file))
    if len(sizes) > 1:
        (size, _), (other, name), *_ = sizes.items()
        raise UnreadableImageError(f"its frames must be of one size, got {size}, and {other} of {name}")


def _numbered(path: str) -> tuple[list[str | int], str]:
    """A key that sorts frame_2 before frame_10."""
    parts = re.split(r"(\d+)", os.path.basename(path))
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in image_suffixes()


def _decode_frame(path: str) -> Image.Image:
    with decoding(f"{os.path.basename(path)}: "):
        return decode_frames(path, [0])[0]


def _decode(path: Path) -> Iterator[Any]:
    """All frames of a video file, as PyAV has them."""
    try:
        import av  # only for files that Pillow cannot read
    except ImportError as error:
        raise UnreadableImageError("it needs PyAV: pip install av, or make a folder of its frames") from error
    with av.open(str(path)) as container:
        yield from container.decode(video=0)


def _upright(frame: Any) -> Image.Image:
    """A frame of PyAV's as it is shown: telephones write how they were held beside the pixels."""
    return frame.to_image().rotate(frame.rotation, expand=True)


@dataclass(frozen=True)
class TrainingVideos:
    """Videos and their captions, where [`~diffusers_dtr.training.data.training_images.TrainingImages`] may stand."""

    videos: tuple[Video, ...]
    captions: Captions
    labels: None = None
    num_classes: None = None
    id2label: None = None

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def file_names(self) -> list[str]:
        """Of every row, without folders."""
        return [video.path.name for video in self.videos]

    def read(self, row: int) -> Video:
        """A row's video."""
        return self.videos[row]


def load_training_videos(
    folder: str | os.PathLike,
    caption_column: str,
    num_frames: int,
    frame_stride: int,
    cache_dir: str | os.PathLike | None = None,
) -> TrainingVideos:
    """Find the videos that a folder's metadata.jsonl files list, and check that each is long enough.

    A line is a JSON object: `file_name`, a video or a folder of frames beside it, and a caption or a list of them,
    alike in all lines.
    """
    files = scan_folder(folder, cache_dir)
    metadata = [file.path for file in files if file.kind == METADATA and file.path.endswith(".jsonl")]
    frames: dict[str, list[str]] = {}
    for file in files:
        if file.kind == IMAGE:
            frames.setdefault(os.path.dirname(file.path), []).append(file.path)
    rows = [*_read_metadata(metadata, caption_column, {*frames, *(file.path for file in files)})]
    if not rows:
        raise ValueError(
            f"The video folder {os.fspath(folder)!r} must have a metadata.jsonl, with `file_name` and "
            f"{caption_column!r} of every video, found {found(files)} and no line of metadata."
        )
    paths = dict.fromkeys(path for path, _ in rows)
    # What is no image may be a video, but among frames.
    files = [
        replace(file, kind=_UNLISTED) if file.kind == OTHER and os.path.dirname(file.path) not in paths else file
        for file in files
    ]
    report(folder, files, {*metadata, *(file for path in paths for file in frames.get(path, [path]))}, _UNLISTED)
    opened = {path: Video.open(Path(path), frames.get(path, ())) for path in paths}
    videos = tuple(opened[path] for path, _ in rows)
    needed = (num_frames - 1) * frame_stride + 1
    short = [video for video in videos if video.num_frames < needed]
    if short:
        raise ValueError(
            f"Every video must have at least {needed} frames, for `--num_frames` {num_frames} with `--frame_stride` "
            f"{frame_stride}: {len(short)} have fewer, such as {short[0].path} with {short[0].num_frames}."
        )
    captions = datasets.Dataset.from_dict({caption_column: [caption for _, caption in rows]})
    return TrainingVideos(videos, Captions(captions, caption_column))


def _read_metadata(metadata: list[str], caption_column: str, known: set[str]) -> Iterator[tuple[str, str | list[str]]]:
    """The path and caption of every line."""
    hints = {caption_column: str | list[str], "file_name": str}
    for file in metadata:
        # As bytes, because a line of JSON may hold what ends a line of text.
        for number, line in enumerate(Path(file).read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            where = f"line {number} of {file}"
            row = parse_object(line, where, hints)
            if not row.keys() >= hints.keys():
                raise ValueError(f"`{where}` must have `{caption_column}` and `file_name`, got {shortened(row)}.")
            name, caption = os.path.normpath(row["file_name"]), row[caption_column]
            path = os.path.normpath(os.path.join(os.path.dirname(file), name))
            if path not in known or name.split(os.sep)[0] in ("", ".."):
                raise ValueError(
                    f"`file_name` of `{where}` must be a video or a folder of frames beside it, got "
                    f"{shortened(row['file_name'])}."
                )
            hints[caption_column] = str if isinstance(caption, str) else list[str]
            yield path, caption


@dataclass(frozen=True)
class VideoTransform(ImageTransform):
    """From a video to a clip: frames `frame_stride` apart, transformed alike; with a centre crop, its middle."""

    num_frames: int = 1
    frame_stride: int = 1

    def draw(self, generator: torch.Generator) -> Augmentation:
        """Draw a sample's augmentation, that of all its frames."""
        augmentation = super().draw(generator)
        start = torch.rand(1, generator=generator, dtype=torch.float64).item()
        return replace(augmentation, start=None if self.center_crop else start)

    def __call__(self, video: Video, augmentation: Augmentation) -> torch.Tensor:
        """Make a clip `(channels, num_frames, resolution, resolution)`, float32 in [-1, 1]."""
        room = video.num_frames - (self.num_frames - 1) * self.frame_stride
        start = (room - 1) // 2 if augmentation.start is None else int(augmentation.start * room)
        frames = video.read([start + number * self.frame_stride for number in range(self.num_frames)])
        return torch.stack([ImageTransform.__call__(self, frame, augmentation) for frame in frames], dim=1)
