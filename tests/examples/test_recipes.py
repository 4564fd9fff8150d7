"""What a model card says to type gives the samples of the run itself, to the bit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from text_to_image_runs import FAMILIES, every_family, make_captioned_images, train
from training_runs import EXAMPLES, arguments, load_script, make_images, run_main


SIZE = 8
LORA = ("--rank", 2, "--learning_rate", 0.1)


def run_code_of_card(run: Path, base: Path | None = None) -> list[Image.Image]:
    (code,) = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace(f"path/to/{run.name}", str(run)).replace("path/to/base-model", str(base))
    names = {}
    exec(code, names)
    return names["images"]


def assert_same_samples(images: list[Image.Image], run: Path) -> None:
    """The images are the first of the run's last grid."""
    with Image.open(max(run.glob("samples/*.png"))) as file:
        grid = np.asarray(file.convert("RGB"))
    tiles = [
        grid[y : y + SIZE, x : x + SIZE] for y in range(0, len(grid), SIZE) for x in range(0, grid.shape[1], SIZE)
    ]
    assert len(images) >= 2
    assert len({tile.tobytes() for tile in tiles[: len(images)]}) == len(images)
    for image, tile in zip(images, tiles, strict=False):
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), tile)


@every_family
@pytest.mark.parametrize("flags", [(), LORA, (*LORA, "--route_lora")], ids=["full", "lora", "routed lora"])
def test_text_to_image_models_are_loaded_and_sampled_as_trained(name, flags, tmp_path):
    base = FAMILIES[name].save_plain(tmp_path / "base")
    images = make_captioned_images(tmp_path / "images")
    # Not what the base predicts: a pipeline that goes on with its scheduler samples something else.
    other = () if name == "sd3" else ("--prediction_type", "v_prediction")
    sampling = ("--validation_guidance_scale", 3, "--validation_num_inference_steps", 3, "--num_validation_images", 3)
    run = train(name, images, tmp_path / "run", base, *sampling, *other, *flags)
    assert_same_samples(run_code_of_card(run, base), run)


@pytest.mark.parametrize("script", ["class_conditional", "unconditional"])
def test_pipelines_of_classes_or_none_are_loaded_and_sampled_as_trained(script, tmp_path):
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
    flags = ("--model_config" if script == "class_conditional" else "--transformer_config", config)
    guidance = ("--validation_guidance_scale", 2) if script == "class_conditional" else ()
    module = load_script(EXAMPLES / script / f"train_{script}.py")
    sampling = ("--validation_num_inference_steps", 3, "--num_validation_images", 3, "--max_train_steps", 2)
    images = make_images(tmp_path / "images")
    run = run_main(module, arguments(images, tmp_path / "run", *sampling, *guidance, source=flags))
    assert_same_samples(run_code_of_card(run), run)
