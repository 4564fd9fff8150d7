"""What a pipeline's index may name: nothing else is imported, and no code is run that nobody trusted."""

from __future__ import annotations

import json

import pytest
from diffusers import DDIMScheduler
from huggingface_hub import HfApi
from tiny_dit import routed_dit

from diffusers_dtr import DTRPipeline


@pytest.fixture
def folder(tmp_path):
    DTRPipeline(scheduler=DDIMScheduler(), transformer=routed_dit()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def poison(folder, **entries):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entries}))


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass X: pass\n"
POISONS = [
    {"transformer": ["os", "system"]},
    {"transformer": ["evil", "X"]},
    {"transformer": ["../evil", "X"]},
    {"transformer": ["/tmp/evil", "X"]},
    {"transformer": ["transformers.models", "X"]},
    {"vae": ["diffusers", "../X"]},
    {"vae": ["diffusers"]},
    {"vae": [["diffusers"], "X"]},
    {"_class_name": ["../evil", "X"]},
    {"_class_name": ["evil", "X"]},
    {"extra": ["evil", "X"]},
    {"subfolder": "../../x"},
    {"../evil": ["diffusers", "AutoencoderKL"]},
]
CASES = [*((entries, False) for entries in POISONS), *((entries, True) for entries in POISONS[:2])]


@pytest.mark.parametrize(("entries", "from_hub"), CASES, ids=str)
def test_an_index_that_names_other_libraries_or_paths_is_refused_and_nothing_is_run(
    request, folder, tmp_path, monkeypatch, entries, from_hub
):
    marker = tmp_path / "executed"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Where Python would find it, and where a path out of a component's folder leads.
    for place in (tmp_path, folder) if "transformer" in entries else (tmp_path,):
        (place / "evil.py").write_text(CODE.format(marker=str(marker)))
    poison(folder, **entries)
    source = folder
    if from_hub:
        request.getfixturevalue("hub")
        source = HfApi().create_repo("owner/tiny").repo_id
        HfApi().upload_folder(repo_id=source, folder_path=folder)
    for trust in ({}, {"trust_remote_code": True}):
        with pytest.raises((ValueError, OSError), match=r"model_index|evil"):
            DTRPipeline.from_pretrained(source, **trust)
    assert not marker.exists()


def test_code_in_the_folder_runs_only_for_those_who_trust_it(folder, tmp_path):
    marker = tmp_path / "executed"
    (folder / "transformer" / "evil.py").write_text(CODE.format(marker=str(marker)))
    poison(folder, transformer=["evil", "X"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        DTRPipeline.from_pretrained(folder)
    assert not marker.exists()
    with pytest.raises((ValueError, AttributeError)):
        DTRPipeline.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_the_error_says_what_was_named(folder):
    poison(folder, transformer=["os", "system"])
    with pytest.raises(ValueError, match=r"`transformer`, got \['os', 'system'\]: nothing of it was imported"):
        DTRPipeline.from_pretrained(folder)
