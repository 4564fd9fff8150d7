import torch
from torch import nn

from diffusers_dtr.caches import build_folder, content_key, fingerprint


def test_keys_tell_values_names_types_and_shapes_apart():
    values = torch.arange(6.0)
    variants = [
        [("a", values)],
        [("b", values)],
        [("a", values.view(2, 3))],
        [("a", values.bfloat16())],
        [("a", values.view(torch.int32))],
        [("a", values + 1e-6)],
        [("a", values), ("b", values)],
    ]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
    assert fingerprint([("a", torch.stack([values, values], 1)[:, 0])]) == fingerprint([("a", values)])
    module = nn.Linear(2, 3)
    key = content_key({"a": 1}, [module])
    assert key == content_key({"a": 1}, [module]) != content_key({"a": 2}, [module])
    nn.init.zeros_(module.bias)
    assert key != content_key({"a": 1}, [module])


def test_a_folder_that_another_run_made_meanwhile_is_taken(tmp_path):
    folder = tmp_path / "cache"
    build_folder(folder, lambda partial: [folder.mkdir(), (folder / "theirs").touch(), (partial / "ours").touch()])
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]
