"""Task affinity measured as users measure it: of a saved pipeline, interrupted, by several processes."""

import importlib
import json
import shutil
import sys
from importlib.metadata import version

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from text_to_image_runs import FAMILIES, make_captioned_images
from training_runs import (
    EXAMPLES,
    MODEL,
    NUM_CLASSES,
    files,
    finish,
    kill,
    launch,
    load_script,
    make_images,
    record,
    reset_accelerate,
    run_main,
    train,
    wait_for,
)

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel, NoiseLevels, TaskAffinity, cluster_timesteps
from diffusers_dtr.analysis import load_task_affinity


SCRIPT = EXAMPLES / "analysis" / "compute_task_affinity.py"
RESULT = "task_affinity.safetensors"


def make_pipeline(folder, seed=0, id2label=None):
    generator = torch.Generator().manual_seed(seed)
    model = DTRTransformer2DModel(**MODEL, out_channels=1, sample_size=8, num_embeds_ada_norm=NUM_CLASSES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    DTRPipeline(scheduler=DDPMScheduler(), transformer=model, id2label=id2label).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return make_images(folder / "images"), make_pipeline(folder / "pipeline"), make_pipeline(folder / "other", seed=1)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Captioned images, and two pipelines of every family: one of diffusers, one of ours."""
    folder = tmp_path_factory.mktemp("captioned")
    images = make_captioned_images(folder / "images")
    return {
        name: (images, family.save_plain(folder / f"plain-{name}"), family.save_routed(folder / f"routed-{name}"))
        for name, family in FAMILIES.items()
    }


def arguments(inputs, output_dir, *flags, models=None, timesteps=("--num_timesteps", 6)):
    images, pipeline, _ = inputs
    common = ["--pretrained_model_name_or_path", *(models or [pipeline]), "--train_data_dir", images]
    small = ["--resolution", 8, "--num_images", 8, *timesteps, "--cache_dir", images.parent / "cache"]
    return [str(value) for value in [*common, *small, "--output_dir", output_dir, *flags]]


def measure(inputs, output_dir, *flags, **options):
    run_main(load_script(SCRIPT), arguments(inputs, output_dir, *flags, **options))
    return TaskAffinity.load(output_dir / RESULT)


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    """What most others are compared with, and its folder."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    return measure(inputs, folder), folder


# --- the result ------------------------------------------------------------------------------------------------------


def test_result_is_a_file_a_picture_and_clusters_that_training_goes_on_with(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments(inputs, tmp_path / "out", "--cluster", 3)])
    found = measure(inputs, tmp_path / "out", "--cluster", 3, "--estimator", "plain")
    assert sorted(files(tmp_path / "out")) == ["task_affinity.png", RESULT]
    assert found.timesteps.tolist() == [0, 200, 400, 599, 799, 999]
    assert found.provenance["command"].startswith("accelerate launch")
    assert str(tmp_path) not in str(found.provenance)
    assert found.provenance["versions"]["torch"] == version("torch")
    path = tmp_path / "out" / RESULT
    full = load_task_affinity(path, NoiseLevels(DDPMScheduler()))
    printed = capsys.readouterr().out
    for name, cost in (("timestep", "timestep"), ("snr", "snr"), ("affinity", full)):
        boundaries = cluster_timesteps(DDPMScheduler(), 3, cost).boundaries
        assert f"3 clusters by {name}: {', '.join(map(str, boundaries))}\n" in printed
    assert f"split-half reliability: {found.reliability:.3f}" in printed
    flags = ["--num_clusters", 3, "--cluster_cost", "affinity", "--affinity_path", path, "--balancing", "uncertainty"]
    run = train(inputs[0], tmp_path / "run", *flags)
    assert record(run)["clusters"]["boundaries"] == list(boundaries)


def test_affinity_of_several_pipelines_or_checkpoints_is_that_of_their_weights(inputs, plain, tmp_path):
    _, pipeline, other = inputs
    alone = measure(inputs, tmp_path / "alone", models=[other]).matrix
    both = measure(inputs, tmp_path / "both", models=[pipeline, other]).matrix
    torch.testing.assert_close(both, (alone + plain[0].matrix) / 2)
    assert not torch.allclose(alone, plain[0].matrix, atol=1e-2)
    run = shutil.copytree(pipeline, tmp_path / "run")
    shutil.copytree(other / "transformer", run / "checkpoint-10" / "transformer")
    assert torch.equal(measure(inputs, tmp_path / "out", "--checkpoints", 10, models=[run]).matrix, alone)


FLAGS = ("--seed 1", "--num_images 12", "--estimator plain", "--sketch_size 0", "--sketch_size 512", "--center_crop")


@pytest.mark.parametrize("flags", [*FLAGS, "--parameters transformer_blocks.0"])
def test_every_flag_changes_the_result(inputs, plain, tmp_path, flags):
    assert not torch.equal(measure(inputs, tmp_path / "changed", *flags.split()).matrix, plain[0].matrix)


def test_given_timesteps_are_measured_whatever_the_number_of_images_in_a_forward_call(inputs, tmp_path):
    timesteps = ("--timesteps", 5, 250, 500, 990)
    found = [measure(inputs, tmp_path / str(size), "--train_batch_size", size, timesteps=timesteps) for size in (1, 2)]
    assert found[0].timesteps.tolist() == [5, 250, 500, 990]
    torch.testing.assert_close(found[0].matrix, found[1].matrix, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_killed_measurement_is_gone_on_with_by_two_processes_without_repeating_work(inputs, tmp_path):
    whole, cut = tmp_path / "whole" / "out", tmp_path / "cut" / "out"

    def start(folder, num_processes=1):
        return launch(arguments(inputs, folder, "--num_timesteps", 40), num_processes, SCRIPT)

    finish(start(whole))
    process = start(cut)
    try:
        wait_for(lambda: len(list(cut.glob("measurement/*-*-*.safetensors"))) >= 8, process)
    finally:
        kill(process)
    left = 40 - len(list(cut.glob("measurement/*-*-*.safetensors")))
    assert 0 < left < 40
    share = -(-left // 2)  # of the first process, whose progress is shown
    assert f"{share}/{share}" in finish(start(cut, num_processes=2))
    assert files(cut) == files(whole)


# --- kinds of pipelines ----------------------------------------------------------------------------------------------


def test_images_have_the_labels_that_the_model_has_for_their_classes(inputs, tmp_path, monkeypatch):
    told, forward = [], DTRTransformer2DModel.forward

    def spy(model, *arguments, class_labels=None, **options):
        told.append(class_labels)
        return forward(model, *arguments, class_labels=class_labels, **options)

    monkeypatch.setattr(DTRTransformer2DModel, "forward", spy)
    labels, models = [], []
    for names in ("abc", "cab"):
        told.clear()
        models.append(make_pipeline(tmp_path / names, id2label=dict(enumerate(names))))
        measure(inputs, tmp_path / f"out-{names}", models=models[-1:])
        labels.append([names[label] for label in torch.cat(told).tolist()])
    assert labels[0] == labels[1]
    with pytest.raises(ValueError, match="whose `id2label` are the same"):
        measure(inputs, tmp_path / "out", models=models)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_to_image_pipelines_of_diffusers_and_of_ours_are_measured(name, captioned, tmp_path):
    _, pipeline, routed = captioned[name]
    # Their text encoders may be saved in half precision.
    half = tmp_path / "half"
    DiffusionPipeline.from_pretrained(pipeline).to(torch.float16).save_pretrained(half)
    found = measure(captioned[name], tmp_path / "out", *FAMILIES[name].flags, models=[half, routed])
    assert found.provenance["checkpoints"] == 2
    levels = NoiseLevels(DiffusionPipeline.from_pretrained(pipeline).scheduler)
    assert torch.equal(found.training_timesteps, levels.timesteps)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("flags", [(), ("--validation_data_dir",)], ids=["training", "held_out"])
def test_denoiser_is_told_the_first_captions_of_the_images(name, flags, captioned, tmp_path, monkeypatch):
    images, pipeline, _ = captioned[name]
    script, batches = load_script(SCRIPT), []
    held_out_samples = script.held_out_samples

    def spy(*arguments):
        clean, batch = held_out_samples(*arguments)
        batches.append(batch)
        return clean, batch

    monkeypatch.setattr(script, "held_out_samples", spy)
    # Fewer captions at a time than images
    flags = [*FAMILIES[name].flags, "--train_batch_size", 3, *flags, *(images for _ in flags)]
    pipelines = script.Pipelines(script.parse_args(arguments(captioned[name], tmp_path / "out", *flags)))
    try:
        _, conditions = pipelines.load_samples(Accelerator(cpu=True))
    finally:
        reset_accelerate()
    first_captions = [json.loads(line)["text"][0] for line in (images / "metadata.jsonl").read_text().splitlines()]
    captions = [first_captions[row] for row in batches[0]["index"]]
    family, pipeline = pipelines.family, DiffusionPipeline.from_pretrained(pipeline)
    options = family.prompt_options(pipeline, pipelines.args.max_sequence_length)
    encoded = family.encode(pipeline, captions, torch.device("cpu"), options)
    torch.testing.assert_close(conditions, family.conditions(pipeline, encoded, batches[0]))


def test_unconditional_pipeline_is_measured(inputs, tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "unet")
    found = measure(inputs, tmp_path / "out", "--estimator", "plain", models=[tmp_path / "unet"])
    assert found.matrix.shape == (6, 6)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--timesteps", 1, 2), "at most one of --num_timesteps and --timesteps"),
        (("--num_timesteps", 3), "must be at least 4 timesteps, got 3"),
        (("--dataset_name", "other"), "Exactly one of --dataset_name and --train_data_dir"),
        (("--pretrained_model_name_or_path", "a", "b", "--checkpoints", 1), "--checkpoints are those of one"),
        (("--cache_latents", "--center_crop"), "of no use"),
        (("--dataloader_num_workers", 1), "of no use"),
        (("--parameters", "["), "--parameters: must be a regular expression, got '[': unterminated character set"),
        (("--output_dir", "PLAIN"), f"already holds {RESULT}"),
    ],
)
def test_flags_that_do_not_fit_are_refused(inputs, plain, tmp_path, capsys, flags, message):
    flags = [plain[1] if flag == "PLAIN" else flag for flag in flags]
    with pytest.raises(SystemExit):
        load_script(SCRIPT).parse_args(arguments(inputs, tmp_path / "out", *flags))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "flags", "message"),
    [
        (["pipeline"], ("--cluster", 5000), "`num_clusters` must be"),
        (["pipeline"], ("--checkpoints", 10, 20), "`--checkpoints` must have .* in checkpoint-10, checkpoint-20"),
        (["pipeline"], ("--train_data_dir", "four"), "The images have 4 classes, but the model knows 3"),
        (["sd"], ("--max_sequence_length", 4), "`--max_sequence_length` must be left out"),
        (["sd", "pixart"], (), "must be pipelines of one kind, got several"),
        (["flux"], (), r"or one of StableDiffusionPipeline, .* got FluxPipeline\. `TaskAffinity\.measure` takes any"),
    ],
    ids=str,
)
def test_values_that_cannot_be_used_are_refused_before_anything_is_measured(
    inputs, captioned, tmp_path, models, flags, message
):
    (tmp_path / "flux").mkdir()
    index = {"_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps(index))
    folders = {"pipeline": inputs[1], "flux": tmp_path / "flux"} | {name: captioned[name][1] for name in FAMILIES}
    if "four" in flags:
        flags = flags[0], make_images(tmp_path / "four", num_classes=4)
    with pytest.raises(ValueError, match=message):
        measure(inputs, tmp_path / "out", *flags, models=[folders[name] for name in models])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_packages_that_the_end_needs_are_asked_for_at_the_beginning(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.delitem(sys.modules, "negative_transfer_report", raising=False)
    for load in (lambda: load_script(SCRIPT), lambda: importlib.import_module("negative_transfer_report")):
        with pytest.raises(ImportError, match=package):
            load()
