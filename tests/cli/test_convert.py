"""`diffusers-dtr convert`: the authors' files to pipelines that give the authors' outputs, and back to the bit."""

from __future__ import annotations

import argparse
import json
import resource

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from huggingface_hub import HfApi
from original_checkpoints import CLOSE, Reference, fake_omegaconf, omegaconf_of, same
from safetensors import safe_open
from tiny_autoencoders import tiny_vae
from tiny_dit import output, plain_dit, routed_dit

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.cli import main
from diffusers_dtr.conversion import original_dit_state_dict
from diffusers_dtr.conversion.masks import mask_table


NAMES = {str(label): f"name {label}" for label in range(10)}
COSINE, LINEAR = "squaredcos_cap_v2", ("--noise_schedule", "linear")
HEADS = ("--num_attention_heads", "4")
PIXELS = (*HEADS, "--no_vae")


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


@pytest.fixture
def reference():
    """Weights of the authors' code, inputs, and its outputs."""
    return Reference()


@pytest.fixture
def state_dict(reference):
    """As DTR's code saves it: with the masks of every block."""
    return reference.with_masks()


@pytest.fixture
def checkpoint(state_dict, tmp_path):
    """A file of the authors' training script."""
    fixed = [key for key in state_dict if "_unit_mapping" in key or key == "pos_embed"]
    trained = {key: value if key in fixed else value + 1 for key, value in state_dict.items()}
    with fake_omegaconf() as modules:
        general = {"schedule_name": "cosine", "image_size": 256, "data_path": "/home/somebody/imagenet"}
        config = omegaconf_of(modules, {"general": general})
        torch.save({"model": trained, "ema": state_dict, "opt": {}, "config": config}, tmp_path / "0400000.pt")
    return tmp_path / "0400000.pt"


@pytest.fixture
def vae(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    return ["--vae_name_or_path", str(tmp_path / "vae")]


# ---- from the authors' files


def test_a_checkpoint_becomes_a_pipeline_with_the_authors_outputs(reference, checkpoint, vae, tmp_path, capsys):
    labels = tmp_path / "names.json"
    labels.write_text(json.dumps(NAMES))
    assert convert(checkpoint, tmp_path / "new" / "dit", *HEADS, *vae, "--labels", labels) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "dit")
    pipeline = DTRPipeline.from_pretrained(tmp_path / "new" / "dit")
    torch.testing.assert_close(reference.outputs(pipeline.transformer), reference.tensors["output_routed"], **CLOSE)
    assert pipeline.config.id2label == NAMES
    config = pipeline.scheduler.config
    assert (config._class_name, config.num_train_timesteps) == ("DDPMScheduler", 1000)
    assert (config.beta_schedule, config.timestep_spacing) == (COSINE, "linspace")
    pipeline.scheduler.set_timesteps(7)
    # space_timesteps of their code: strides of a real length from the first timestep to the last
    assert pipeline.scheduler.timesteps.tolist() == [round(step * 999 / 6) for step in range(7)][::-1]
    assert (config.variance_type, config.clip_sample, config.prediction_type) == ("learned_range", False, "epsilon")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("name 3", guidance_scale=2.0, num_inference_steps=2).images[0].size == (16, 16)
    for path in (tmp_path / "new").rglob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes()
        assert b"somebody" not in path.read_bytes()


@pytest.mark.parametrize(("weights", "added"), [("model", 1), ("ema", 0)])
def test_weights_as_trained_are_converted_on_demand(state_dict, checkpoint, tmp_path, weights, added):
    convert(checkpoint, tmp_path / "dit", *PIXELS, "--weights", weights)
    transformer = DTRPipeline.from_pretrained(tmp_path / "dit").transformer
    assert torch.equal(transformer.proj_out_2.weight, state_dict["final_layer.linear.weight"] + added)


def test_the_noise_schedule_is_printed_unless_it_is_given(reference, checkpoint, tmp_path, capsys):
    ant, dit = tmp_path / "ant.pt", tmp_path / "dit.pt"
    torch.save(reference.state_dict, dit)
    weights = {key: value for key, value in reference.state_dict.items() if key != "pos_embed"}
    args = argparse.Namespace(total_clusters=5, image_size=8, diffusion_steps=500)
    torch.save({"ema": weights, "args": args}, ant)
    for file, flags, schedule, said in (
        (checkpoint, (), COSINE, f"{COSINE} (as the file says)."),
        (checkpoint, LINEAR, "linear", f"linear, but the file says {COSINE}."),
        (ant, (), COSINE, f"{COSINE} (the file is of ANT's code, whose runs have it)."),
        (dit, (), "linear", "linear (the default of DiT's code, whose published files are such state dicts)."),
    ):
        folder = tmp_path / f"{file.stem}{len(flags)}"
        assert convert(file, folder, *PIXELS, *flags) == 0
        assert DDPMScheduler.from_pretrained(folder / "scheduler").config.beta_schedule == schedule
        assert f"Noise schedule: {said}" in capsys.readouterr().err
    assert convert(dit, tmp_path / "given", *PIXELS, *LINEAR) == 0
    assert "Noise schedule" not in capsys.readouterr().err
    unrouted, ant = (DTRPipeline.from_pretrained(tmp_path / name) for name in ("dit0", "ant0"))
    expected = reference.tensors["output_unrouted"]
    torch.testing.assert_close(reference.outputs(unrouted.transformer), expected, **CLOSE)
    assert (unrouted.vae, unrouted.config.id2label, unrouted.scheduler.config.clip_sample) == (None, None, True)
    assert (ant.transformer.config.sample_size, ant.scheduler.config.num_train_timesteps) == (8, 500)


def test_nothing_half_written_is_left_where_the_disk_is_full(state_dict, tmp_path, capsys):
    torch.save(state_dict, tmp_path / "dit.pt")
    assert convert(tmp_path / "dit.pt", tmp_path / "dit", *PIXELS, *LINEAR) == 0
    before, most = sorted(tmp_path.rglob("*")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, most[1]))  # as there, writing fails half-way
    try:
        assert convert(tmp_path / "dit.pt", tmp_path / "new", *PIXELS, *LINEAR) == 2
        assert convert(tmp_path / "dit", tmp_path / "back.pt", "--to_original") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    refused = capsys.readouterr().err.splitlines()
    assert "File too large" in refused[-2]
    assert "back.pt cannot be written whole: is the disk full?" in refused[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_file_does_not_tell_is_taken_from_flags(tmp_path):
    model = routed_dit(norm_eps=1e-6, freq_shift=0, out_channels=4, routing_beta=1.0, num_embeds_ada_norm=6)
    torch.save(original_dit_state_dict(model), tmp_path / "dit.pt")
    flags = "--num_attention_heads 2 --class_dropout_prob 0 --no_vae --noise_schedule squaredcos_cap_v2"
    flags += " --num_train_timesteps 500 --routing_alpha 2 --routing_beta 0.5"
    assert convert(tmp_path / "dit.pt", tmp_path / "dit", *flags.split()) == 0
    pipeline = DTRPipeline.from_pretrained(tmp_path / "dit")
    config = pipeline.transformer.config
    assert (config.num_attention_heads, config.num_embeds_ada_norm, pipeline.null_class) == (2, 7, None)
    assert (config.routing_alpha, config.routing_beta, config.routing_timestep_range) == (2.0, 0.5, [0, 499])
    config = pipeline.scheduler.config
    assert (config.num_train_timesteps, config.beta_schedule) == (500, COSINE)
    assert (config.beta_start, config.beta_end, config.variance_type) == (2e-4, 0.04, "fixed_large")


# ---- VAE and names from the Hub


@pytest.fixture
def imagenet(tmp_path):
    """A checkpoint with ImageNet's number of classes."""
    model = routed_dit(norm_eps=1e-6, freq_shift=0, num_embeds_ada_norm=1000)
    torch.save(original_dit_state_dict(model), tmp_path / "imagenet.pt")
    return [tmp_path / "imagenet.pt", tmp_path / "imagenet", "--num_attention_heads", 2, *LINEAR]


def test_the_vae_and_imagenets_names_come_from_the_hub(hub, imagenet, tmp_path):
    hub.tokens |= {"hf_facebook": "facebook", "hf_vae": "stabilityai"}
    names = {str(label): f"name {label}" for label in range(1000)}
    file = {"path_or_fileobj": json.dumps({"id2label": names}).encode(), "path_in_repo": "model_index.json"}
    HfApi(token="hf_facebook").create_repo("facebook/DiT-XL-2-256")
    HfApi(token="hf_facebook").upload_file(repo_id="facebook/DiT-XL-2-256", **file)
    tiny_vae().push_to_hub("stabilityai/sd-vae-ft-ema", token="hf_vae")
    assert convert(*imagenet) == 0
    assert DTRPipeline.from_pretrained(tmp_path / "imagenet").config.id2label == names
    vae_config = json.loads((tmp_path / "imagenet/vae/config.json").read_text())
    assert vae_config["_name_or_path"] == "stabilityai/sd-vae-ft-ema"
    file, _, *flags = imagenet
    assert convert(file, tmp_path / "nameless", *flags, "--no_vae", "--no_labels") == 0
    assert DTRPipeline.from_pretrained(tmp_path / "nameless").config.id2label is None


# ---- from pipelines


@pytest.mark.parametrize("half", [False, True])
def test_a_checkpoint_comes_back_to_the_bit(state_dict, tmp_path, half):
    expected = {key: value.half() if half and "_unit" not in key else value for key, value in state_dict.items()}
    torch.save(expected, tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "dit", *PIXELS, *LINEAR)
    assert convert(tmp_path / "dit", tmp_path / "back.pt", "--to_original") == 0
    assert same(torch.load(tmp_path / "back.pt", weights_only=True), expected)
    # DTR's code keeps a table per block; all are one, which is saved once.
    assert (tmp_path / "back.pt").stat().st_size < 2 * mask_table(1000, 64, 4.0, 0.8).nbytes + 2**20


@pytest.mark.parametrize(("flags", "beta"), [([], 1.0), (["--routing_beta", 0.5, "--routing_alpha", 2], 0.5)])
def test_a_pipeline_of_diffusers_becomes_a_routed_one(tmp_path, flags, beta):
    id2label = {"0": "tench", "1": "goldfish"}
    model = plain_dit(num_embeds_ada_norm=1000).half()
    DiTPipeline(model, tiny_vae(), DDIMScheduler(clip_sample=False), id2label).save_pretrained(tmp_path / "plain")
    index = json.loads((tmp_path / "plain/model_index.json").read_text())
    (tmp_path / "plain/model_index.json").write_text(json.dumps(index | {"id2label": id2label}))
    assert convert(tmp_path / "plain", tmp_path / "routed", *flags) == 0
    pipeline = DTRPipeline.from_pretrained(tmp_path / "routed")
    assert type(pipeline.transformer) is DTRTransformer2DModel
    assert pipeline.transformer.config.routing_beta == beta
    assert type(pipeline.scheduler) is DDIMScheduler
    assert pipeline.config.id2label == id2label
    assert pipeline.vae is not None
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "plain" / "transformer")
    assert torch.equal(output(pipeline.transformer), output(model)) == (beta == 1.0)
    with safe_open(tmp_path / "routed/transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_slice("proj_out_2.weight").get_dtype() == "F16"
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "routed").rglob("*.json"))


@pytest.mark.parametrize(("flags", "beta"), [([], 0.5), (["--routing_beta", 0.7], 0.7)])
def test_a_routed_pipeline_keeps_its_routing_unless_another_is_given(tmp_path, flags, beta):
    model = routed_dit(routing_alpha=2.0, routing_beta=0.5)
    DTRPipeline(DDIMScheduler(), transformer=model).save_pretrained(tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "new", *flags)
    config = DTRPipeline.from_pretrained(tmp_path / "new").transformer.config
    assert (config.routing_alpha, config.routing_beta) == (2.0, beta)


def test_all_of_a_private_repositorys_revision_is_converted(hub, tmp_path, monkeypatch):
    model = routed_dit(routing_beta=0.5)
    DTRPipeline(DDIMScheduler(), transformer=model).push_to_hub("owner/model", private=True)
    old = HfApi().list_repo_commits("owner/model")[0].commit_id
    DTRPipeline(DDPMScheduler(), transformer=routed_dit(num_layers=1)).push_to_hub("owner/model")
    monkeypatch.delenv("HF_TOKEN")
    assert convert("owner/model", tmp_path / "old", "--token", "hf_owner", "--revision", old) == 0
    pipeline = DTRPipeline.from_pretrained(tmp_path / "old")
    assert type(pipeline.scheduler) is DDIMScheduler
    assert pipeline.transformer.config.routing_beta == 0.5
    assert same(pipeline.transformer.state_dict(), model.state_dict())
