import os

import torch

from diffusers_dtr.training.cache_folders import build_folder, content_key


def module(weight: torch.Tensor) -> torch.nn.Module:
    made = torch.nn.Module()
    made.register_buffer("weight", weight)
    return made


def test_the_same_bytes_of_another_shape_or_type_have_another_name():
    weight = torch.arange(6.0)
    kinds = [weight, weight.reshape(2, 3), weight.reshape(3, 2), weight.view(torch.int32)]
    assert len({content_key({}, [module(kind)]) for kind in kinds}) == 4
    assert content_key({}, [module(weight)]) == content_key({}, [module(weight.clone())])


def test_files_are_on_the_disk_before_their_folder_has_its_name(tmp_path, monkeypatch):
    """Or a power cut could leave the name with half of the content."""
    written = []
    synchronize = os.fsync

    def fsync(file: int) -> None:
        assert not (tmp_path / "cache").exists()
        written.append(os.fstat(file).st_ino)
        synchronize(file)

    monkeypatch.setattr(os, "fsync", fsync)
    build_folder(tmp_path / "cache", lambda folder: [(folder / name).write_text(name) for name in "ab"])
    assert sorted(written) == sorted(path.stat().st_ino for path in (tmp_path / "cache").iterdir())
    assert len(written) == 2
