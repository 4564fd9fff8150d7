"""Saving and loading, from folders and from a Hub: the same classes, weights, names and samples come back."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from huggingface_hub import HfApi

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel


NAMES = {3: "three, drei", 7: "seven"}
# What all tests ask their pipelines for; DiTPipeline takes the same arguments.
ARGUMENTS = {"class_labels": [3, 7], "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "np"}


def make_dit(cls=DTRTransformer2DModel, seed=0):
    # DiTPipeline takes class 1000 for the null class.
    model = cls(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        out_channels=8,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def make_vae():
    torch.manual_seed(0)
    return AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2).eval()


def make_pipeline(**components):
    components = {"transformer": make_dit(), "vae": make_vae(), "id2label": NAMES, **components}
    return DTRPipeline(scheduler=DDIMScheduler(), **components)


def draw(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**{**ARGUMENTS, **arguments}, generator=torch.Generator().manual_seed(0)).images


def digest(images):
    return hashlib.sha256(images.tobytes()).hexdigest()


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
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json") == [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors",
    ]


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


def test_names_survive_being_saved_again(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "first")
    DTRPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert DTRPipeline.from_pretrained(tmp_path / "second").labels == make_pipeline().labels
    assert saved_index(tmp_path / "first") == saved_index(tmp_path / "second")


def test_a_pixel_space_unet_loads_without_what_it_lacks(tmp_path, diffusers_warnings):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    DTRPipeline(scheduler=DDPMScheduler(), unet=unet).save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert (type(pipeline.unet), pipeline.transformer, pipeline.vae) == (UNet2DModel, None, None)
    assert (pipeline.config.id2label, pipeline.labels) == (None, {})
    assert draw(pipeline, class_labels=None, guidance_scale=1.0).shape == (1, 8, 8, 3)
    assert diffusers_warnings() == []


def test_components_given_to_from_pretrained_replace_saved_ones(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    other, scheduler = make_dit(seed=1), EulerDiscreteScheduler()
    pipeline = DTRPipeline.from_pretrained(tmp_path, transformer=other, scheduler=scheduler, vae=None)
    assert pipeline.transformer is other
    assert pipeline.scheduler is scheduler
    assert pipeline.vae is None


def test_a_single_component_loads_from_its_subfolder(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    model = DTRTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert torch.equal(model.proj_out_2.weight, make_dit().proj_out_2.weight)


def test_a_pipeline_loads_in_half_precision_and_from_a_variant(tmp_path):
    make_pipeline().to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.bf16.safetensors").exists()
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        DTRPipeline.from_pretrained(tmp_path)
    pipeline = DTRPipeline.from_pretrained(tmp_path, variant="bf16", torch_dtype=torch.bfloat16)
    assert {pipeline.transformer.dtype, pipeline.vae.dtype} == {torch.bfloat16}
    in_float = DTRPipeline.from_pretrained(tmp_path, variant="bf16", torch_dtype=torch.float32)
    assert {in_float.transformer.dtype, in_float.vae.dtype} == {torch.float32}
    # In another type a generator may draw other noise.
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert abs(draw(pipeline, latents=latents) - draw(in_float, latents=latents)).max() < 0.1


@pytest.mark.parametrize("cls", [DiTTransformer2DModel, DTRTransformer2DModel])
def test_a_folder_of_diffusers_own_pipeline_loads_as_ours(cls, tmp_path):
    DiTPipeline(make_dit(cls), make_vae(), DDIMScheduler()).save_pretrained(tmp_path)
    pipeline = DTRPipeline.from_pretrained(tmp_path)
    assert type(pipeline.transformer) is cls
    expected = draw(DiTPipeline.from_pretrained(tmp_path))
    assert abs(draw(pipeline) - expected).max() < 1e-5


def test_diffusers_own_pipeline_runs_with_our_transformer_and_loads_it_from_a_folder(tmp_path):
    pipeline = DiTPipeline(make_dit(), make_vae(), DDIMScheduler())
    assert draw(pipeline).shape == (2, 8, 8, 3)
    pipeline.save_pretrained(tmp_path)
    assert saved_index(tmp_path)["transformer"] == ["diffusers_dtr", "DTRTransformer2DModel"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert (type(loaded), type(loaded.transformer)) == (DiTPipeline, DTRTransformer2DModel)
    assert abs(draw(loaded) - draw(pipeline)).max() < 1e-5


# ---- Hub

# With the network, then without. The branch `shards` has the transformer in several files.
WAYS = [
    {**way, **offline}
    for offline in ({}, {"local_files_only": True})
    for way in ({}, {"revision": "shards"}, {"variant": "other"})
]

LOAD_IN_ALL_WAYS = """
    import hashlib, json, os, torch, diffusers, diffusers_dtr

    assert not os.path.exists(os.path.join(os.environ["HF_HOME"], "hub"))
    loads = [
        (diffusers_dtr.DTRPipeline, "owner/ours"),
        (diffusers.DiffusionPipeline, "owner/ours"),
        (diffusers.DiTPipeline, "owner/theirs"),
        (diffusers.DiffusionPipeline, "owner/theirs"),
    ]
    found = []
    for loader, repo in loads:
        for way in {ways!r}:
            pipeline = loader.from_pretrained(repo, **way)
            pipeline.set_progress_bar_config(disable=True)
            images = pipeline(**json.loads({arguments!r}), generator=torch.Generator().manual_seed(0)).images
            names = [type(pipeline).__name__, type(pipeline.transformer).__name__]
            found.append([*names, hashlib.sha256(images.tobytes()).hexdigest()])
    print(json.dumps(found))
"""


def test_pipelines_load_from_a_hub_in_a_fresh_process_with_the_same_samples(hub, fresh_process, tmp_path):
    ours, theirs = make_pipeline(), DiTPipeline(make_dit(), make_vae(), DDIMScheduler())
    samples = {}
    for name, pipeline in (("ours", ours), ("theirs", theirs)):
        pipeline.push_to_hub(f"owner/{name}")
        pipeline.push_to_hub(f"owner/{name}", variant="other")
        pipeline.save_pretrained(tmp_path / name, max_shard_size="50KB")
        HfApi().create_branch(f"owner/{name}", branch="shards")
        HfApi().upload_folder(
            repo_id=f"owner/{name}", folder_path=tmp_path / name, revision="shards", delete_patterns="*.safetensors"
        )
        assert any("-of-" in path for path in HfApi().list_repo_files(f"owner/{name}", revision="shards"))
        # Loaded weights lie elsewhere in memory than new ones, which changes the last bits of matrix products.
        samples[name, "shards"] = digest(draw(type(pipeline).from_pretrained(tmp_path / name)))
        pipeline.save_pretrained(tmp_path / "whole" / name)
        samples[name, "main"] = digest(draw(type(pipeline).from_pretrained(tmp_path / "whole" / name)))
    found = fresh_process(LOAD_IN_ALL_WAYS.format(arguments=json.dumps(ARGUMENTS), ways=WAYS))
    assert found == [
        [pipeline_class, "DTRTransformer2DModel", samples[name, way.get("revision", "main")]]
        for pipeline_class, name in (("DTRPipeline", "ours"), ("DiTPipeline", "theirs"))
        for way in WAYS * 2
    ]


def test_a_pushed_pipeline_has_its_files_and_a_card_on_the_hub(hub):
    make_pipeline().push_to_hub("owner/ours", private=True)
    info = HfApi().model_info("owner/ours")
    assert info.private
    assert {file.rfilename for file in info.siblings} == {
        ".gitattributes",
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_an_older_revision_loads_from_a_hub(hub):
    make_pipeline().push_to_hub("owner/ours")
    first = HfApi().model_info("owner/ours").sha
    make_pipeline(transformer=make_dit(seed=1)).push_to_hub("owner/ours")
    for revision, seed in ((first, 0), ("main", 1)):
        pipeline = DTRPipeline.from_pretrained("owner/ours", revision=revision)
        assert torch.equal(pipeline.transformer.proj_out_2.weight, make_dit(seed=seed).proj_out_2.weight)


def test_a_component_and_a_variant_load_from_a_hub(hub):
    make_pipeline().to(torch.bfloat16).push_to_hub("owner/ours", variant="bf16")
    pipeline = DiffusionPipeline.from_pretrained("owner/ours", variant="bf16", torch_dtype=torch.bfloat16)
    model = DTRTransformer2DModel.from_pretrained(
        "owner/ours", subfolder="transformer", variant="bf16", torch_dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.proj_out_2.weight, pipeline.transformer.proj_out_2.weight)


def test_diffusers_alone_says_what_the_readme_explains(fresh_process, tmp_path):
    make_pipeline(transformer=make_dit()).save_pretrained(tmp_path)
    found = fresh_process(f"""
        import json
        from diffusers import DiffusionPipeline
        try: DiffusionPipeline.from_pretrained({str(tmp_path)!r})
        except AttributeError as error: before = str(error)
        import diffusers_dtr
        print(json.dumps([before, type(DiffusionPipeline.from_pretrained({str(tmp_path)!r})).__name__]))
    """)
    assert found == ["module diffusers has no attribute DTRPipeline", "DTRPipeline"]
    assert f"`{found[0]}`" in (Path(__file__).parents[2] / "README.md").read_text()
