"""Short videos with captions: files or folders of frames that a `metadata.jsonl` lists, and clips of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from PIL import Image

from .captions import Captions
from .images import Augmentation, ImageTransform, UnreadableImageError, decode_image


METADATA = "metadata.jsonl"
_FRAMES = frozenset(Image.registered_extensions())
# Pillow reads moving pictures of these, PyAV all others.
_MOVING_IMAGES = frozenset((".gif", ".webp", ".png", ".apng"))


@dataclass(frozen=True)
class Video:
    """A video whose frames are decoded as they are needed.

    Attributes:
        path: A folder of frames, in the order of their names, or a file.
        num_frames: How many it has.
        size: Width and height.
    """

    path: Path
    num_frames: int
    size: tuple[int, int]

    @classmethod
    def open(cls, path: Path) -> Video:
        """A video at a path.

        Raises:
            UnreadableImageError: If there is none, or it cannot be decoded.
        """
        try:
            if path.is_dir():
                frames = _frame_files(path)
                return cls(path, len(frames), decode_image({"path": str(frames[0]), "bytes": None}).size)
            if path.suffix.lower() in _MOVING_IMAGES:
                with Image.open(path) as image:
                    return cls(path, getattr(image, "n_frames", 1), image.size)
            frames = _decode(path, None)
            return cls(path, len(frames), frames[0].size)
        except (OSError, ValueError, IndexError) as error:
            raise UnreadableImageError(f"The video {path} cannot be read: {type(error).__name__}: {error}") from error

    def read(self, numbers: Sequence[int]) -> list[Image.Image]:
        """Decode frames.

        Args:
            numbers: Which, ascending, in [0, num_frames).

        Raises:
            UnreadableImageError: If one cannot be decoded.
        """
        try:
            if self.path.is_dir():
                files = _frame_files(self.path)
                return [decode_image({"path": str(files[number]), "bytes": None}) for number in numbers]
            if self.path.suffix.lower() in _MOVING_IMAGES:
                return [*_moving_image(self.path, numbers)]
            return _decode(self.path, numbers)
        except (OSError, ValueError, IndexError) as error:
            raise UnreadableImageError(f"The video {self.path} cannot be read: {error}") from error


def _frame_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _FRAMES)


def _moving_image(path: Path, numbers: Sequence[int]):
    with Image.open(path) as image:
        for number in numbers:
            image.seek(number)
            yield image.convert("RGB")


def _decode(path: Path, numbers: Sequence[int] | None) -> list[Image.Image]:
    """Frames of a video file, or all of them."""
    try:
        import av  # only for files that Pillow cannot read
    except ImportError as error:
        raise ValueError(
            f"{path.name} needs PyAV, which is not installed: pip install av, or make a folder of its frames"
        ) from error
    wanted = None if numbers is None else set(numbers)
    frames = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if wanted is None or number in wanted:
                frames.append(frame.to_image())
            if wanted is not None and len(frames) == len(wanted):
                break
    return frames


@dataclass(frozen=True)
class TrainingVideos:
    """Videos and their captions, for [`~diffusers_dtr.training.samples.ImageDataset`] with a [`VideoTransform`].

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
    folder: str | Path, caption_column: str, num_frames: int, frame_stride: int
) -> TrainingVideos:
    """Find the videos that a folder's `metadata.jsonl` lists, and check that each is long enough.

    Args:
        folder: Holds `metadata.jsonl`, a JSON object per line: `file_name`, a video or a folder of frames beside it,
            and a caption or a list of them, alike in all lines.
        caption_column: What the captions are called there.
        num_frames: Frames of a clip, >= 1.
        frame_stride: How many frames apart they are, >= 1.

    Raises:
        ValueError: If the folder holds something else, or a video is too short; it is named.
        UnreadableImageError: If a video cannot be read.
    """
    metadata = Path(folder) / METADATA
    if not metadata.is_file():
        raise ValueError(f"`train_data_dir` must hold a {METADATA} that lists its videos, got {folder} without one.")
    rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = [number for number, row in enumerate(rows) if not {"file_name", caption_column} <= {*row}]
    if wrong or not rows:
        where = f"line {wrong[0] + 1} has not" if wrong else "there is no line"
        raise ValueError(f"Every line of {metadata} must have `file_name` and `{caption_column}`: {where}.")
    videos = tuple(Video.open(Path(folder) / row["file_name"]) for row in rows)
    needed = (num_frames - 1) * frame_stride + 1
    short = [video for video in videos if video.num_frames < needed]
    if short:
        raise ValueError(
            f"Every video must have at least {needed} frames, for `--num_frames` {num_frames} with `--frame_stride` "
            f"{frame_stride}: {len(short)} have fewer, such as {short[0].path} with {short[0].num_frames}."
        )
    captions = datasets.Dataset.from_list([{caption_column: row[caption_column]} for row in rows])
    return TrainingVideos(videos, Captions(captions, caption_column))


@dataclass(frozen=True)
class VideoAugmentation:
    """What is drawn for one sample: that of all its frames, and where it starts, in [0, 1); None is the middle."""

    frames: Augmentation
    start: float | None = None


@dataclass(frozen=True)
class VideoTransform:
    """From a video to a clip: consecutive frames, all resized, cropped and mirrored alike.

    Args:
        image: What is done to a frame. With a centre crop, a clip is from the middle of its video.
        num_frames: Frames of a clip.
        frame_stride: How many frames apart they are.
    """

    image: ImageTransform
    num_frames: int
    frame_stride: int = 1

    def draw(self, generator: torch.Generator) -> VideoAugmentation:
        """Draw a sample's augmentation."""
        frames = self.image.draw(generator)
        start = torch.rand(1, generator=generator, dtype=torch.float64).item()
        return VideoAugmentation(frames, None if self.image.center_crop else start)

    def micro_conditions(self, size: tuple[int, int], augmentation: VideoAugmentation) -> dict[str, torch.Tensor]:
        """As [`~diffusers_dtr.training.images.ImageTransform.micro_conditions`], of every frame."""
        return self.image.micro_conditions(size, augmentation.frames)

    def __call__(self, video: Video, augmentation: VideoAugmentation) -> torch.Tensor:
        """Make a clip.

        Args:
            video: With enough frames.
            augmentation: Where it starts, and what is done to its frames.

        Returns:
            `(channels, num_frames, resolution, resolution)`, float32 in [-1, 1].
        """
        room = video.num_frames - (self.num_frames - 1) * self.frame_stride
        start = (room - 1) // 2 if augmentation.start is None else int(augmentation.start * room)
        numbers = [start + number * self.frame_stride for number in range(self.num_frames)]
        return torch.stack([self.image(frame, augmentation.frames) for frame in video.read(numbers)], dim=1)
