"""What training reads of files that others may have written: of the right types, or one clear error."""

from __future__ import annotations

import json

import pytest
import torch
from run_config import run_config
from safetensors.torch import save_file

from diffusers_dtr.models.lora_header import file_routing
from diffusers_dtr.training.config import ModelConfig
from diffusers_dtr.training.pretrained import pretrained_class_names, pretrained_component, pretrained_pipeline_class
from diffusers_dtr.training.run.resuming import RunState


NESTED = "[" * 10**5 + "]" * 10**5
WRONG_OBJECTS = ["[]", "null", "3", f'{{"a": {NESTED}}}', "{", "\xff"]


@pytest.mark.parametrize("text", WRONG_OBJECTS)
def test_what_is_no_object_is_refused_everywhere(text, tmp_path):
    def written(name):
        (tmp_path / name).write_text(text, encoding="latin-1")
        return tmp_path / name

    with pytest.raises(ValueError, match="JSON"):
        RunState.read(written("training_state.json"))
    with pytest.raises(ValueError, match="`--model_config` must be a JSON object"):
        run_config(model_config=str(written("config.json")))
    written("model_index.json")
    with pytest.raises((ValueError, OSError), match=r"JSON|cannot be made"):
        pretrained_pipeline_class(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"global_step": step} for step in (1.5, -1, 10**400)),
        *({"settings": settings} for settings in ([], None)),
        *({"changes": changes} for changes in ("many", [3])),
        *({"seconds": seconds} for seconds in ("nan", float("nan"))),
        {"other": 1},
    ],
)
def test_the_state_of_a_run_has_its_types(wrong, tmp_path):
    path = tmp_path / "training_state.json"
    path.write_text(json.dumps({"global_step": 3, "seconds": 2, **wrong}))
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name}.*{path}|{path}.*{name}") as caught:
        RunState.read(path)
    assert "FACTORY" not in str(caught.value)  # of a dataclass
    path.write_text(json.dumps({"global_step": 3, "seconds": 2}))
    assert (RunState.read(path).global_step, RunState.read(path).seconds) == (3, 2)


@pytest.mark.parametrize(
    "unet", ["UNet2DModel", 3, [], ["diffusers"], ["diffusers", 3], {"a": 1}, [["diffusers", "a"]]]
)
def test_the_components_of_a_pipeline_have_their_types(unet, tmp_path):
    config = ModelConfig(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", "unet": unet, "vae": None}))
    if unet:
        with pytest.raises(ValueError, match=r"`model_index\.json` must give `unet` as"):
            pretrained_component(config, "unet")
    assert pretrained_component(config, "vae") is None
    for names in (["cat"], {"0": 1}, {"cat": "0"}):
        (tmp_path / "model_index.json").write_text(json.dumps({"id2label": names}))
        with pytest.raises(ValueError, match="id2label"):
            pretrained_class_names(config)


@pytest.mark.parametrize("header", ["[]", "{", '{"unet": 3}', f'{{"unet": {NESTED}}}'])
def test_the_routing_of_adapters_has_its_types(header, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "lora.safetensors", {"diffusers_dtr_routing": header})
    with pytest.raises(ValueError, match="`diffusers_dtr_routing`"):
        file_routing(tmp_path / "lora.safetensors")
