import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DiTPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from huggingface_hub import HfApi
from tiny_dit import output, routed_dit, with_random_weights

import diffusers_dtr
from diffusers_dtr import DTRPipeline
from diffusers_dtr.diffusers_registration import register_library, register_pipeline


def tiny_vae():
    return with_random_weights(AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4))


def test_the_library_is_one_that_diffusers_loads_models_of_however_often_it_is_registered():
    before = {name: dict(classes) for name, classes in LOADABLE_CLASSES.items()}
    register_library()
    register_pipeline(DTRPipeline)
    assert before == LOADABLE_CLASSES
    assert LOADABLE_CLASSES["diffusers_dtr"]["ModelMixin"] == LOADABLE_CLASSES["diffusers"]["ModelMixin"]
    assert diffusers_dtr.ModelMixin is diffusers.ModelMixin
    assert diffusers.DTRPipeline is DTRPipeline


def test_a_pipeline_of_diffusers_is_never_hidden():
    ours = type("DDPMPipeline", (DTRPipeline,), {})
    with pytest.raises(RuntimeError, match=r"diffusers .* has a `DDPMPipeline` of its own; ours would hide it\."):
        register_pipeline(ours)
    assert diffusers.DDPMPipeline is DDPMPipeline


def test_all_four_ways_of_loading_work_from_a_hub_in_a_fresh_process(hub, fresh_process, tmp_path):
    expected = output(routed_dit())
    for name, pipeline in (
        ("ours", DTRPipeline(DDIMScheduler(), transformer=routed_dit())),
        ("theirs", DiTPipeline(routed_dit(), tiny_vae(), DDIMScheduler())),
    ):
        pipeline.save_pretrained(tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["transformer"] == ["diffusers_dtr", "DTRTransformer2DModel"]
        HfApi().create_repo(f"owner/{name}")
        HfApi().upload_folder(repo_id=f"owner/{name}", folder_path=tmp_path / name)
    torch.save(expected, tmp_path / "expected.pt")

    loaded = fresh_process(f"""
        import json, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        import diffusers_dtr
        from diffusers import DiffusionPipeline, DiTPipeline
        from tiny_dit import output

        expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
        found = []
        for cls, repo in [
            (diffusers_dtr.DTRPipeline, "owner/ours"),
            (DiffusionPipeline, "owner/ours"),
            (DiTPipeline, "owner/theirs"),
            (DiffusionPipeline, "owner/theirs"),
        ]:
            pipeline = cls.from_pretrained(repo)
            transformer = pipeline.transformer
            names = [type(pipeline).__name__, type(transformer).__name__]
            found.append([*names, torch.equal(output(transformer), expected)])
        print(json.dumps(found))
    """)
    ours, theirs = ["DTRPipeline", "DTRTransformer2DModel", True], ["DiTPipeline", "DTRTransformer2DModel", True]
    assert loaded == [ours, ours, theirs, theirs]


def test_loading_where_the_package_is_missing_names_the_package(fresh_process, tmp_path):
    DiTPipeline(routed_dit(), tiny_vae(), DDIMScheduler()).save_pretrained(tmp_path)
    message = fresh_process(f"""
        import json, sys
        sys.modules["diffusers_dtr"] = None  # as though it were not installed
        from diffusers import DiffusionPipeline
        try:
            DiffusionPipeline.from_pretrained({str(tmp_path)!r})
        except ValueError as error:
            print(json.dumps(str(error)))
    """)
    assert "import diffusers_dtr before calling `from_pretrained`" in message
