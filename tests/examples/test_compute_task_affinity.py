"""Task affinity measured as users measure it: of a saved pipeline, interrupted, by several processes."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from text_to_image_runs import FAMILIES, every_family, make_captioned_images
from training_runs import (
    EXAMPLES,
    MODEL,
    NUM_CLASSES,
    files,
    finish,
    kill,
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


def make_pipeline(folder, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = DTRTransformer2DModel(**MODEL, out_channels=1, sample_size=8, num_embeds_ada_norm=NUM_CLASSES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    DTRPipeline(scheduler=DDPMScheduler(), transformer=model).save_pretrained(folder)
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
    plain = {name: family.save_plain(folder / f"plain-{name}") for name, family in FAMILIES.items()}
    routed = {name: family.save_routed(folder / f"routed-{name}") for name, family in FAMILIES.items()}
    return {name: (images, plain[name], routed[name]) for name in FAMILIES}


def arguments(inputs, output_dir, *flags, models=None):
    images, pipeline, _ = inputs
    common = [
        "--pretrained_model_name_or_path",
        *(models or [pipeline]),
        "--train_data_dir",
        images,
        "--resolution",
        8,
    ]
    small = ["--num_images", 8, "--num_timesteps", 6, "--cache_dir", images.parent / "cache"]
    return [str(value) for value in [*common, *small, "--output_dir", output_dir, *flags]]


def measure(inputs, output_dir, *flags, **options):
    run_main(load_script(SCRIPT), arguments(inputs, output_dir, *flags, **options))
    return TaskAffinity.load(output_dir / "task_affinity.safetensors")


def launch(argv, num_processes=1):
    command = [sys.executable, str(SCRIPT)]
    if num_processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command += [str(num_processes), str(SCRIPT)]
    return subprocess.Popen(
        [*command, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


def test_result_is_one_file_a_picture_and_clusters(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments(inputs, tmp_path / "out", "--cluster", 3)])
    found = measure(inputs, tmp_path / "out", "--cluster", 3)
    assert sorted(files(tmp_path / "out")) == ["task_affinity.png", "task_affinity.safetensors"]
    assert found.timesteps.tolist() == [0, 200, 400, 599, 799, 999]
    assert found.provenance["command"].startswith("accelerate launch")
    assert str(tmp_path) not in str(found.provenance)
    assert found.provenance["versions"]["torch"] == version("torch")
    full = load_task_affinity(tmp_path / "out" / "task_affinity.safetensors", NoiseLevels(DDPMScheduler()))
    printed = capsys.readouterr().out
    for name, cost in {"affinity": full, "snr": "snr", "timestep": "timestep"}.items():
        boundaries = cluster_timesteps(DDPMScheduler(), 3, cost).boundaries
        assert f"3 clusters by {name}: {', '.join(map(str, boundaries))}\n" in printed
    assert f"split-half reliability: {found.reliability:.3f}" in printed


def test_affinity_of_several_pipelines_is_the_mean_of_theirs(inputs, tmp_path):
    alone = [measure(inputs, tmp_path / model.name, models=[model]).matrix for model in inputs[1:]]
    both = measure(inputs, tmp_path / "both", models=inputs[1:]).matrix
    torch.testing.assert_close(both, sum(alone) / 2)
    assert not torch.allclose(*alone, atol=1e-2)


def test_checkpoints_of_a_run_are_measured(inputs, tmp_path):
    other = inputs[2]
    run = make_pipeline(tmp_path / "run")
    (run / "checkpoint-10").mkdir()
    (other / "transformer").rename(run / "checkpoint-10" / "transformer")
    try:
        found = measure(inputs, tmp_path / "out", "--checkpoints", 10, models=[run])
    finally:
        (run / "checkpoint-10" / "transformer").rename(other / "transformer")
    assert torch.equal(found.matrix, measure(inputs, tmp_path / "other", models=[other]).matrix)


@pytest.mark.parametrize(
    "flags",
    [
        ("--seed", 1),
        ("--num_images", 12),
        ("--estimator", "plain"),
        ("--sketch_size", 0),
        ("--sketch_size", 512),
        ("--parameters", "transformer_blocks.0"),
        ("--center_crop",),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_flag_changes_the_result(inputs, tmp_path, flags):
    plain = measure(inputs, tmp_path / "plain").matrix
    assert not torch.equal(measure(inputs, tmp_path / "changed", *flags).matrix, plain)


def test_given_timesteps_are_measured(inputs, tmp_path):
    argv = arguments(inputs, tmp_path / "out", "--timesteps", 5, 250, 500, 990)
    argv[argv.index("--num_timesteps") : argv.index("--num_timesteps") + 2] = []
    run_main(load_script(SCRIPT), argv)
    found = TaskAffinity.load(tmp_path / "out" / "task_affinity.safetensors")
    assert found.timesteps.tolist() == [5, 250, 500, 990]


def test_number_of_images_in_a_forward_call_does_not_matter(inputs, tmp_path):
    found = [measure(inputs, tmp_path / str(size), "--train_batch_size", size).matrix for size in (1, 2)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_interrupted_measurement_refuses_other_settings_and_goes_on(inputs, tmp_path, monkeypatch):
    from diffusers_dtr.analysis import measurement

    expected = measure(inputs, tmp_path / "whole" / "out")
    save, saved = measurement.save_file, []

    def die_at_the_third(tensors, path):
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(tensors, path)
        saved.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(measurement, "save_file", die_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            measure(inputs, tmp_path / "cut" / "out")
    with pytest.raises(ValueError, match="of other settings: `samples_sha256`, `seed` changed"):
        measure(inputs, tmp_path / "cut" / "out", "--seed", 1)
    found = measure(inputs, tmp_path / "cut" / "out")
    assert torch.equal(found.matrix, expected.matrix)
    assert files(tmp_path / "cut" / "out") == files(tmp_path / "whole" / "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--timesteps", 1, 2), "at most one of --num_timesteps and --timesteps"),
        (("--num_timesteps", 3), "must be at least 4 timesteps, got 3"),
        (("--dataset_name", "other"), "exactly one of --dataset_name and --train_data_dir"),
        (("--pretrained_model_name_or_path", "a", "b", "--checkpoints", 1), "--checkpoints are those of one"),
        (("--cache_latents",), "of no use"),
        (("--dataloader_num_workers", 1), "of no use"),
        (("--parameters", "["), "--parameters: must be a regular expression, got '[': unterminated character set"),
    ],
)
def test_flags_that_do_not_fit_are_refused(inputs, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        load_script(SCRIPT).parse_args(arguments(inputs, tmp_path / "out", *flags))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_packages_that_the_end_needs_are_asked_for_at_the_beginning(inputs, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    with pytest.raises(ImportError, match=f"need {package}: pip install"):
        load_script(SCRIPT).parse_args(arguments(inputs, tmp_path / "out"))
    with pytest.raises(ImportError, match=f"need {package}: pip install"):
        importlib.import_module("negative_transfer_report").Report(tmp_path / "report.json", {})


def test_result_is_never_written_over(inputs, tmp_path, capsys):
    measure(inputs, tmp_path / "out")
    with pytest.raises(SystemExit):
        load_script(SCRIPT).parse_args(arguments(inputs, tmp_path / "out"))
    assert "already holds task_affinity.safetensors" in capsys.readouterr().err


def test_images_of_more_classes_than_the_model_knows_are_refused(inputs, tmp_path):
    images = make_images(tmp_path / "images", num_classes=4)
    with pytest.raises(ValueError, match="The images have 4 classes, but the model knows 3"):
        measure(inputs, tmp_path / "out", "--train_data_dir", images)


def named_pipeline(source, folder, *names):
    pipeline = DTRPipeline.from_pretrained(source)
    pipeline.register_to_config(id2label={str(label): name for label, name in enumerate(names)})
    pipeline.save_pretrained(folder)
    return folder


def test_images_have_the_labels_that_the_model_has_for_their_classes(inputs, tmp_path, monkeypatch):
    told, forward = [], DTRTransformer2DModel.forward

    def spy(model, *arguments, class_labels=None, **options):
        told.append(class_labels)
        return forward(model, *arguments, class_labels=class_labels, **options)

    monkeypatch.setattr(DTRTransformer2DModel, "forward", spy)
    labels = []
    for names in ("abc", "cab"):
        told.clear()
        measure(inputs, tmp_path / f"out-{names}", models=[named_pipeline(inputs[1], tmp_path / names, *names)])
        labels.append([names[label] for label in torch.cat(told).tolist()])
    assert labels[0] == labels[1]


def test_pipelines_that_number_their_classes_differently_are_refused(inputs, tmp_path):
    models = [named_pipeline(inputs[1], tmp_path / names, *names) for names in ("abc", "cab")]
    with pytest.raises(ValueError, match="whose `id2label` are the same"):
        measure(inputs, tmp_path / "out", models=models)


@every_family
def test_text_to_image_pipelines_of_diffusers_and_of_ours_are_measured(name, captioned, tmp_path):
    inputs = captioned[name]
    found = measure(inputs, tmp_path / "out", *FAMILIES[name].flags, models=inputs[1:])
    assert found.provenance["checkpoints"] == 2
    levels = NoiseLevels(DiffusionPipeline.from_pretrained(inputs[1]).scheduler)
    assert torch.equal(found.training_timesteps, levels.timesteps)
    assert sorted(files(tmp_path / "out")) == ["task_affinity.png", "task_affinity.safetensors"]


@every_family
@pytest.mark.parametrize("flags", [(), ("--validation_data_dir",)], ids=["training", "held_out"])
def test_denoiser_is_told_the_first_captions_of_the_images(name, flags, captioned, tmp_path, monkeypatch):
    images, pipeline, _ = captioned[name]
    script, batches = load_script(SCRIPT), []
    held_out_samples = script.training.held_out_samples

    def spy(*arguments):
        clean, batch = held_out_samples(*arguments)
        batches.append(batch)
        return clean, batch

    monkeypatch.setattr(script.training, "held_out_samples", spy)
    # Fewer captions at a time than images
    flags = [*FAMILIES[name].flags, "--train_batch_size", 3, *flags, *(images for _ in flags)]
    pipelines = script.Pipelines(script.parse_args(arguments(captioned[name], tmp_path / "out", *flags)))
    try:
        _, conditions = pipelines.load_samples(Accelerator(cpu=True))
    finally:
        reset_accelerate()
    first_captions = [json.loads(line)["text"][0] for line in (images / "metadata.jsonl").read_text().splitlines()]
    captions = [first_captions[row] for row in batches[0]["row"]]
    family = pipelines.family
    pipeline = DiffusionPipeline.from_pretrained(pipeline)
    options = family.prompt_options(pipeline, pipelines.args.max_sequence_length)
    encoded = family.encode(pipeline, captions, torch.device("cpu"), options)
    torch.testing.assert_close(conditions, family.conditions(pipeline, encoded, {}))


def test_text_encoder_in_half_precision_is_taken_in_full(captioned, tmp_path):
    _, pipeline, _ = captioned["sd"]
    DiffusionPipeline.from_pretrained(pipeline).to(torch.float16).save_pretrained(tmp_path / "half")
    found = measure(captioned["sd"], tmp_path / "out", models=[tmp_path / "half"])
    assert found.provenance["checkpoints"] == 1


def test_checkpoints_of_a_text_to_image_run_are_measured(captioned, tmp_path):
    *_, other = captioned["sd"]
    run = FAMILIES["sd"].save_routed(tmp_path / "run", routing_beta=0.5)
    shutil.copytree(other / "unet", run / "checkpoint-10" / "unet")
    found = measure(captioned["sd"], tmp_path / "out", "--checkpoints", 10, models=[run])
    assert torch.equal(found.matrix, measure(captioned["sd"], tmp_path / "other", models=[other]).matrix)


def test_unconditional_pipeline_is_measured(inputs, tmp_path):
    unet = UNet2DModel(
        8,
        1,
        1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "unet")
    found = measure(inputs, tmp_path / "out", "--estimator", "plain", models=[tmp_path / "unet"])
    assert found.matrix.shape == (6, 6)


def test_pipelines_of_other_kinds_are_refused_and_it_is_said_what_takes_them(inputs, tmp_path):
    (tmp_path / "flux").mkdir()
    index = {"_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps(index))
    allowed = r"class-conditional or unconditional pipelines, or one of StableDiffusionPipeline, .*, got FluxPipeline"
    with pytest.raises(ValueError, match=rf"must be {allowed}\. `TaskAffinity\.measure` takes any denoiser"):
        measure(inputs, tmp_path / "out", models=[tmp_path / "flux"])


def test_pipelines_of_several_kinds_are_refused(inputs, captioned, tmp_path):
    with pytest.raises(ValueError, match="must be pipelines of one kind, got several"):
        measure(inputs, tmp_path / "out", models=[captioned["sd"][1], captioned["pixart"][1]])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cluster", 5000), "`num_clusters` must be"),
        (("--checkpoints", 10, 20), r"`--checkpoints` must have .*, got none in checkpoint-10, checkpoint-20\."),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_values_that_cannot_be_used_are_refused_before_anything_is_measured(inputs, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        measure(inputs, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_length_of_prompts_is_refused_where_it_is_not_to_be_chosen(inputs, captioned, tmp_path):
    for pipelines in (inputs, captioned["sd"]):
        with pytest.raises(ValueError, match="`--max_sequence_length` must be left out"):
            measure(pipelines, tmp_path / "out", "--max_sequence_length", 4)


@pytest.mark.slow
def test_killed_measurement_is_gone_on_with_by_two_processes_without_repeating_work(inputs, tmp_path):
    flags = ["--num_timesteps", 40]
    whole, cut = tmp_path / "whole" / "out", tmp_path / "cut" / "out"
    finish(launch(arguments(inputs, whole, *flags)))
    process = launch(arguments(inputs, cut, *flags))
    try:
        wait_for(lambda: len(list(cut.glob("measurement/*-*-*.safetensors"))) >= 8, process)
    finally:
        kill(process)
    left = 40 - len(list(cut.glob("measurement/*-*-*.safetensors")))
    assert 0 < left < 40
    share = -(-left // 2)  # of the first process, whose progress is shown
    assert f"{share}/{share}" in finish(launch(arguments(inputs, cut, *flags), num_processes=2))
    assert files(cut) == files(whole)


@pytest.mark.slow
def test_two_processes_find_what_one_does(inputs, tmp_path):
    one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
    finish(launch(arguments(inputs, one)))
    finish(launch(arguments(inputs, two), num_processes=2))
    assert files(one) == files(two)


def test_training_goes_on_with_the_clusters_that_the_affinity_implies(inputs, tmp_path, capsys):
    affinity = measure(inputs, tmp_path / "affinity", "--cluster", 3, "--estimator", "plain")
    clusters = cluster_timesteps(DDPMScheduler(), 3, cost=affinity.full_matrix())
    path = tmp_path / "affinity" / "task_affinity.safetensors"
    flags = ["--num_clusters", 3, "--cluster_cost", "affinity", "--affinity_path", path, "--balancing", "uncertainty"]
    run = train(inputs[0], tmp_path / "run", *flags)
    assert record(run)["clusters"]["boundaries"] == list(clusters.boundaries)
    assert f"3 clusters by affinity: {', '.join(map(str, clusters.boundaries))}" in capsys.readouterr().out
