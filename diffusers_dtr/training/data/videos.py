"""Short videos with captions: files or folders of frames that a `metadata.jsonl` lists, and clips of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image

from ...config_types import parse_object, shortened
from .captions import Captions
from .image_folder import IMAGE, METADATA, OTHER, FoundFile, found, image_suffixes, report, scan_folder
from .images import Augmentation, ImageTransform, UnreadableImageError, decode_frames, decoding


_METADATA_FILE = "metadata.jsonl"
_UNLISTED = "not listed in the metadata"


@dataclass(frozen=True)
class Video:
    """A video whose frames are decoded as they are needed.

    Attributes:
        path: A file, or a folder of frames.
        num_frames: How many it has.
        size: Width and height.
        frames: The files of its frames, in their order; none if `path` is a file.
    """

    path: Path
    num_frames: int
    size: tuple[int, int]
    frames: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path, frames: Iterable[str] = ()) -> Video:
        """A video at a path: a file for Pillow or PyAV, or a folder of frames in the order of their numbers."""
        with decoding(f"The video {path} cannot be read: "):
            if files := tuple(sorted(frames, key=_numbered)):
                _check_frames(files)
                return cls(path, len(files), _decode_frame(files[0]).size, files)
            if _is_image(path):
                with Image.open(path) as image:
                    num_frames = getattr(image, "n_frames", 1)
                return cls(path, num_frames, decode_frames(path, [0])[0].size)
            decoded = _decode(path)
            first = next(decoded, None)
            if first is None:
                raise UnreadableImageError("it has no frames")
            return cls(path, 1 + sum(1 for _ in decoded), _upright(first).size)

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
    stems = Counter(os.path.splitext(os.path.basename(file))[0] for file in files)
    twice = [stem for stem, number in stems.items() if number > 1]
    if twice:
        raise UnreadableImageError(f"there are several files for its frame {twice[0]}")
    sizes = {}
    for file in files:
        with Image.open(file) as image:
            sizes.setdefault(image.size, file)
    if len(sizes) > 1:
        (size, _), (other, file), *_ = sizes.items()
        name = os.path.basename(file)
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
        raise UnreadableImageError(
            "it needs PyAV, which is not installed: pip install av, or make a folder of its frames"
        ) from error
    with av.open(str(path)) as container:
        yield from container.decode(video=0)


def _upright(frame: Any) -> Image.Image:
    """A frame of PyAV's as it is shown: telephones write how they were held beside the pixels."""
    return frame.to_image().rotate(frame.rotation, expand=True)


@dataclass(frozen=True)
class TrainingVideos:
    """Videos and their captions, for [`~diffusers_dtr.training.data.samples.ImageDataset`] with a [`VideoTransform`].

    Attributes:
        videos: The videos.
        captions: Of every one.
    """

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

    def name(self, row: int) -> str:
        """What to call a row's video in a message."""
        return f"{self.videos[row].path} (row {row})"

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
    if not os.path.isdir(folder):
        raise ValueError(f"`train_data_dir` must be a folder, got {os.fspath(folder)!r}.")
    files = scan_folder(folder, cache_dir)
    metadata = [file.path for file in files if file.kind == METADATA and file.path.endswith(_METADATA_FILE)]
    frames: dict[str, list[str]] = {}
    for file in files:
        if file.kind == IMAGE:
            frames.setdefault(os.path.dirname(file.path), []).append(file.path)
    known = {*frames, *(file.path for file in files)}
    rows = [*_read_metadata(metadata, caption_column, known)]
    if not rows:
        raise ValueError(
            f"The video folder {os.fspath(folder)!r} must have a {_METADATA_FILE}, with `file_name` and "
            f"{caption_column!r} of every video, found {found(files)} and no line of metadata."
        )
    paths = dict.fromkeys(path for path, _ in rows)
    _report(folder, files, {*metadata, *(file for path in paths for file in frames.get(path, [path]))}, {*paths})
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
                names = " and ".join(f"`{name}`" for name in hints)
                raise ValueError(f"`{where}` must have {names}, got {shortened(row)}.")
            name, caption = os.path.normpath(row["file_name"]), row[caption_column]
            path = os.path.normpath(os.path.join(os.path.dirname(file), name))
            if path not in known or name.split(os.sep)[0] in ("", ".."):
                raise ValueError(
                    f"`file_name` of `{where}` must be a video or a folder of frames beside it, got "
                    f"{shortened(row['file_name'])}."
                )
            hints[caption_column] = str if isinstance(caption, str) else list[str]
            yield path, caption


def _report(folder: str | os.PathLike, files: list[FoundFile], used: set[str], videos: set[str]) -> None:
    """As [`~diffusers_dtr.training.data.image_folder.report`]: what is no image may be a video, but among frames."""
    files = [
        replace(file, kind=_UNLISTED) if file.kind == OTHER and os.path.dirname(file.path) not in videos else file
        for file in files
    ]
    report(folder, files, used, _UNLISTED)


@dataclass(frozen=True)
class VideoAugmentation:
    """What is drawn for one sample: that of all its frames, and where it starts, in [0, 1); None is the middle."""

    frames: Augmentation
    start: float | None = None


@dataclass(frozen=True)
class VideoTransform:
    """From a video to a clip: frames `frame_stride` apart, transformed alike; with a centre crop, its middle."""

    image: ImageTransform
    num_frames: int
    frame_stride: int = 1

    def draw(self, generator: torch.Generator) -> VideoAugmentation:
        """Draw a sample's augmentation."""
        frames = self.image.draw(generator)
        start = torch.rand(1, generator=generator, dtype=torch.float64).item()
        return VideoAugmentation(frames, None if self.image.center_crop else start)

    def micro_conditions(self, size: tuple[int, int], augmentation: VideoAugmentation) -> dict[str, torch.Tensor]:
        """As [`~diffusers_dtr.training.data.images.ImageTransform.micro_conditions`], of every frame."""
        return self.image.micro_conditions(size, augmentation.frames)

    def __call__(self, video: Video, augmentation: VideoAugmentation) -> torch.Tensor:
        """Make a clip `(channels, num_frames, resolution, resolution)`, float32 in [-1, 1]."""
        room = video.num_frames - (self.num_frames - 1) * self.frame_stride
        start = (room - 1) // 2 if augmentation.start is None else int(augmentation.start * room)
        numbers = [start + number * self.frame_stride for number in range(self.num_frames)]
        return torch.stack([self.image(frame, augmentation.frames) for frame in video.read(numbers)], dim=1)
