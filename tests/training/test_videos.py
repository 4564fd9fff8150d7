import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_dtr.training.images import ImageTransform, UnreadableImageError
from diffusers_dtr.training.samples import ImageDataset
from diffusers_dtr.training.videos import Video, VideoTransform, load_training_videos


def frames(count: int) -> list[Image.Image]:
    """Whose red tells their number, each ten times as bright as its number."""
    return [Image.fromarray(np.full((8, 12, 3), (10 * number, 0, 0), dtype=np.uint8)) for number in range(count)]


def make_folder(path: Path, count: int) -> Path:
    path.mkdir(parents=True)
    for number, frame in enumerate(frames(count)):
        frame.save(path / f"{number:03d}.png")
    return path


def make_webp(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = frames(count)
    first.save(path, save_all=True, append_images=rest, lossless=True)
    return path


def make_mp4(path: Path, count: int) -> Path:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for frame in frames(count):
            container.mux(stream.encode(av.VideoFrame.from_image(frame.resize((16, 16)))))
        container.mux(stream.encode())
    return path


def reds(images: list[Image.Image]) -> list[int]:
    return [round(np.asarray(image)[..., 0].mean() / 10) for image in images]


def folder_of(path: Path, videos: dict[str, object]) -> Path:
    lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in videos.items()]
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(("make", "name"), [(make_folder, "clip"), (make_webp, "clip.webp"), (make_mp4, "clip.mp4")])
def test_frames_are_read_in_order_from_folders_moving_images_and_video_files(make, name, tmp_path):
    video = Video.open(make(tmp_path / name, 9))
    assert video.num_frames == 9
    assert reds(video.read([2, 3, 7])) == [2, 3, 7]


@pytest.mark.parametrize("stride", [1, 2])
def test_clips_are_consecutive_frames_and_start_everywhere(stride, tmp_path):
    make_folder(tmp_path / "clip", 9)
    videos = load_training_videos(folder_of(tmp_path, {"clip": "one"}), "text", 3, stride)
    dataset = ImageDataset(videos, VideoTransform(ImageTransform(8), 3, stride), seed=0)
    starts = set()
    for epoch in range(100):
        pixels = dataset[epoch, 0]["pixel_values"]
        assert pixels.shape == (3, 3, 8, 8)
        numbers = ((pixels[0, :, 0, 0] + 1) * 12.75).round().int().tolist()
        assert numbers == [numbers[0] + step * stride for step in range(3)]
        starts.add(numbers[0])
    assert starts == set(range(9 - 2 * stride))
    assert torch.equal(dataset[5, 0]["pixel_values"], dataset[5, 0]["pixel_values"])


def test_all_frames_are_cropped_and_mirrored_alike(tmp_path):
    (tmp_path / "clip").mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    for number in range(4):
        picture.save(tmp_path / "clip" / f"{number}.png")
    transform = VideoTransform(ImageTransform(8, random_flip=True), 4)
    for seed in range(8):
        augmentation = transform.draw(torch.Generator().manual_seed(seed))
        clip = transform(Video.open(tmp_path / "clip"), augmentation)
        assert torch.equal(clip, clip[:, :1].expand_as(clip))


def test_centre_crop_takes_the_middle_of_the_video(tmp_path):
    transform = VideoTransform(ImageTransform(8, center_crop=True), 3)
    clip = transform(Video.open(make_folder(tmp_path / "clip", 9)), transform.draw(torch.Generator()))
    assert ((clip[0, :, 0, 0] + 1) * 12.75).round().tolist() == [3, 4, 5]


def test_captions_may_be_several(tmp_path):
    make_folder(tmp_path / "a", 3)
    make_folder(tmp_path / "b", 3)
    videos = load_training_videos(folder_of(tmp_path, {"a": ["one", "two"], "b": ["three"]}), "text", 3, 1)
    assert [videos.captions[row] for row in range(2)] == [["one", "two"], ["three"]]
    assert "b (row 1)" in videos.name(1)


def test_videos_that_are_too_short_are_counted_and_named(tmp_path):
    make_folder(tmp_path / "long", 9)
    make_folder(tmp_path / "short", 4)
    folder = folder_of(tmp_path, {"long": "one", "short": "two"})
    message = r"at least 5 frames, for `--num_frames` 3 with `--frame_stride` 2: 1 have fewer, such as .*short with 4"
    with pytest.raises(ValueError, match=message):
        load_training_videos(folder, "text", 3, 2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "must hold a metadata.jsonl that lists its videos"),
        ([], "there is no line"),
        ([{"file_name": "a"}], "must have `file_name` and `text`: line 1 has not"),
    ],
)
def test_folders_that_do_not_list_their_videos_are_refused(lines, message, tmp_path):
    if lines is not None:
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=message):
        load_training_videos(tmp_path, "text", 3, 1)


@pytest.mark.parametrize("name", ["missing", "missing.webp", "damaged.webp", "damaged.mp4", "empty"])
def test_videos_that_cannot_be_read_are_named(name, tmp_path):
    (tmp_path / "damaged.webp").write_bytes(b"none")
    (tmp_path / "damaged.mp4").write_bytes(b"none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableImageError, match=rf"The video .*{name} cannot be read"):
        load_training_videos(folder_of(tmp_path, {name: "one"}), "text", 3, 1)
