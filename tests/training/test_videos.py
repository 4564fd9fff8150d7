import json
import logging
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from test_images import icc_profile, noise_image

from diffusers_dtr.training.data.images import UnreadableImageError, decode_image
from diffusers_dtr.training.data.samples import ImageDataset
from diffusers_dtr.training.data.videos import TrainingVideos, Video, VideoTransform, load_training_videos


def frames(count: int) -> list[Image.Image]:
    """Whose red tells their number, each ten times as bright as its number."""
    return [Image.new("RGB", (12, 8), (10 * number, 0, 0)) for number in range(count)]


def make_folder(path: Path, pictures: int | list[Image.Image], name: str = "{:03d}.png") -> Path:
    path.mkdir(parents=True)
    for number, frame in enumerate(frames(pictures) if isinstance(pictures, int) else pictures):
        frame.save(path / name.format(number))
    return path


def make_webp(path: Path, count: int) -> Path:
    first, *rest = frames(count)
    first.save(path, save_all=True, append_images=rest, lossless=True)
    return path


def make_mp4(path: Path, count: int, picture: Image.Image | None = None) -> Path:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for frame in frames(count) if picture is None else [picture] * count:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.resize((16, 16)))))
        container.mux(stream.encode())
    return path


def reds(images: list[Image.Image]) -> list[int]:
    return [round(np.asarray(image)[..., 0].mean() / 10) for image in images]


def metadata(path: Path, *lines: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (path / "metadata.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return path


def listed(path: Path, *rows: tuple[str, object]) -> Path:
    return metadata(path, *({"file_name": name, "text": caption} for name, caption in rows))


def load(folder: Path, num_frames: int = 1, stride: int = 1) -> TrainingVideos:
    return load_training_videos(folder, "text", num_frames, stride, folder.parent / "cache")


def only(folder: Path, name: str = "clip") -> Video:
    return load(listed(folder, (name, "one"))).videos[0]


@pytest.mark.parametrize(("make", "name"), [(make_folder, "clip"), (make_webp, "clip.webp"), (make_mp4, "clip.mp4")])
def test_frames_are_read_in_order_from_folders_moving_images_and_video_files(make, name, tmp_path):
    make(tmp_path / name, 9)
    video = only(tmp_path, name)
    assert video.num_frames == 9
    assert reds(video.read([2, 3, 7])) == [2, 3, 7]


@pytest.mark.parametrize(("stride", "center"), [(1, False), (2, False), (1, True)])
def test_clips_are_consecutive_frames_that_start_everywhere_or_in_the_middle(stride, center, tmp_path):
    make_folder(tmp_path / "clip", 9)
    videos = load(listed(tmp_path, ("clip", "one")), 3, stride)
    transform = VideoTransform(8, center_crop=center, num_frames=3, frame_stride=stride)
    dataset = ImageDataset(videos, transform, seed=0)
    starts = set()
    for epoch in range(100):
        pixels = dataset[epoch, 0]["pixel_values"]
        assert pixels.shape == (3, 3, 8, 8)
        numbers = ((pixels[0, :, 0, 0] + 1) * 12.75).round().int().tolist()
        assert numbers == [numbers[0] + step * stride for step in range(3)]
        starts.add(numbers[0])
    assert starts == ({3} if center else set(range(9 - 2 * stride)))
    assert torch.equal(dataset[5, 0]["pixel_values"], dataset[5, 0]["pixel_values"])


def test_all_frames_are_cropped_and_mirrored_alike(tmp_path):
    make_folder(tmp_path / "clip", [noise_image(12, 8)] * 4)
    transform = VideoTransform(8, random_flip=True, num_frames=4)
    for seed in range(8):
        clip = transform(only(tmp_path), transform.draw(torch.Generator().manual_seed(seed)))
        assert torch.equal(clip, clip[:, :1].expand_as(clip))


def test_videos_that_are_too_short_are_counted_and_named(tmp_path):
    make_folder(tmp_path / "long", 9)
    make_folder(tmp_path / "short", 4)
    message = r"at least 5 frames, for `--num_frames` 3 with `--frame_stride` 2: 1 have fewer, such as .*short with 4"
    with pytest.raises(ValueError, match=message):
        load(listed(tmp_path, ("long", "one"), ("short", "two")), 3, 2)


# ---- what frames are


def test_frames_are_the_images_that_are_not_hidden_in_the_order_of_their_numbers(tmp_path):
    clip = make_folder(tmp_path / "clip", 12, "frame_{}.png")
    for name in (".000.png", "._001.png", "thumbs.db", "notes.txt", "more/9.png"):
        (clip / name).parent.mkdir(exist_ok=True)
        (clip / name).write_bytes(b"no image")
    assert reds(only(tmp_path).read(range(12))) == [*range(12)]


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("special", ["profile", "orientation", "transparency"])
def test_frames_of_moving_images_are_decoded_as_still_images_are(special, suffix, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    options = {"profile": {"icc_profile": icc_profile()}, "orientation": {"exif": exif}}.get(special, {})
    options |= {"lossless": True, "exact": True} if suffix == ".webp" else {}
    pictures = [noise_image(12, 8, seed) for seed in range(3)]
    if special == "transparency":
        for picture in pictures:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    pictures[0].save(tmp_path / f"clip{suffix}", save_all=True, append_images=pictures[1:], **options)
    video = only(tmp_path, f"clip{suffix}")
    for picture, frame in zip(pictures, video.read(range(3)), strict=True):
        picture.save(tmp_path / f"still{suffix}", **options)
        still = decode_image({"path": str(tmp_path / f"still{suffix}"), "bytes": None})
        assert (video.size, frame.mode) == (still.size, still.mode)
        assert np.array_equal(frame, still)


def test_what_is_transparent_in_a_gif_is_white(tmp_path):
    pictures = [Image.new("RGBA", (8, 8), (0, 0, 200, 255)) for _ in range(2)]
    for number, picture in enumerate(pictures):
        picture.paste((0, 0, 0, 0), (0, number + 1, 8, 8))
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:], disposal=2)
    transform = VideoTransform(8, num_frames=2)
    clip = transform(only(tmp_path, "clip.gif"), transform.draw(torch.Generator()))
    assert (clip[:, :, 2:] == 1).all()
    assert (clip[0, :, 0] == -1).all()


def test_video_files_are_turned_as_they_were_held(tmp_path):
    path = make_mp4(tmp_path / "clip.mp4", 2, Image.fromarray(np.tile(np.uint8([[[255], [0]]]), (1, 1, 3))))
    one = 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    before, film, track = path.read_bytes().split(identity)
    path.write_bytes(before + identity + film + clockwise + track)
    (frame,) = only(tmp_path, "clip.mp4").read([1])
    pixels = np.asarray(frame.convert("L"))
    assert pixels[:4].min() > 200  # what was left is on top
    assert pixels[-4:].max() < 50


# ---- what a folder holds


def test_every_file_is_used_or_counted_by_reason(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="diffusers_dtr")
    folder = tmp_path / "data"
    for name in ("a", "b", "unlisted"):
        make_folder(folder / name, 2)
    for name in ("b/notes.txt", "other.mp4", "README.md", "metadata.csv"):
        (folder / name).write_bytes(b"")
    load(listed(folder, ("a", "one"), ("b", "two")))
    (line,) = [message for message in caplog.messages if "files used" in message]
    assert "5 of 11 files used; left out are" in line
    assert "4 not listed in the metadata (README.md, other.mp4, unlisted/000.png, …)" in line
    assert "1 not of a format that Pillow opens (b/notes.txt)" in line
    assert "1 of metadata that no flag asks for (metadata.csv)" in line


def test_zip_files_and_folders_in_the_folder_may_hold_videos(tmp_path):
    make_folder(tmp_path / "source" / "part" / "clip", 2)
    make_webp(tmp_path / "source" / "part" / "clip.webp", 3)
    listed(tmp_path / "source" / "part", ("clip", "one"), ("./clip.webp", "two"))
    shutil.make_archive(tmp_path / "data" / "all", "zip", tmp_path / "source")
    videos = load(tmp_path / "data")
    assert [video.num_frames for video in videos.videos] == [2, 3]
    assert videos.file_names == ["clip", "clip.webp"]


@pytest.mark.parametrize(
    ("rows", "captions"),
    [
        ([("a", ["one", "two"]), ("b", ["three"])], [["one", "two"], ["three"]]),
        ([("a", "one"), ("a", "two")], [["one"], ["two"]]),
        ([("a", ""), ("b", "one\u2028two\x85three")], [[""], ["one\u2028two\x85three"]]),
    ],
    ids=["several", "listed twice", "empty, separators of lines"],
)
def test_captions_are_those_of_the_lines(rows, captions, tmp_path):
    make_folder(tmp_path / "a", 1)
    make_folder(tmp_path / "b", 1)
    videos = load(listed(tmp_path, *rows))
    assert [videos.captions[row] for row in range(len(videos))] == captions


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "`line 2 of .*metadata.jsonl` is not JSON"),
        ("[1]", "`line 2 of .*metadata.jsonl` must hold a JSON object, got list"),
        ({"file_name": "clip"}, "`line 2 of .*metadata.jsonl` must have `text` and `file_name`, got {'file_name'"),
        ({"file_name": 3, "text": "a"}, "`file_name` of `line 2 of .*` must be a string, got 3"),
        ({"file_name": "clip", "text": None}, "`text` of `line 2 of .*` must be a string, got None"),
        ({"file_name": "clip", "text": ["a"]}, "`text` of `line 2 of .*` must be a string, got"),
        *(
            ({"file_name": name, "text": "a"}, "`file_name` of `line 2 of .* beside it, got '")
            for name in ("missing", "empty", "../outside", "clip/../../outside", "ABSOLUTE")
        ),
    ],
)
def test_lines_that_list_no_video_are_named(line, message, tmp_path):
    make_folder(tmp_path / "outside", 2)
    folder = tmp_path / "data"
    clip = make_folder(folder / "clip", 2)
    (folder / "empty").mkdir()
    line = {**line, "file_name": str(clip)} if "ABSOLUTE" in str(line) else line
    with pytest.raises(ValueError, match=message):
        load(metadata(folder, {"file_name": "clip", "text": "one"}, line))


def test_a_folder_without_lines_says_what_it_holds(tmp_path):
    make_folder(tmp_path / "clip", 2)
    for folder in (tmp_path, metadata(tmp_path)):
        with pytest.raises(ValueError, match=r"must have a metadata\.jsonl, .*'text'.* found images: 2 in 'clip'"):
            load(folder)
    with pytest.raises(ValueError, match=r"`train_data_dir` must be a folder, got '.*nowhere'"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["damaged.webp", "damaged.mp4", "damaged"])
def test_videos_that_cannot_be_read_are_named(name, tmp_path):
    (tmp_path / "damaged").mkdir()
    for file in ("damaged.webp", "damaged.mp4", "damaged/0.png"):
        (tmp_path / file).write_bytes(b"none")
    with pytest.raises(UnreadableImageError, match=rf"The video .*{name} cannot be read: "):
        only(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [("thumb.png", r"frames must be of one size, got .*thumb\.png"), ("000.bmp", "several files for its frame 000")],
)
def test_what_is_no_frame_of_the_video_is_named(name, message, tmp_path):
    Image.new("RGB", (2, 2)).save(make_folder(tmp_path / "clip", 3) / name)
    with pytest.raises(UnreadableImageError, match=message):
        only(tmp_path)
