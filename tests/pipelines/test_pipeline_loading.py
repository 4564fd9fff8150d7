"""Saving and loading, from folders and from a Hub: the same classes, weights, names and samples come back."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from huggingface_hub import HfApi
from tiny_autoencoders import tiny_vae
from tiny_dit import plain_dit, routed_dit

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel


NAMES = {3: "three, drei", 7: "seven"}
# What all tests ask their pipelines for; DiTPipeline takes the same arguments.
ARGUMENTS = {"class_labels": [3, 7], "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "np"}


def make_dit(make=routed_dit):
    return make(num_embeds_ada_norm=1000, num_layers=1)  # DiTPipeline takes class 1000 for the null class


def make_pipeline(bias=0):
    transformer = make_dit()
    torch.nn.init.constant_(transformer.proj_out_2.bias, bias)
    return DTRPipeline(scheduler=DDIMScheduler(), transformer=transformer, vae=tiny_vae(), id2label=NAMES)


def draw(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**{**ARGUMENTS, **arguments}, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture
def diffusers_warnings(caplog):
    """What diffusers warns about, which it shows to the user but not to pytest."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


def saved_index(folder):
    index = json.loads((folder / "model_index.json").read_text())
    return {key: value for key, value in index.items() if key not in ("_diffusers_version", "_name_or_path")}


# ---- folders


def test_a_saved_pipeline_names_the_library_and_no_module_inside_it(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    assert saved_index(tmp_path) == {
        "_class_name": "DTRPipeline",
        "id2label": {"3": "three, drei", "7": "seven"},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers_dtr", "DTRTransformer2DModel"],
        "unet": [None, None],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    weights = [path.name for path in tmp_path.rglob("*.*") if path.suffix != ".json"]
    assert weights == ["diffusion_pytorch_model.safetensors"] * 2


@pytest.mark.parametrize("loader", [DTRPipeline, DiffusionPipeline])
def test_a_saved_pipeline_loads_whole_and_without_warnings(loader, tmp_path, diffusers_warnings):
    original = make_pipeline()
    original.save_pretrained(tmp_path)
    pipeline = loader.from_pretrained(tmp_path)
    assert diffusers_warnings() == []
    assert {type(pipeline), type(pipeline.transformer)} == {DTRPipeline, DTRTransformer2DModel}
    assert pipeline.unet is None
    weights = original.transformer.state_dict()
    assert pipeline.transformer.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in pipeline.transformer.state_dict().items())
    assert pipeline.get_label_ids(["drei", "seven"]) == [3, 7]
    assert draw(pipeline, class_labels=["drei", "seven"]).tolist() == draw(pipeline).tolist()
    index = saved_index(tmp_path)
    pipeline.save_pretrained(tmp_path)
    assert saved_index(tmp_path) == index


def test_a_pixel_space_unet_loads_without_what_it_lacks(tmp_path, diffusers_warnings):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, **blocks)
    DTRPipeline(scheduler=DDPMScheduler(), unet=unet).save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert (type(pipeline.unet), pipeline.transformer, pipeline.vae) == (UNet2DModel, None, None)
    assert (pipeline.config.id2label, pipeline.labels) == (None, {})
    assert draw(pipeline, class_labels=None, guidance_scale=1.0).shape == (1, 8, 8, 3)
    assert diffusers_warnings() == []


@pytest.mark.parametrize(
    ("make", "library", "cls"),
    [(plain_dit, "diffusers", DiTTransformer2DModel), (routed_dit, "diffusers_dtr", DTRTransformer2DModel)],
)
def test_a_folder_of_diffusers_own_pipeline_loads_as_theirs_and_as_ours(make, library, cls, tmp_path):
    pipeline = DiTPipeline(make_dit(make), tiny_vae(), DDIMScheduler())
    pipeline.save_pretrained(tmp_path)
    assert saved_index(tmp_path)["transformer"] == [library, cls.__name__]
    for loader, kind in ((DiffusionPipeline, DiTPipeline), (DTRPipeline, DTRPipeline)):
        loaded = loader.from_pretrained(tmp_path)
        assert (type(loaded), type(loaded.transformer)) == (kind, cls)
        assert abs(draw(loaded) - draw(pipeline)).max() < 1e-5


# ---- Hub


def test_a_repositorys_revisions_shards_and_variants_load_in_a_fresh_process_with_the_same_samples(
    hub, fresh_process, tmp_path
):
    """As in the README: diffusers alone does not know the class, and does once the package is imported."""
    make_pipeline().save_pretrained(tmp_path)
    make_pipeline().push_to_hub("owner/ours", max_shard_size="50KB")
    make_pipeline(1).push_to_hub("owner/ours", revision="other")
    make_pipeline(2).push_to_hub("owner/ours", variant="other")
    assert any("-of-" in path for path in HfApi().list_repo_files("owner/ours"))
    ways = [{}, {"revision": "other"}, {"variant": "other"}]
    ways += [{**way, "local_files_only": True} for way in ways]
    found = fresh_process(f"""
        import json, torch
        from diffusers import DiffusionPipeline
        found = []
        for source in ({str(tmp_path)!r}, "owner/ours"):
            try: DiffusionPipeline.from_pretrained(source)
            except (AttributeError, ValueError) as error: found.append(str(error))
        import diffusers_dtr
        for way in {ways!r}:
            pipeline = DiffusionPipeline.from_pretrained("owner/ours", **way)
            pipeline.set_progress_bar_config(disable=True)
            images = pipeline(**{ARGUMENTS!r}, generator=torch.Generator().manual_seed(0)).images
            found.append([type(pipeline).__name__, images.tolist()])
        print(json.dumps(found))
    """)
    from_folder, from_hub, *loaded = found
    assert (from_folder, "diffusers_dtr.py" in from_hub) == ("module diffusers has no attribute DTRPipeline", True)
    assert f"`{from_folder}`" in " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    assert {name for name, _ in loaded} == {"DTRPipeline"}
    for (_, images), bias in zip(loaded, [0, 1, 2] * 2, strict=True):
        assert abs(draw(make_pipeline(bias)) - np.array(images)).max() < 1e-5
