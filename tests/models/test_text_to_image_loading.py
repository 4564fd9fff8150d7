"""diffusers' text-to-image pipelines with our denoisers load from a Hub in every way, with the same samples."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from text_to_image_sampling import sample
from tiny_models import PIXART, SD3, UNET_CONDITION
from tiny_text_encoders import pixart_alpha, stable_diffusion, stable_diffusion_3


PIPELINES = (
    stable_diffusion(UNET_CONDITION.routed()),
    pixart_alpha(PIXART.routed()),
    stable_diffusion_3(SD3.routed()),
)
# The branch `shards` has its weights in several files each.
WAYS = ({}, {"revision": "shards"}, {"variant": "other"})

LOAD_IN_ALL_WAYS = """
    import json, os
    import diffusers, diffusers_dtr
    from text_to_image_sampling import sample

    assert not os.path.exists(os.path.join(os.environ["HF_HOME"], "hub"))
    found = []
    for name in {names}:
        for way in {ways}:
            for loader, offline in ((getattr(diffusers, name), False), (diffusers.DiffusionPipeline, True)):
                pipeline = loader.from_pretrained("owner/" + name, **way, local_files_only=offline)
                denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
                found.append([type(pipeline).__name__, type(denoiser).__name__, sample(pipeline)])
    print(json.dumps(found))
"""


def test_they_load_in_a_fresh_process_with_an_empty_cache_to_the_bit(hub, fresh_process, tmp_path):
    expected = []
    for pipeline in PIPELINES:
        name = type(pipeline).__name__
        repo = f"owner/{name}"
        pipeline.push_to_hub(repo)
        pipeline.push_to_hub(repo, variant="other")
        pipeline.save_pretrained(tmp_path / "main" / name)
        pipeline.save_pretrained(tmp_path / "shards" / name, max_shard_size="5KB")
        HfApi().create_branch(repo, branch="shards")
        HfApi().upload_folder(
            repo_id=repo, folder_path=tmp_path / "shards" / name, revision="shards", delete_patterns="*.safetensors"
        )
        assert any("-of-" in path for path in HfApi().list_repo_files(repo, revision="shards"))
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        # Loaded weights lie elsewhere in memory than new ones, which changes the last bits of matrix products.
        digests = {way: sample(type(pipeline).from_pretrained(tmp_path / way / name)) for way in ("main", "shards")}
        for way in WAYS:
            digest = digests[way.get("revision", "main")]
            expected += [[name, type(denoiser).__name__, digest]] * 2
    code = LOAD_IN_ALL_WAYS.format(names=[type(pipeline).__name__ for pipeline in PIPELINES], ways=WAYS)
    assert fresh_process(code, PYTHONPATH=str(Path(__file__).parent)) == expected
