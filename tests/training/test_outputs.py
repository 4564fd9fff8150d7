import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from sudden_death import die_before_every_change

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.training.run.folder import check_output_dir, save_pipeline, save_record


def make_pipeline(seed: int = 0, vae: bool = False) -> DTRPipeline:
    torch.manual_seed(seed)
    size = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "sample_size": 4}
    transformer = DTRTransformer2DModel(**size, num_embeds_ada_norm=2)
    autoencoder = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2) if vae else None
    return DTRPipeline(transformer=transformer, scheduler=DDPMScheduler(), vae=autoencoder)


def weight(pipeline: DTRPipeline) -> torch.Tensor:
    return pipeline.transformer.pos_embed.proj.weight


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("present", ["model_index.json", "checkpoint-10"])
def test_only_a_resumed_run_goes_on_in_a_folder_with_results(present, tmp_path):
    (tmp_path / present).mkdir()
    with pytest.raises(ValueError, match=f"`output_dir`=.* already holds {present}"):
        check_output_dir(tmp_path)


@pytest.mark.parametrize("present", ["notes.txt", "logs", "checkpoint-10.partial"])
def test_folder_without_results_may_hold_other_things(present, tmp_path):
    (tmp_path / present).mkdir()
    check_output_dir(tmp_path)


def test_saved_pipeline_loads_and_leaves_nothing_else_behind(tmp_path):
    pipeline = make_pipeline()
    (tmp_path / "logs").mkdir()
    save_pipeline(pipeline, tmp_path)
    assert torch.equal(weight(DTRPipeline.from_pretrained(tmp_path)), weight(pipeline))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "model_index.json", "scheduler", "transformer"]


def test_pipeline_replaces_an_older_one(tmp_path):
    save_pipeline(make_pipeline(0, vae=True), tmp_path)
    newer = make_pipeline(1)
    save_pipeline(newer, tmp_path)
    loaded = DTRPipeline.from_pretrained(tmp_path)
    assert torch.equal(weight(loaded), weight(newer))
    assert loaded.vae is None


@pytest.mark.parametrize("has_older", [False, True])
def test_whenever_saving_is_cut_off_the_folder_loads_as_one_pipeline_or_not_at_all(has_older, tmp_path):
    older, newer = make_pipeline(0), make_pipeline(1)
    folder, untouched = tmp_path / "run", tmp_path / "untouched"
    untouched.mkdir()
    if has_older:
        save_pipeline(older, untouched)
    shutil.copytree(untouched, folder)
    found = []

    def check():
        if (folder / "model_index.json").exists():
            found.append(weight(DTRPipeline.from_pretrained(folder)))
        shutil.rmtree(folder)
        shutil.copytree(untouched, folder)

    assert die_before_every_change(lambda: save_pipeline(newer, folder), check) > 10
    assert all(torch.equal(one, weight(older)) or torch.equal(one, weight(newer)) for one in found)
    assert any(torch.equal(one, weight(older)) for one in found) is has_older
    assert torch.equal(weight(DTRPipeline.from_pretrained(folder)), weight(newer))


def test_saving_again_clears_what_was_cut_off(tmp_path):
    newer = make_pipeline(1)
    save_pipeline(make_pipeline(0), tmp_path)
    die_before_every_change(lambda: save_pipeline(newer, tmp_path), lambda: None)
    assert torch.equal(weight(DTRPipeline.from_pretrained(tmp_path)), weight(newer))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "scheduler", "transformer"]


def test_record_is_json_and_replaced_as_a_whole(tmp_path):
    save_record({"results": {"loss": 1.5}}, tmp_path)
    contents = []
    die_before_every_change(lambda: save_record({"name": "β"}, tmp_path), lambda: contents.append(files(tmp_path)))
    assert all(json.loads(found["training_config.json"]) == {"results": {"loss": 1.5}} for found in contents)
    assert json.loads((tmp_path / "training_config.json").read_text()) == {"name": "β"}
    assert [name for name in files(tmp_path) if not name.endswith(".partial")] == ["training_config.json"]


def test_a_pipeline_without_checkpoints_is_nobodys_to_go_on_with(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    other = tmp_path.parent / f"{tmp_path.name}-other" / "checkpoint-3"
    for checkpoint in (tmp_path / "checkpoint-1", other):
        with pytest.raises(ValueError, match=r"already holds model_index\.json"):
            check_output_dir(tmp_path, "latest" if checkpoint != other else str(other))
        checkpoint.mkdir(parents=True)
        (checkpoint / "training_state.json").write_text("{}")
    check_output_dir(tmp_path, "latest")
    check_output_dir(tmp_path, str(tmp_path / "checkpoint-1"))
    check_output_dir(tmp_path, "checkpoint-1")
    with pytest.raises(ValueError, match=r"already holds model_index\.json"):
        check_output_dir(tmp_path, str(other))
