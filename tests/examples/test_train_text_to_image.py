"""Runs of the text-to-image script: full and LoRA, from pipelines of diffusers' and of ours."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import PixArtAlphaPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file
from text_to_image_runs import FAMILIES, every_family, make_captioned_images, train
from training_runs import assert_close_weights, assert_equal_weights, assert_same_configs, record, weights


PIPELINES = {"sd": StableDiffusionPipeline, "pixart": PixArtAlphaPipeline, "sd3": StableDiffusion3Pipeline}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_captioned_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    """A pipeline of every family as diffusers has it."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: family.save_plain(folder / name) for name, family in FAMILIES.items()}


def sample(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"use_resolution_binning": False} if isinstance(pipeline, PixArtAlphaPipeline) else {}
    size = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "pt"}
    return pipeline("a two", generator=torch.Generator().manual_seed(0), **size, **options).images


def first_call(name, images, output_dir, pipeline, monkeypatch, *flags) -> tuple[tuple, dict, torch.Tensor]:
    """What the denoiser is told in the first step, and what it says."""
    cls, calls = FAMILIES[name].family.routed_class, []
    forward = cls.forward

    def spy(model, *inputs, **options):
        output = forward(model, *inputs, **options)
        if model.training:
            calls.append((inputs, options, output[0].detach()))
        return output

    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", spy)
        train(name, images, output_dir, pipeline, "--max_train_steps", 2, *flags)
    return calls[0]


@every_family
def test_result_is_the_familys_pipeline_with_our_denoiser_and_the_pretrained_parts(name, plain, images, tmp_path):
    flags = ["--proportion_empty_prompts", 0.2, "--use_ema", "--validation_data_dir", images]
    grid = ["--validation_prompts", "a one", "two", "--validation_guidance_scale", 2]
    run = train(name, images, tmp_path / "run", plain[name], *flags, *grid)
    before, after = PIPELINES[name].from_pretrained(plain[name]), PIPELINES[name].from_pretrained(run)
    denoiser = getattr(after, FAMILIES[name].denoiser)
    assert type(denoiser) is FAMILIES[name].family.routed_class
    assert denoiser.config.routing_beta == 0.8
    assert tuple(denoiser.config.routing_timestep_range) == (0, 1000 if name == "sd3" else 999)
    assert_same_configs(plain[name], run, plain=FAMILIES[name].denoiser)
    for part, component in before.components.items():
        if isinstance(component, torch.nn.Module) and part != FAMILIES[name].denoiser:
            kept = getattr(after, part).state_dict()
            assert all(torch.equal(kept[key], value) for key, value in component.state_dict().items())
    assert not torch.equal(sample(after), sample(before))
    (grid,) = (run / "samples").glob("*.png")
    assert Image.open(grid).size == (16, 16)  # three images of two prompts in turn
    assert record(run)["results"]["validation_loss"] > 0


@every_family
def test_adapters_alone_are_saved_and_load_on_the_routed_base(name, plain, images, tmp_path):
    run = train(name, images, tmp_path / "run", plain[name], "--rank", 2, "--lora_alpha", 4, "--routing_beta", 0.7)
    assert "model_index.json" not in {path.name for path in run.iterdir()}
    assert len(load_file(run / "pytorch_lora_weights.safetensors")) > 0
    denoiser, cls = FAMILIES[name].denoiser, FAMILIES[name].family.routed_class
    routing = {key: value for key, value in record(run)["model"]["config"].items() if key.startswith("routing_")}
    assert routing["routing_beta"] == 0.7
    pipeline = PIPELINES[name].from_pretrained(plain[name])
    routed = getattr(cls, f"from_{denoiser}")(getattr(pipeline, denoiser), **routing)
    setattr(pipeline, denoiser, routed)
    before = sample(pipeline)
    if name == "pixart":
        routed.load_lora_adapter(run, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    else:
        pipeline.load_lora_weights(run)
    assert not torch.equal(sample(pipeline), before)
    trained = load_file(run / "checkpoint-3" / f"{denoiser}_lora" / "pytorch_lora_weights.safetensors")
    (adapter,) = routed.peft_config
    loaded = routed.state_dict()
    assert all(torch.equal(loaded[key.replace(".weight", f".{adapter}.weight")], trained[key]) for key in trained)


def test_denoiser_under_adapters_is_quantised_if_asked_for(plain, images, tmp_path):
    pytest.importorskip("torchao")
    flags = ["--rank", 2, "--validation_data_dir", images]
    runs = [
        train("sd", images, tmp_path / name, plain["sd"], *flags, *more)
        for name, more in {"whole": (), "int8": ("--quantize", "torchao_int8")}.items()
    ]
    whole, quantised = (record(run)["results"]["validation_loss"] for run in runs)
    assert whole != quantised == pytest.approx(whole, rel=0.1)


def test_saved_adapters_are_averaged_if_asked_for(plain, images, tmp_path):
    run = train("sd", images, tmp_path / "run", plain["sd"], "--rank", 2, "--use_ema")
    (file,) = (run / "checkpoint-3" / "unet_ema").glob("*.safetensors")
    average = {f"unet.{name.replace('.default', '')}": value for name, value in load_file(file).items()}
    saved = load_file(run / "pytorch_lora_weights.safetensors")
    last = load_file(run / "checkpoint-3" / "unet_lora" / "pytorch_lora_weights.safetensors")
    assert saved.keys() == average.keys()
    assert all(torch.equal(value, average[name]) for name, value in saved.items())
    assert not all(torch.equal(value, last[name.removeprefix("unet.")]) for name, value in saved.items())


@pytest.mark.parametrize(("name", "rank"), [("sd", ("--rank", 2)), ("pixart", ())])
def test_warm_up_starts_exactly_at_the_pretrained_model(name, rank, plain, images, tmp_path, monkeypatch):
    flags = [*rank, "--routing_warmup_steps", 2]
    inputs, options, said = first_call(name, images, tmp_path / "warm", plain[name], monkeypatch, *flags)
    pretrained = getattr(PIPELINES[name].from_pretrained(plain[name]), FAMILIES[name].denoiser)
    with torch.no_grad():
        expected = pretrained(*inputs, **options)[0]
    assert torch.equal(said, expected)
    *_, cold = first_call(name, images, tmp_path / "cold", plain[name], monkeypatch, *rank)
    assert not torch.equal(cold, expected)


def test_routed_base_keeps_its_routing_unless_another_is_given(images, tmp_path):
    base = FAMILIES["sd"].save_routed(tmp_path / "base", routing_beta=0.6, routing_alpha=2.0)
    kept = train("sd", images, tmp_path / "kept", base, "--rank", 2, "--max_train_steps", 1)
    changed = train("sd", images, tmp_path / "changed", base, "--routing_beta", 0.9, "--max_train_steps", 1)
    assert record(kept)["model"]["config"]["routing_beta"] == 0.6
    config = StableDiffusionPipeline.from_pretrained(changed).unet.config
    assert (config.routing_beta, config.routing_alpha) == (0.9, 2.0)


def test_cached_and_fresh_embeddings_and_latents_train_alike(plain, images, tmp_path):
    flags = ["--center_crop", "--proportion_empty_prompts", 0.3]
    fresh = train("sd3", images, tmp_path / "fresh", plain["sd3"], *flags)
    caching = ["--cache_latents", "--cache_text_embeddings"]
    cached = train("sd3", images, tmp_path / "cached", plain["sd3"], *flags, *caching)
    added = {path.name for path in cached.iterdir()} - {path.name for path in fresh.iterdir()}
    assert added == {"latents", "text_embeddings"}
    # A text's embedding is rounded by the batch that it is in, and Adam divides by small gradients.
    assert_close_weights(weights(cached), weights(fresh), 1e-4)
    assert (cached / "text_encoder").is_dir()


def test_empty_prompts_say_nothing_of_the_captions(plain, images, tmp_path):
    others = make_captioned_images(tmp_path / "others")
    metadata = others / "metadata.jsonl"
    lines = [json.loads(line) | {"text": ["something else"]} for line in metadata.read_text().splitlines()]
    metadata.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--proportion_empty_prompts", 1, "--max_train_steps", 1]
    runs = [train("sd", data, tmp_path / f"run-{data.name}", plain["sd"], *flags) for data in (images, others)]
    assert_equal_weights(*runs, "unet")


def test_held_out_loss_is_of_first_captions_whatever_the_run_draws(plain, images, tmp_path):
    still = ["--learning_rate", 0, "--max_train_steps", 1, "--validation_data_dir", images]
    losses = set()
    for number in (0, 1):
        flags = [*still, "--seed", number, "--proportion_empty_prompts", number]
        run = train("sd", images, tmp_path / str(number), plain["sd"], *flags)
        losses.add(record(run)["results"]["validation_loss"])
    assert len(losses) == 1


def test_denoiser_from_scratch_has_the_config_and_the_size_of_the_images(plain, images, tmp_path):
    config = {**FAMILIES["sd"].family.config, "block_out_channels": (4, 8), "sample_size": 32}
    run = train("sd", images, tmp_path / "run", plain["sd"], "--denoiser_config", config, "--max_train_steps", 1)
    unet = StableDiffusionPipeline.from_pretrained(run).unet
    assert (unet.config.block_out_channels, unet.config.sample_size) == ([4, 8], 8)


def test_result_is_in_full_precision_whatever_that_of_the_run(images, tmp_path):
    base = FAMILIES["sd"].pipeline(FAMILIES["sd"].family.plain())
    base.vae.register_to_config(force_upcast=False)
    base.save_pretrained(tmp_path / "base")
    flags = ["--mixed_precision", "bf16", "--max_train_steps", 1]
    run = train("sd", images, tmp_path / "run", tmp_path / "base", *flags)
    for part in ("unet", "vae"):
        assert {weight.dtype for weight in weights(run, part).values()} == {torch.float32}
    assert_equal_weights(run, tmp_path / "base", "vae")


def test_predicted_variance_is_learned(plain, images, tmp_path):
    flags = ["--denoiser_config", FAMILIES["pixart"].family.config, "--learn_sigma", "--max_train_steps", 1]
    pipeline = PixArtAlphaPipeline.from_pretrained(train("pixart", images, tmp_path / "run", plain["pixart"], *flags))
    assert pipeline.transformer.config.out_channels == 8
    assert sample(pipeline).shape == (1, 3, 8, 8)


def test_revision_and_variant_of_a_hub_repository_are_loaded(hub, images, tmp_path):
    api = HfApi()
    api.create_repo("owner/base")
    FAMILIES["sd"].pipeline(FAMILIES["sd"].family.plain()).save_pretrained(tmp_path / "base", variant="fp16")
    first = api.upload_folder(repo_id="owner/base", folder_path=tmp_path / "base").oid
    api.delete_folder("unet", repo_id="owner/base")
    flags = ["--revision", first, "--variant", "fp16", "--learning_rate", 0, "--max_train_steps", 1]
    run = train("sd", images, tmp_path / "run", "owner/base", *flags)
    before = load_file(tmp_path / "base" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in weights(run, "unet").items())
