"""Training that starts from pretrained parts: a pipeline to fine-tune, or an autoencoder to learn the latents of."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
)
from tiny_autoencoders import tiny_vae
from training_runs import MODEL, assert_same_configs, make_images, record, same_weights, train, weights

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel


# Channels follow from the autoencoder.
OF_LATENTS = ("--model_config", {name: value for name, value in MODEL.items() if name != "in_channels"})


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def ours(images, tmp_path_factory) -> Path:
    """A pipeline of this script, trained far enough for routing to matter."""
    flags = ["--max_train_steps", 8, "--num_train_timesteps", 50, "--routing_beta", 0.6, "--class_dropout_prob", 0.3]
    return train(images, tmp_path_factory.mktemp("pipelines") / "ours", *flags)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    vae = tiny_vae(latent_channels=2)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_dit(vae_folder, tmp_path_factory) -> Path:
    """A DiTPipeline as diffusers has it: embedders in every block, equal in all, and a learned variance."""
    torch.manual_seed(0)
    config = {**MODEL, "in_channels": 2, "out_channels": 4, "sample_size": 4}
    transformer = DiTTransformer2DModel(**config, num_embeds_ada_norm=3, norm_type="ada_norm_zero")
    first, *others = transformer.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    scheduler = DDIMScheduler(num_train_timesteps=100, beta_schedule="scaled_linear")
    folder = tmp_path_factory.mktemp("pipelines") / "plain"
    DiTPipeline(transformer, AutoencoderKL.from_pretrained(vae_folder), scheduler).save_pretrained(folder)
    return folder


def fine_tune(images: Path, output_dir: Path, pipeline: Path, *flags: object) -> Path:
    return train(images, output_dir, *flags, source=("--pretrained_model_name_or_path", pipeline))


def first_output(images, output_dir, pipeline, monkeypatch, *flags) -> torch.Tensor:
    """What the model says in the first step, on inputs that depend on the seed alone."""
    outputs = []
    forward = DTRTransformer2DModel.forward

    def spy(model, *inputs, **options):
        output = forward(model, *inputs, **options)
        if model.training:
            outputs.append(output[0].detach())
        return output

    with monkeypatch.context() as patch:
        patch.setattr(DTRTransformer2DModel, "forward", spy)
        fine_tune(images, output_dir, pipeline, "--max_train_steps", 2, *flags)
    return outputs[0]


def test_warm_up_starts_exactly_at_the_unrouted_model(plain_dit, images, tmp_path, monkeypatch):
    flags = {"unrouted": ("--routing_type", "none"), "warm": ("--routing_warmup_steps", 2), "cold": ()}
    output = {name: first_output(images, tmp_path / name, plain_dit, monkeypatch, *flags[name]) for name in flags}
    assert torch.equal(output["warm"], output["unrouted"])
    assert not torch.equal(output["cold"], output["unrouted"])
    assert not same_weights(tmp_path / "warm", tmp_path / "unrouted")


def test_plain_dit_becomes_a_routed_pipeline_with_its_own_schedule_and_autoencoder(plain_dit, images, tmp_path):
    run = fine_tune(images, tmp_path / "run", plain_dit, "--learning_rate", 0, "--max_train_steps", 1)
    before, after = DiTPipeline.from_pretrained(plain_dit), DTRPipeline.from_pretrained(run)
    assert_same_configs(plain_dit, run, plain="transformer")
    assert tuple(after.transformer.config.routing_timestep_range) == (0, 99)
    assert after.transformer.config.routing_beta == 0.8
    one, other = before.vae.state_dict(), after.vae.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    after.transformer.set_routing_beta(1.0)
    inputs = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 70])
    labels = {"class_labels": torch.tensor([0, 2]), "return_dict": False}
    with torch.no_grad():
        torch.testing.assert_close(after.transformer(*inputs, **labels), before.transformer(*inputs, **labels))


def test_what_is_not_given_stays_as_it_was_pretrained(ours, images, tmp_path):
    kept = DTRPipeline.from_pretrained(fine_tune(images, tmp_path / "kept", ours))
    assert kept.transformer.config.routing_beta == 0.6
    assert kept.transformer.config.class_dropout_prob == 0.3
    assert kept.scheduler.config.num_train_timesteps == 50
    flags = ["--class_dropout_prob", 0.2, "--prediction_type", "v_prediction", "--routing_timestep_range", 5, 45]
    changed = DTRPipeline.from_pretrained(fine_tune(images, tmp_path / "changed", ours, *flags))
    assert changed.transformer.config.routing_timestep_range == [5, 45]
    assert changed.transformer.config.class_dropout_prob == 0.2
    assert changed.scheduler.config.prediction_type == "v_prediction"


def test_null_class_neither_comes_nor_goes(ours, images, tmp_path):
    with pytest.raises(ValueError, match=r"`--class_dropout_prob` must be above 0, got 0\.0"):
        fine_tune(images, tmp_path / "dropped", ours, "--class_dropout_prob", 0)
    without = train(images, tmp_path / "without", "--max_train_steps", 1, "--class_dropout_prob", 0)
    with pytest.raises(ValueError, match=r"`--class_dropout_prob` must be 0, got 0\.5"):
        fine_tune(images, tmp_path / "added", without, "--class_dropout_prob", 0.5)
    fine_tune(images, tmp_path / "kept", without, "--class_dropout_prob", 0)


def label_table(run: Path) -> torch.Tensor:
    (table,) = [weight for name, weight in weights(run).items() if "embedding_table" in name]
    return table


def rename(images: Path, names: str) -> Path:
    """The class folders a, b, ... get other names."""
    for number, name in enumerate(names):
        (images / "abcdefgh"[number]).rename(images / f"new-{name}")
    for name in names:
        (images / f"new-{name}").rename(images / name)
    return images


def test_new_classes_come_behind_the_known_ones_which_keep_their_embeddings(ours, tmp_path):
    images = rename(make_images(tmp_path / "images", num_classes=5), "xbacy")
    run = fine_tune(images, tmp_path / "run", ours, "--learning_rate", 0)
    before, after = label_table(ours), label_table(run)
    assert torch.equal(after[[0, 1, 2, 5]], before)
    assert DTRPipeline.from_pretrained(run).config.id2label == {"0": "a", "1": "b", "2": "c", "3": "x", "4": "y"}


def test_classes_of_other_names_get_a_new_label_embedding_but_for_the_null_class(ours, tmp_path):
    images = rename(make_images(tmp_path / "images", num_classes=3), "xyz")
    run = fine_tune(images, tmp_path / "run", ours, "--learning_rate", 0)
    before, after = label_table(ours), label_table(run)
    assert torch.equal(after[-1], before[-1])
    assert not any(torch.equal(*pair) for pair in zip(after[:-1], before[:-1], strict=True))
    assert DTRPipeline.from_pretrained(run).config.id2label == {"0": "x", "1": "y", "2": "z"}


def test_other_resolution_is_what_the_fine_tuned_pipeline_samples(ours, images, tmp_path):
    pipeline = DTRPipeline.from_pretrained(fine_tune(images, tmp_path / "run", ours, "--resolution", 16))
    assert pipeline(class_labels=[0], num_inference_steps=1).images[0].size == (16, 16)


def test_latent_pipeline_has_the_autoencoder_and_samples_images(vae_folder, images, tmp_path):
    flags = ["--vae_name_or_path", vae_folder, "--resolution", 16, "--validation_data_dir", images]
    run = train(images, tmp_path / "run", *flags, source=OF_LATENTS)
    pipeline = DTRPipeline.from_pretrained(run)
    assert pipeline.transformer.config.in_channels == 2
    assert pipeline.transformer.config.sample_size == 8
    assert not pipeline.scheduler.config.clip_sample
    assert pipeline(class_labels=[0], num_inference_steps=1).images[0].size == (16, 16)
    assert record(run)["results"]["validation_loss"] > 0
