"""Reading the authors' files: their weights come out, and nothing that is in them runs."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from original_checkpoints import fake_omegaconf, omegaconf_of, same
from safetensors.torch import save_file

from diffusers_dtr.conversion import checkpoint_file, load_original_checkpoint
from diffusers_dtr.conversion.masks import MASK_BUFFER


SETTINGS = {
    "general": {"image_size": 256, "lr": 1e-4, "mixed_precision": True, "vae": "ema", "root": Path("/data")},
    "betas": [0.9, 0.999],
}


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator).half()}


def authors_checkpoint(**more):
    """What DTR's and ANT's training scripts save."""
    args = argparse.Namespace(data_path="/home/somebody/imagenet", iterations=400_000, lr=1e-4, resume=None)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {"model": weights(0), "ema": weights(1), "opt": optimizer.state_dict(), "args": args, **more}


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request, tmp_path):
    """Saves as torch does today, or as it did before 1.6."""

    def save(checkpoint):
        torch.save(checkpoint, tmp_path / "0400000.pt", _use_new_zipfile_serialization=request.param)
        return tmp_path / "0400000.pt"

    return save


# ---- what is read


def test_averaged_weights_are_read_unless_others_are_named(save):
    path = save(authors_checkpoint())
    assert same(load_original_checkpoint(path), weights(1))
    assert same(load_original_checkpoint(str(path), "model"), weights(0))


def test_a_single_state_dict_is_read_from_either_format(save, tmp_path):
    table = torch.arange(12.0).reshape(3, 4)
    state_dict = {**weights(), "part of a larger tensor": table[:, 1:3], "c": torch.nn.Parameter(torch.ones(2))}
    assert same(load_original_checkpoint(save(state_dict)), state_dict)
    save_file(weights(), tmp_path / "dit.safetensors")
    assert same(load_original_checkpoint(tmp_path / "dit.safetensors"), weights())


def test_arguments_are_not_built_and_of_them_numbers_and_strings_alone_are_kept(save):
    before = set(torch.serialization.get_safe_globals())
    with fake_omegaconf() as modules:
        path = save(authors_checkpoint(config=omegaconf_of(modules, SETTINGS), uw={"log_var": torch.zeros(8)}))
    assert same(load_original_checkpoint(path), weights(1))
    assert "omegaconf" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == before
    read = checkpoint_file._load_restricted(path)
    assert type(read["args"]) is type(read["config"]) is checkpoint_file.Recorded
    args = {"data_path": "/home/somebody/imagenet", "iterations": 400_000, "lr": 1e-4, "resume": None}
    general = {name: value for name, value in SETTINGS["general"].items() if name != "root"}
    expected = {f"args.{name}": value for name, value in args.items()}
    expected |= {f"config.general.{name}": value for name, value in general.items()}
    expected |= {"config.betas.0": 0.9, "config.betas.1": 0.999}
    assert checkpoint_file.read_original_checkpoint(path).settings == expected
    assert checkpoint_file.read_original_checkpoint(save(weights())).settings is None
    assert checkpoint_file.read_original_checkpoint(save({"ema": weights()})).settings == {}


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="/proc/self/maps is not there to look at")
def test_weights_are_mapped_and_not_copied(tmp_path):
    torch.save({"model": weights(), "ema": {"a": torch.ones(1000)}}, tmp_path / "big.pt")
    (tensor,) = load_original_checkpoint(tmp_path / "big.pt").values()
    spans = [line.split("-", 1) for line in Path("/proc/self/maps").read_text().splitlines() if "big.pt" in line]
    assert any(int(low, 16) <= tensor.data_ptr() < int(rest.split()[0], 16) for low, rest in spans)


# ---- what is refused


class Executes:
    """Unpickled, this runs a shell command that leaves a file behind."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch '{self.proof}'",)


class Evaluates(Executes):
    """The same with a builtin function."""

    def __reduce__(self):
        return eval, (f"open({str(self.proof)!r}, 'w')",)


HOSTILE = {
    "as_the_checkpoint": lambda bad: bad,
    "in_the_arguments": lambda bad: authors_checkpoint(args=argparse.Namespace(lr=bad)),
    "nested": lambda bad: authors_checkpoint(opt={"state": [{"deep": (1, {"er": [bad]})}]}),
    "in_a_state_dict": lambda bad: {"ema": weights(), "model": {**weights(), "c": bad}},
    "as_a_key": lambda bad: {**weights(), (bad,): 1},
}


@pytest.mark.parametrize("place", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(("bad", "name"), [(Executes, r"(posix|nt)\.system"), (Evaluates, "eval")])
def test_nothing_that_a_file_asks_for_is_run(save, tmp_path, place, bad, name):
    proof = tmp_path / "ran"
    path = save(place(bad(proof)))
    with pytest.raises(ValueError, match=rf"0400000\.pt names `{name}`, which is neither a tensor") as error:
        load_original_checkpoint(path)
    assert not proof.exists()
    assert "weights_only" not in str(error.value)
    # And that the file does run code where nobody takes care.
    torch.load(path, weights_only=False)
    assert proof.exists()


def write_zip(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)


def test_stand_ins_cannot_be_made_to_call_anything(tmp_path):
    """The state of a skipped object, and calls of the names that are skipped, come to nothing."""
    # builtins.list(("ab",)), as __reduce__ of any class may say, then state with names that Python gives a meaning to.
    stream = b"\x80\x02c__builtin__\nlist\nX\x02\x00\x00\x00ab\x85R}X\x09\x00\x00\x00__class__K\x01sb."
    assert pickle.loads(b"\x80\x02c__builtin__\nlist\nX\x02\x00\x00\x00ab\x85R.") == ["a", "b"]
    write_zip(tmp_path / "list.pt", **{"archive/data.pkl": stream, "archive/version": "3\n"})
    with pytest.raises(ValueError, match=r"must name a state dict in list\.pt, which has none"):
        load_original_checkpoint(tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("value", "name"), [(np.float64(1), r"numpy\.\S*scalar"), (Path, "pathlib"), (argparse.ArgumentParser, "argparse")]
)
def test_what_is_not_known_is_named(save, value, name):
    with pytest.raises(ValueError, match=rf"names `{name}"):
        load_original_checkpoint(save(authors_checkpoint(extra=value)))


def test_an_unknown_module_is_named_and_not_imported(save, tmp_path, monkeypatch):
    (tmp_path / "careless_module.py").write_text("import pathlib\nclass Thing: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    import careless_module

    path = save({"ema": weights(), "thing": careless_module.Thing()})
    (tmp_path / "careless_module.py").write_text("raise SystemExit('imported')\n")
    del sys.modules["careless_module"]
    with pytest.raises(ValueError, match=r"names `careless_module\.Thing`"):
        load_original_checkpoint(path)
    assert "careless_module" not in sys.modules


# ---- what is not there


@pytest.mark.parametrize(
    ("checkpoint", "arguments", "message"),
    [
        ({"model": weights()}, [], r"`weights`='ema' must name a state dict in 0400000\.pt, which has 'model'\."),
        (authors_checkpoint(model=None), ["model"], r"'model' must name a state dict .* which has 'ema'\."),
        ([weights()], [], "which has none"),
        ({None: weights()}, [], "which has None"),
        ({"a": 1.0}, [], "which has none"),
        (weights(), ["model"], r"`weights` must be left out: 0400000\.pt is a single state dict, got 'model'\."),
        (weights(), ["opt"], "`weights` must be one of ema, model, got 'opt'"),
    ],
)
def test_weights_that_are_not_there_are_an_error(save, checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_original_checkpoint(save(checkpoint), *arguments)


@pytest.mark.parametrize("kept", [0, 10, 1000, -100])
def test_a_truncated_file_is_an_error(save, kept):
    path = save(authors_checkpoint())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"0400000\.pt is not a checkpoint of tensors, or is damaged"):
        load_original_checkpoint(path)


def test_another_file_is_an_error(tmp_path):
    (tmp_path / "notes.safetensors").write_text("These are notes.")
    with pytest.raises(ValueError, match=r"notes\.safetensors is not a checkpoint of tensors, or is damaged"):
        load_original_checkpoint(tmp_path / "notes.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_original_checkpoint(tmp_path / "none.pt")


# ---- what claims more than there is

MASK = f"a.{MASK_BUFFER}"
ENDLESS = torch.ones(1).expand(10**6, 1000)
TOO_LARGE = r"tensors of 0400000\.pt must be in the file, but they claim [\d,]+ bytes"
NO_DATA = r"`a` in 0400000\.pt must be a dense tensor with its data"


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        pytest.param({"a": ENDLESS}, TOO_LARGE, id="one number repeated"),
        pytest.param(dict.fromkeys(map(str, range(1000)), torch.ones(64)), TOO_LARGE, id="views of one storage"),
        pytest.param({"a": torch.ones(2000).as_strided((1000, 1000), (1, 1))}, TOO_LARGE, id="overlapping windows"),
        pytest.param(dict.fromkeys([*"abcdefgh", MASK], torch.ones(10_000)), TOO_LARGE, id="under a mask's name too"),
        pytest.param({MASK: ENDLESS}, TOO_LARGE, id="in a mask"),
        pytest.param({"ema": weights(), "model": {"a": ENDLESS}}, TOO_LARGE, id="in weights not asked for"),
        pytest.param({"a": torch.ones(10**6, 10**6, device="meta")}, NO_DATA, id="meta"),
        pytest.param({"a": torch.eye(2).to_sparse()}, NO_DATA, id="sparse"),
    ],
)
def test_tensors_that_are_not_in_the_file_are_refused(save, claim, message):
    with pytest.raises(ValueError, match=message):
        load_original_checkpoint(save(claim))


def test_masks_of_all_blocks_may_be_one_table(save):
    masks = dict.fromkeys((f"blocks.{block}.{MASK_BUFFER}" for block in range(9)), torch.ones(10_000))
    assert same(load_original_checkpoint(save(masks)), masks)


def test_a_compressed_file_is_refused_also_if_only_torch_can_read_it(tmp_path):
    path, plain = tmp_path / "bomb.pt", tmp_path / "plain.pt"
    torch.save(weights(), plain)
    with zipfile.ZipFile(plain) as read:
        write_zip(path, zipfile.ZIP_DEFLATED, **{name: read.read(name) for name in read.namelist()})
    with pytest.raises(ValueError, match=r"bomb\.pt must hold its tensors as .* is compressed"):
        load_original_checkpoint(path)
    # Of each entry of the directory, the version of zip that is needed: one that there is not.
    head, *entries = path.read_bytes().split(b"PK\x01\x02")
    path.write_bytes(b"PK\x01\x02".join([head, *(entry[:2] + b"\x63\x00" + entry[4:] for entry in entries)]))
    assert same(torch.load(path, weights_only=True), weights())
    with pytest.raises(ValueError, match=r"bomb\.pt is not a checkpoint of tensors, or is damaged \(NotImpl"):
        load_original_checkpoint(path)
