"""`diffusers-dtr convert`: the authors' files to pipelines that give the authors' outputs, and back to the bit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from original_checkpoints import fake_omegaconf, omegaconf_of
from huggingface_hub import HfApi
from safetensors import safe_open
from tiny_dit import output, plain_dit, routed_dit

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel
from diffusers_dtr.cli import main
from diffusers_dtr.conversion import original_dit_state_dict
from diffusers_dtr.conversion.masks import mask_table


FIXTURE = Path(__file__).parents[1] / "fixtures" / "dtr_dit_tiny.safetensors"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NAMES = {str(label): f"name {label}" for label in range(10)}


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def refused(capsys, *arguments):
    """The one line that says why."""
    capsys.readouterr()
    assert convert(*arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("diffusers-dtr convert: ")
    return line


def make_vae(latent_channels=4):
    return AutoencoderKL(latent_channels=latent_channels, block_out_channels=(4,), norm_num_groups=2)


@pytest.fixture
def reference():
    """Weights of the authors' code, inputs, and its outputs."""
    with safe_open(FIXTURE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary


@pytest.fixture
def state_dict(reference):
    """As DTR's code saves it: with the masks of every block."""
    weights = {key.removeprefix("checkpoint."): value for key, value in reference.items() if key.startswith("check")}
    with safe_open(FIXTURE, "pt") as file:
        table = mask_table(1000, 64, 4.0, float(file.metadata()["beta"]))
    return weights | {f"blocks.{block}.routing._unit_mapping": table for block in range(3)}


@pytest.fixture
def heads():
    with safe_open(FIXTURE, "pt") as file:
        return ["--num_attention_heads", file.metadata()["num_heads"]]


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
    make_vae().save_pretrained(tmp_path / "vae")
    return ["--vae_name_or_path", str(tmp_path / "vae")]


def outputs(reference, model):
    names = {"hidden_states": "sample", "timestep": "timestep", "class_labels": "class_labels"}
    return output(model, **{argument: reference[name] for argument, name in names.items()})


# ---- from the authors' files


def test_a_checkpoint_becomes_a_pipeline_with_the_authors_outputs(reference, checkpoint, heads, vae, tmp_path, capsys):
    labels = tmp_path / "names.json"
    labels.write_text(json.dumps(NAMES))
    assert convert(checkpoint, tmp_path / "new" / "dit", *heads, *vae, "--labels", labels) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "dit")
    pipeline = DTRPipeline.from_pretrained(tmp_path / "new" / "dit")
    torch.testing.assert_close(outputs(reference, pipeline.transformer), reference["output_routed"], **CLOSE)
    assert pipeline.config.id2label == NAMES
    config = pipeline.scheduler.config
    assert (config._class_name, config.num_train_timesteps) == ("DDPMScheduler", 1000)
    assert (config.beta_schedule, config.timestep_spacing) == ("squaredcos_cap_v2", "linspace")
    pipeline.scheduler.set_timesteps(7)
    # space_timesteps of their code: strides of a real length from the first timestep to the last
    assert pipeline.scheduler.timesteps.tolist() == [round(step * 999 / 6) for step in range(7)][::-1]
    assert (config.variance_type, config.clip_sample, config.prediction_type) == ("learned_range", False, "epsilon")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("name 3", guidance_scale=2.0, num_inference_steps=2).images[0].size == (8, 8)
    for path in (tmp_path / "new").rglob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes()
        assert b"somebody" not in path.read_bytes()


def test_weights_as_trained_are_converted_on_demand(state_dict, checkpoint, heads, tmp_path):
    for weights, added in (("model", 1), ("ema", 0)):
        convert(checkpoint, tmp_path / weights, *heads, "--no_vae", "--weights", weights)
        transformer = DTRPipeline.from_pretrained(tmp_path / weights).transformer
        assert torch.equal(transformer.proj_out_2.weight, state_dict["final_layer.linear.weight"] + added)


def test_the_noise_schedule_is_printed_unless_it_is_given(reference, state_dict, checkpoint, heads, tmp_path, capsys):
    plain = {key: value for key, value in state_dict.items() if "_unit_mapping" not in key}
    torch.save(plain, tmp_path / "dit.pt")
    plain = {key: value for key, value in plain.items() if key != "pos_embed"}
    args = argparse.Namespace(total_clusters=5, image_size=8, diffusion_steps=500)
    torch.save({"ema": plain, "args": args}, tmp_path / "ant.pt")
    linear = ("--noise_schedule", "linear")
    ant, dit, cosine = tmp_path / "ant.pt", tmp_path / "dit.pt", "squaredcos_cap_v2"
    for file, flags, schedule, said in (
        (checkpoint, (), cosine, f"{cosine} (as the file says)."),
        (checkpoint, linear, "linear", f"linear, but the file says {cosine}."),
        (ant, (), cosine, f"{cosine} (the file is of ANT's code, whose runs have it)."),
        (dit, (), "linear", "linear (the default of DiT's code, whose published files are such state dicts)."),
    ):
        output = tmp_path / f"{file.stem}{len(flags)}"
        assert convert(file, output, *heads, "--no_vae", *flags) == 0
        assert DDPMScheduler.from_pretrained(output / "scheduler").config.beta_schedule == schedule
        assert f"Noise schedule: {said}" in capsys.readouterr().err
    assert convert(dit, tmp_path / "given", *heads, "--no_vae", *linear, "--routing_beta", 0.6) == 0
    assert "Noise schedule" not in capsys.readouterr().err
    given, unrouted, ant = (DTRPipeline.from_pretrained(tmp_path / name) for name in ("given", "dit0", "ant0"))
    assert given.transformer.config.routing_beta == 0.6
    torch.testing.assert_close(outputs(reference, unrouted.transformer), reference["output_unrouted"], **CLOSE)
    assert (unrouted.vae, unrouted.config.id2label, unrouted.scheduler.config.clip_sample) == (None, None, True)
    assert (ant.transformer.config.sample_size, ant.scheduler.config.num_train_timesteps) == (8, 500)


@pytest.mark.parametrize("kind", ["averaged weights of an unknown run", "masks alone"])
def test_a_file_that_does_not_say_its_noise_schedule_needs_the_flag(state_dict, heads, tmp_path, capsys, kind):
    torch.save(state_dict if kind == "masks alone" else {"ema": state_dict, "model": state_dict}, tmp_path / "dit.pt")
    line = refused(capsys, tmp_path / "dit.pt", tmp_path / "dit", *heads, "--no_vae")
    assert "`--noise_schedule` must be given" in line
    assert not (tmp_path / "dit").exists()
    assert convert(tmp_path / "dit.pt", tmp_path / "dit", *heads, "--no_vae", "--noise_schedule", "linear") == 0


def test_what_a_file_does_not_tell_is_taken_from_flags(tmp_path):
    model = routed_dit(norm_eps=1e-6, freq_shift=0, out_channels=4, routing_beta=1.0, num_embeds_ada_norm=6)
    torch.save(original_dit_state_dict(model), tmp_path / "dit.pt")
    flags = ["--num_attention_heads", 2, "--class_dropout_prob", 0, "--no_vae"]
    flags += ["--noise_schedule", "squaredcos_cap_v2"]
    flags += ["--num_train_timesteps", 500, "--routing_alpha", 2, "--routing_beta", 0.5]
    assert convert(tmp_path / "dit.pt", tmp_path / "dit", *flags) == 0
    pipeline = DTRPipeline.from_pretrained(tmp_path / "dit")
    config = pipeline.transformer.config
    assert (config.num_attention_heads, config.num_embeds_ada_norm, pipeline.null_class) == (2, 7, None)
    assert (config.routing_alpha, config.routing_beta, config.routing_timestep_range) == (2.0, 0.5, [0, 499])
    config = pipeline.scheduler.config
    assert (config.num_train_timesteps, config.beta_schedule) == (500, "squaredcos_cap_v2")
    assert (config.beta_start, config.beta_end, config.variance_type) == (2e-4, 0.04, "fixed_large")


def test_half_precision_stays_so(state_dict, heads, tmp_path):
    halved = {key: value if "_unit" in key else value.half() for key, value in state_dict.items()}
    torch.save(halved, tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "dit", *heads, "--no_vae", "--noise_schedule", "linear")
    convert(tmp_path / "dit", tmp_path / "back.pt", "--to_original")
    assert same(torch.load(tmp_path / "back.pt", weights_only=True), halved)


# ---- VAE and names from the Hub


@pytest.fixture
def imagenet(tmp_path):
    """A checkpoint with ImageNet's number of classes."""
    model = routed_dit(norm_eps=1e-6, freq_shift=0, num_embeds_ada_norm=1000)
    torch.save(original_dit_state_dict(model), tmp_path / "imagenet.pt")
    told = ["--num_attention_heads", 2, "--noise_schedule", "linear"]
    return [tmp_path / "imagenet.pt", tmp_path / "imagenet", *told]


def publish(hub, repo_id, file, content):
    hub.tokens["hf_publisher"] = repo_id.split("/")[0]
    api = HfApi(token="hf_publisher")
    api.create_repo(repo_id)
    api.upload_file(repo_id=repo_id, path_or_fileobj=content, path_in_repo=file)


def test_the_vae_and_imagenets_names_come_from_the_hub(hub, imagenet, tmp_path):
    names = {str(label): f"name {label}" for label in range(1000)}
    publish(hub, "facebook/DiT-XL-2-256", "model_index.json", json.dumps({"id2label": names}).encode())
    hub.tokens["hf_vae"] = "stabilityai"
    make_vae().push_to_hub("stabilityai/sd-vae-ft-ema", token="hf_vae")
    assert convert(*imagenet) == 0
    pipeline = DTRPipeline.from_pretrained(tmp_path / "imagenet")
    assert pipeline.config.id2label == names
    vae_config = json.loads((tmp_path / "imagenet/vae/config.json").read_text())
    assert vae_config["_name_or_path"] == "stabilityai/sd-vae-ft-ema"


def test_without_the_hub_it_is_said_what_to_give(hub, imagenet, vae, tmp_path, capsys):
    line = refused(capsys, *imagenet, *vae)
    assert "classes in facebook/DiT-XL-2-256 could not be loaded" in line
    assert "Give `--labels` a JSON file or a pipeline that has them, or `--no_labels`." in line
    line = refused(capsys, *imagenet, "--no_labels")
    assert "stabilityai/sd-vae-ft-ema could not be loaded" in line
    assert "Give `--vae_name_or_path` its folder or repository, or `--no_vae`" in line
    make_vae(latent_channels=16).save_pretrained(tmp_path / "wide")
    line = refused(capsys, *imagenet, "--no_labels", "--vae_name_or_path", tmp_path / "wide")
    assert "must be an autoencoder with 4 latent channels, as the model has, but" in line
    assert convert(*imagenet, *vae, "--no_labels") == 0
    assert DTRPipeline.from_pretrained(tmp_path / "imagenet").config.id2label is None


@pytest.mark.parametrize("labels", ['{"10": "ten"}', '["zero"]', '{"0": 1}'])
def test_names_of_classes_that_are_not_there_are_refused(checkpoint, heads, tmp_path, capsys, labels):
    (tmp_path / "names.json").write_text(labels)
    line = refused(capsys, checkpoint, tmp_path / "dit", *heads, "--no_vae", "--labels", tmp_path / "names.json")
    assert "`--labels" in line
    assert "must be names of classes below 10" in line or "must hold a JSON object, got list" in line


# ---- from pipelines


def same(state_dict, expected):
    assert state_dict.keys() == expected.keys()
    return all(
        torch.equal(value, expected[key]) and value.dtype == expected[key].dtype for key, value in state_dict.items()
    )


def test_a_checkpoint_comes_back_to_the_bit(state_dict, checkpoint, heads, tmp_path):
    convert(checkpoint, tmp_path / "dit", *heads, "--no_vae")
    assert convert(tmp_path / "dit", tmp_path / "back.pt", "--to_original") == 0
    assert same(torch.load(tmp_path / "back.pt", weights_only=True), state_dict)
    # DTR's code keeps a table per block; all are one, which is saved once.
    assert (tmp_path / "back.pt").stat().st_size < 2 * mask_table(1000, 64, 4.0, 0.8).nbytes + 2**20


@pytest.mark.parametrize(("flags", "beta"), [([], 1.0), (["--routing_beta", 0.5, "--routing_alpha", 2], 0.5)])
def test_a_pipeline_of_diffusers_becomes_a_routed_one(tmp_path, flags, beta):
    model = plain_dit(num_embeds_ada_norm=1000).half()
    id2label = {"0": "tench", "1": "goldfish"}
    DiTPipeline(model, make_vae(), DDIMScheduler(clip_sample=False), id2label).save_pretrained(tmp_path / "plain")
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
    for path in (tmp_path / "routed").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_a_routed_pipeline_keeps_its_routing_unless_another_is_given(tmp_path):
    model = routed_dit(routing_alpha=2.0, routing_beta=0.5)
    DTRPipeline(DDIMScheduler(), transformer=model).save_pretrained(tmp_path / "first")
    for name, flags, beta in (("second", [], 0.5), ("third", ["--routing_beta", 0.7], 0.7)):
        convert(tmp_path / "first", tmp_path / name, *flags)
        config = DTRPipeline.from_pretrained(tmp_path / name).transformer.config
        assert (config.routing_alpha, config.routing_beta) == (2.0, beta)


def test_all_of_a_private_repositorys_revision_is_converted(hub, tmp_path, monkeypatch):
    parts = [(DDIMScheduler(), routed_dit(routing_beta=0.5)), (DDPMScheduler(), routed_dit(num_layers=1))]
    for scheduler, model in parts:
        DTRPipeline(scheduler, transformer=model).push_to_hub("owner/model", private=True)
    old = HfApi().list_repo_commits("owner/model")[1].commit_id
    monkeypatch.delenv("HF_TOKEN")
    for name, flags, (scheduler, model) in zip(("old", "new"), (["--revision", old], []), parts, strict=True):
        assert convert("owner/model", tmp_path / name, "--token", "hf_owner", *flags) == 0
        pipeline = DTRPipeline.from_pretrained(tmp_path / name)
        assert type(pipeline.scheduler) is type(scheduler)
        assert pipeline.transformer.config.routing_beta == model.config.routing_beta
        assert same(pipeline.transformer.state_dict(), model.state_dict())


# ---- mistakes


def test_a_failure_half_way_leaves_nothing(checkpoint, heads, tmp_path, capsys, monkeypatch):
    def fill_the_disk(self, path):
        Path(path).mkdir()
        (Path(path) / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DTRPipeline, "save_pretrained", fill_the_disk)
    assert "No space left on device" in refused(capsys, checkpoint, tmp_path / "dit", *heads, "--no_vae")
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt", "new"], "There is no file 'missing.pt'."),
        (["0400000.pt", "new", "--no_vae"], "`num_attention_heads` must be given: 3 blocks of width 64"),
        (["0400000.pt", "new", "--num_attention_heads", 5, "--no_vae"], "must divide the width 64, got 5"),
        (["0400000.pt", "new.pt", "--to_original"], "`--to_original` takes a pipeline"),
        (["0400000.pt", "new", "--num_attention_heads", 4, "--no_vae", "--routing_beta", 0.3], "checkpoint's masks"),
        (["0400000.pt", "unet", "--num_attention_heads", 4, "--no_vae"], "'unet' exists already and is not"),
        (["dit", "0400000.pt", "--to_original"], "'0400000.pt' exists already"),
        (["dit", "new.pt", "--to_original"], "The original's code has `norm_eps`=1e-06 only"),
        (["dit", "new", "--num_attention_heads", 4, "--no_vae"], "`--no_vae` would have no effect for a pipeline"),
        (["dit", "new.pt", "--to_original", "--routing_beta", 0.5], "would have no effect for --to_original"),
        (["0400000.pt", "new", "--revision", "main"], "`--revision` would have no effect for a file"),
        (["unet", "new"], "whose `transformer` is a DiT of diffusers or ours, got none"),
        (["unet", "new.txt", "--to_original"], "The output must end in `.pt`, got 'new.txt'"),
    ],
)
def test_mistakes_are_one_line_on_stderr(checkpoint, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unet").mkdir()
    DTRPipeline(DDIMScheduler(), transformer=routed_dit()).save_pretrained(tmp_path / "dit")
    before = checkpoint.read_bytes()
    assert message in refused(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0400000.pt", "dit", "unet"]
    assert checkpoint.read_bytes() == before
