"""What cards say of real folders: of training runs, pipelines of several families, and LoRA weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny_dit import routed_dit

import diffusers_dtr
from diffusers_dtr import (
    DTRPipeline,
    DTRUNet2DConditionModel,
    DTRUNet2DModel,
    route,
    route_adapter,
    save_routed_lora,
)
from diffusers_dtr.model_card import build_model_card, fetch_card, save_metrics, save_model_card
from diffusers_dtr.training.config import DataConfig, ModelConfig, RunConfig, TextConfig, TrainingConfig
from diffusers_dtr.training.run.folder import save_record
from diffusers_dtr.training.run.losses import LossHistory, MeanLosses
from diffusers_dtr.training.run.record import describe_model, run_record


MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
UNET = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
ARGUMENTS = {
    **{"validation_split": "test", "resolution": 8, "seed": 5, "train_batch_size": 4, "num_clusters": 2},
    **{"gradient_accumulation_steps": 3, "max_train_steps": 20, "learning_rate": 1e-3, "lr_scheduler": "cosine"},
    **{"use_ema": True, "ema_max_decay": 0.99, "balancing": "uncertainty", "loss_weighting": "min_snr"},
    **{"snr_gamma": 5.0, "hub_token": "hf_secret", "validation_guidance_scale": 1.5},
    "validation_num_inference_steps": 7,
}
RESULTS = {"validation_loss": 0.123456, "validation_loss/eighth_0": 0.2, "validation_loss/eighth_1": 0.05}


def write_record(folder: Path, model, arguments: dict = {}, **results) -> None:  # noqa: B006 - only read
    text = TextConfig() if "caption_column" in arguments else None
    config = TrainingConfig(RunConfig("/home/me/run"), DataConfig("owner/digits"), ModelConfig(), text=text)
    record = run_record(
        config.replace(**{**ARGUMENTS, **arguments}),
        [
            *("examples/train.py", "--gradient_accumulation_steps=3"),
            *("--output_dir", "/home/me/run", "--hub_token", "hf_secret"),
        ],
        Accelerator(cpu=True, gradient_accumulation_steps=3),
        3725.0,
        **{"clusters": {"num_clusters": 2, "boundaries": [0, 700, 1000]}, "results": RESULTS},
        **{"model": describe_model(model), "num_images": 1437, "held_out": {"images": 360}},
        **results,
    )
    save_record(record, folder)


@pytest.fixture
def run(tmp_path):
    """A folder as a training script leaves it."""
    folder = tmp_path / "digits"
    model = routed_dit(in_channels=3, out_channels=3)
    DTRPipeline(DDPMScheduler(), transformer=model, id2label={0: "zero, nought", 1: "one"}).save_pretrained(folder)
    write_record(folder, model)
    history = LossHistory(folder)
    history.append(10, MeanLosses(0.5, (0.4, 0.6)), [1.0, 1.0])
    history.append(20, MeanLosses(0.4, (0.3, float("nan"))), [0.5, 1.5])
    history.save_picture()
    (folder / "samples").mkdir()
    for step, colour in ((10, "black"), (20, "red")):
        Image.new("RGB", (16, 8), colour).save(folder / "samples" / f"step-{step:08d}.png")
    return folder


def card_of(folder: Path, **options) -> ModelCard:
    return ModelCard.load(save_model_card(folder, **options))


def rows(card: ModelCard) -> dict[str, list[str]]:
    """All rows of all tables by their first cell."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in card.text.splitlines() if line[:1] == "|"
    ]
    return {first: rest for first, *rest in cells}


def code(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]


# ---- what it says


def test_metadata_is_what_the_hub_indexes(run):
    data = card_of(run, license="mit").data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    assert (data.license, data.datasets, data.metrics, data.base_model) == ("mit", ["owner/digits"], ["mse"], None)
    assert {"diffusers-dtr", "class-conditional-image-generation"} < {*data.tags}
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_value) == ("owner/digits", 0.12346)
    said = {"images": 360, "split": "test", "prediction_type": "epsilon", "weights": "exponential moving average"}
    assert result.metric_args == {**said, "loss": "mean squared error of the prediction"}


def test_tables_code_and_pictures_are_those_of_config_record_and_losses(run, tmp_path):
    card = card_of(run)
    table, text = rows(card), card.text
    expected = {"share of active channels β": "0.8", "active channels": "12 of 16", "exponent of the slide α": "4"}
    expected |= {"balancing": "uncertainty", "weighting by noise level": "min_snr"}
    expected |= {"γ of the weighting": "5", "optimizer steps": "20", "images per step": "12", "images": "1,437"}
    expected |= {"seed": "5", "hours of training": "1.03"}
    assert {name: table[name][0] for name in expected} == expected
    assert f"diffusers-dtr: {diffusers_dtr.__version__}" in table["versions"][0]
    assert table["timesteps of the clusters"] == ["0 to 699, 700 to 999"]
    assert "**0.12346** (images: 360, loss: mean" in text
    assert "Its classes are zero, one.\n" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures == ["figures/samples.png", "figures/routing_masks.png", "loss_per_cluster.png"]
    assert all(Image.open(run / picture) for picture in pictures)
    with Image.open(run / "figures" / "samples.png") as samples:  # the last, enlarged without smoothing and set apart
        assert sorted(samples.getcolors()) == [(6 * 200, (255, 255, 255)), (2 * 200 * 200, (255, 0, 0))]
    flags = ["--gradient_accumulation_steps=3", "--output_dir path/to/run"]
    assert " \\\n  ".join(["accelerate launch examples/train.py", *flags]) in text
    for private in ("hf_secret", "/home/", str(tmp_path), "None", "nan"):
        assert private not in str(card)
    namespace = {}
    exec(code(card).replace("path/to/digits", str(run)).replace("[0],", "[0], num_inference_steps=1,"), namespace)
    assert len(namespace["images"]) == 1


def test_a_record_as_older_versions_wrote_it_is_not_published_as_it_is(run, tmp_path):
    record = json.loads((run / "training_config.json").read_text())
    record["arguments"] |= {"pretrained_model_name_or_path": "/home/me/base", "hub_token": "hf_secret"}
    record["command"] = "accelerate launch train.py"
    save_record(record, run)
    card = card_of(run, card_dir=tmp_path / "card")
    assert card.data.base_model is None
    for path in (tmp_path / "card").rglob("*.*"):
        assert b"/home/me" not in path.read_bytes()
        assert b"hf_secret" not in path.read_bytes()


def test_metrics_of_evaluations_are_results_with_their_settings_and_command(run):
    metric = {"name": "FID | 5k", "type": "fid", "value": 12.3456789, "dataset": "mnist"}
    metric["settings"] = {"samples": 5000}
    save_metrics(run, [{**metric, "value": 99.0}, {"name": "other", "type": "accuracy", "value": 1.0}], ["old.py"])
    save_metrics(run, [metric], ["eval/fid.py", "--pipeline", str(run)])
    card = card_of(run)
    results = {result.metric_name: result for result in card.data.eval_results}
    fid = results["FID | 5k"]
    assert (fid.metric_value, fid.metric_args, fid.dataset_type) == (12.3456789, {"samples": 5000}, "mnist")
    assert results["other"].dataset_type == "owner/digits"
    assert card.data.metrics == ["accuracy", "fid", "mse"]
    assert rows(card)["other"] == ["100.0%", ""]
    assert r"| FID \| 5k | 12.35 | samples: 5000 |" in card.text
    assert "```bash\npython eval/fid.py \\\n  --pipeline path/to/digits\n```" in card.text
    assert "was not measured" not in card.text


# ---- families


def test_an_unconditional_unet_without_a_record_has_a_card(tmp_path):
    DTRPipeline(DDPMScheduler(), unet=DTRUNet2DModel(**UNET, routing_alpha=2.0)).save_pretrained(tmp_path / "faces")
    card = card_of(tmp_path / "faces")
    assert "An unconditional diffusion model (`DTRUNet2DModel`) with Denoising Task Routing.\n" in card.text
    assert rows(card)["exponent of the slide α"] == ["2"]
    for absent in ("## Clusters", "## Results", "## Training", "None", "![Samples]"):
        assert absent not in card.text
    assert card.data.eval_results is None
    assert "class-conditional-image-generation" not in card.data.tags
    assert 'DTRPipeline.from_pretrained("path/to/faces")\nimages = pipe(\n    generator=' in code(card)


# These pipelines have no text encoder, which a pipeline must be told when it is loaded.
TEXTLESS = "text_encoder=None, tokenizer=None"


def stable_diffusion(unet) -> StableDiffusionPipeline:
    none = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    return StableDiffusionPipeline(
        unet=unet,
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
        scheduler=DDPMScheduler(),
        **dict.fromkeys(none),
        requires_safety_checker=False,
    )


UNET_CONDITION = {**UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 12}
UNET_CONDITION |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2}


def test_a_text_to_image_pipeline_is_loaded_by_its_own_class(tmp_path):
    unet = DTRUNet2DConditionModel(**UNET_CONDITION)
    stable_diffusion(unet).save_pretrained(tmp_path)
    base = {"pretrained_model_name_or_path": "owner/base", "hub_model_id": "owner/fine", "caption_column": "text"}
    write_record(tmp_path, unet, base, sampling={"prompt": ['a "red" cat']})
    card = card_of(tmp_path)
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.base_model == "owner/base"
    assert card.data.base_model_relation == "finetune"
    assert "# fine\n" in card.text
    load, call = code(card).split("images =")
    assert 'prompt=["a \\"red\\" cat"],' in call
    namespace = {}
    exec(load.replace('"owner/fine"', f"'{tmp_path}', {TEXTLESS}"), namespace)
    assert type(namespace["pipe"].unet) is DTRUNet2DConditionModel


def test_lora_weights_have_a_card_that_routes_their_base_model(tmp_path):
    stable_diffusion(UNet2DConditionModel(**UNET_CONDITION)).save_pretrained(tmp_path / "base")
    unet = DTRUNet2DConditionModel(**UNET_CONDITION, routing_beta=0.5).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(unet))
    base = {"pretrained_model_name_or_path": "owner/base", "caption_column": "text"}
    write_record(tmp_path / "lora", unet, base)
    card = card_of(tmp_path / "lora")
    assert card.data.base_model_relation == "adapter"
    assert "lora" in card.data.tags
    assert "LoRA weights for a text-to-image diffusion model (`DTRUNet2DConditionModel`)" in card.text
    assert rows(card)["active channels"] == ["4 of 8, 8 of 16, 12 of 24, 16 of 32"]
    assert re.fullmatch(r"[\d,]+ of [\d,]+", rows(card)["trained parameters"][0])
    load = code(card).split("images =")[0]
    namespace = {}
    load = load.replace('"owner/base"', f"'{tmp_path}/base', {TEXTLESS}").replace("path/to/lora", f"{tmp_path}/lora")
    exec(load, namespace)
    assert type(namespace["pipe"].unet) is DTRUNet2DConditionModel
    assert namespace["pipe"].unet.config.routing_beta == 0.5
    assert namespace["pipe"].get_active_adapters()


@pytest.mark.parametrize(
    ("routing", "said"),
    [({"routing_beta": 1.0}, "is not routed"), ({"routing_type": "random", "routing_seed": 7}, "random channels")],
)
def test_a_window_that_does_not_slide_is_not_drawn(tmp_path, routing, said):
    DTRPipeline(DDPMScheduler(), transformer=routed_dit(**routing)).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert said in card.text
    assert "routing_masks" not in card.text
    assert rows(card).get("seed") == (["7"] if "routing_seed" in routing else None)


def test_folders_without_a_model_and_broken_records_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`folder` must hold one of model_index.json, training_config.json"):
        build_model_card(tmp_path)
    (tmp_path / "training_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"`training_config.json` is not JSON"):
        build_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


# ---- again


def test_what_is_written_around_the_section_stays_and_the_section_is_renewed_by_a_longer_run(run):
    path = save_model_card(run, license="mit")
    once = path.read_bytes()
    assert save_model_card(run).read_bytes() == once
    edited = path.read_text().replace("# digits", "# My digits").replace("Research on", "Teaching about")
    edited = edited.replace("license: mit", "license: apache-2.0\nlanguage: en").replace("- diffusers\n", "- mine\n")
    path.write_text(edited)
    write_record(run, routed_dit(in_channels=3, out_channels=3), {"max_train_steps": 4000})
    card = card_of(run)
    assert "# My digits" in card.text
    assert "Teaching about" in card.text
    assert (card.data.license, card.data.language) == ("apache-2.0", "en")
    assert {"mine", "diffusers"} < {*card.data.tags}
    assert rows(card)["optimizer steps"] == ["4,000"]


def test_a_card_of_an_earlier_version_is_renewed(run):
    (run / "README.md").write_text((MODEL_CARDS / "dtr-digits" / "README.md").read_text())
    card = card_of(run)
    assert "# dtr-digits" in card.text
    assert (card.data.license, rows(card)["optimizer steps"]) == ("apache-2.0", ["20"])


def test_a_text_of_others_gets_metadata_alone(run, caplog):
    (run / "README.md").write_bytes(b"Written by hand: \xc3\xa4.\r\n<!-- diffusers-dtr:begin -->\r\n")
    text = save_model_card(run).read_bytes().decode()
    assert text.startswith("---\r\n")
    assert text.endswith("---\r\nWritten by hand: ä.\r\n<!-- diffusers-dtr:begin -->\r\n")
    assert "only its metadata were renewed" in caplog.text
    assert save_model_card(run).read_bytes().decode() == text


@pytest.mark.parametrize("metadata", ["tags: [a", "- a"])
def test_metadata_that_cannot_be_read_are_an_error_and_stay(metadata, run):
    (run / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(ValueError, match=r"metadata of README.md must be"):
        save_model_card(run)
    assert (run / "README.md").read_text() == f"---\n{metadata}\n---\n"


EDITS = {"none": ("", ""), "here": ("# digits", "# Here"), "hub": ("## Citation", "## Hub")}


@pytest.mark.parametrize(
    ("local", "remote", "kept"),
    [("none", "hub", "## Hub"), ("here", "none", "# Here"), ("here", "hub", "# Here"), ("hub", "hub", "## Hub")],
)
def test_the_text_that_was_written_in_stays(local, remote, kept, run, caplog):
    card = save_model_card(run).read_text()
    (run / "README.md").write_text(card.replace(*EDITS[local]))
    write_record(run, routed_dit(in_channels=3, out_channels=3), {"max_train_steps": 4000})
    renewed = card_of(run, published=card.replace(*EDITS[remote]).replace("tags:", "language: en\ntags:"))
    assert kept in renewed.text
    assert rows(renewed)["optimizer steps"] == ["4,000"]
    assert renewed.data.language == "en"
    assert ("edited both here" in caplog.text) == ((local, remote) == ("here", "hub"))


def test_a_repository_without_a_card_or_revision_has_none_and_one_that_is_not_there_is_an_error(hub):
    HfApi().create_repo("owner/digits")
    assert fetch_card("owner/digits") is fetch_card("owner/digits", revision="experiment") is None
    with pytest.raises(OSError, match="Repository Not Found"):
        fetch_card("owner/nothing")


def test_a_card_elsewhere_has_copies_of_all_it_links_to(run, tmp_path):
    save_metrics(run, [{"name": "accuracy", "type": "accuracy", "value": 0.5}], ["evaluate.py"])
    card = card_of(run, card_dir=tmp_path / "card")
    links = [link for link in re.findall(r"\]\((.*?)\)", card.text) if not link.startswith("http")]
    assert all((tmp_path / "card" / link).is_file() for link in [*links, "metrics.json"])
    assert not (run / "README.md").exists()


def test_the_card_of_routed_adapters_says_how_they_are_routed(tmp_path):
    unet = UNet2DConditionModel(**UNET_CONDITION).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    save_routed_lora(route_adapter(unet, routing_beta=0.25), tmp_path)
    route(unet, routing_type="none")
    write_record(tmp_path, unet, {"pretrained_model_name_or_path": "owner/base", "caption_column": "text"})
    card = card_of(tmp_path)
    assert rows(card)["share of active channels β"] == ["0.25"]
    assert "all channels are active" not in card.text
