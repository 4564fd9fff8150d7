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


def test_a_folder_that_another_run_made_meanwhile_is_taken(tmp_path):
    folder = tmp_path / "cache"
    build_folder(folder, lambda partial: [folder.mkdir(), (folder / "theirs").touch(), (partial / "ours").touch()])
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]
