import logging
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from training_runs import (
    EXAMPLES,
    MODEL,
    SCRIPT,
    arguments,
    files,
    load_script,
    make_images,
    record,
    run_main,
    same_weights,
    train,
)

from diffusers_dtr import DTRPipeline, DTRTransformer2DModel, training


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory) -> Path:
    """A run of four steps without further flags, for others to differ from."""
    return train(images, tmp_path_factory.mktemp("runs") / "plain", "--max_train_steps", 4)


# Each flag with those that it has an effect with.
EFFECTIVE = [
    "--seed 1",
    "--train_batch_size 8",
    "--gradient_accumulation_steps 2",
    "--learning_rate 1e-3",
    "--lr_scheduler constant_with_warmup --lr_warmup_steps 2",
    "--adam_beta1 0.5",
    "--adam_beta2 0.5",
    "--adam_weight_decay 0.5",
    "--adam_epsilon 1.0",
    "--mixed_precision bf16",
    "--use_ema",
    "--ema_max_decay 0.1 with --use_ema",
    "--ema_inv_gamma 10.0 with --use_ema",
    "--ema_power 0.1 with --use_ema",
    "--class_dropout_prob 0.9",
    "--resolution 4",
    "--center_crop",
    "--random_flip",
    "--noise_schedule squaredcos_cap_v2",
    "--prediction_type v_prediction",
    "--routing_alpha 0.1",
    "--routing_beta 0.4",
    "--routing_type random",
    "--routing_seed 1 with --routing_type random",
    "--routing_warmup_steps 4",
    "--timestep_sampling clusters",
    "--timestep_sampling logit_normal",
    "--loss_weighting min_snr",
    "--balancing continuous_uncertainty",
    "--snr_gamma 0.1 with --loss_weighting min_snr",
    "--num_clusters 3 with --balancing uncertainty",
    "--cluster_cost uniform with --balancing uncertainty",
    "--balancing_update_every 3 with --balancing mgda --num_clusters 2",
]


@pytest.mark.parametrize("flags", EFFECTIVE)
def test_flag_changes_what_is_learned(flags, images, plain, tmp_path):
    flag, _, others = flags.partition(" with ")
    common = ["--max_train_steps", 4, *others.split()]
    without = train(images, tmp_path / "without", *common) if others else plain
    assert not same_weights(train(images, tmp_path / "run", *common, *flag.split()), without)


def test_workers_logging_and_checkpoints_leave_the_weights_alone(images, plain, tmp_path):
    flags = ["--max_train_steps", 4, "--dataloader_num_workers", 2, "--logging_steps", 1, "--report_to", "tensorboard"]
    flags += ["--checkpointing_steps", 1, "--validation_steps", 1, "--validation_data_dir", images]
    run = train(images, tmp_path / "run", *flags, "--checkpoints_total_limit", 2)
    assert same_weights(run, plain)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def spy_on_forward(monkeypatch, spy) -> None:
    """Calls `spy(model, hidden_states, timestep, class_labels)` before every forward call."""
    forward = DTRTransformer2DModel.forward

    def spied(model, hidden_states, timestep, class_labels, **options):
        spy(model, hidden_states, timestep, class_labels)
        return forward(model, hidden_states, timestep, class_labels, **options)

    monkeypatch.setattr(DTRTransformer2DModel, "forward", spied)


def test_second_process_gets_what_a_second_forward_call_would(images, tmp_path, monkeypatch):
    """Data, noise and timesteps of a step do not depend on how it is divided between processes and forward calls."""
    calls = []
    spy_on_forward(monkeypatch, lambda model, *inputs: calls.append(inputs) if model.training else None)
    train(images, tmp_path / "one_process", "--max_train_steps", 1, "--gradient_accumulation_steps", 2)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "process_index", 1)
    monkeypatch.setattr(training.Trainer, "validate", lambda trainer: {})  # of which the first has a share
    monkeypatch.setattr(training.trainer.Validation, "rehearse", lambda validation: None)
    train(images, tmp_path / "second_of_two", "--max_train_steps", 1)
    assert len(calls) == 3
    assert not any(torch.equal(one, other) for one, other in zip(calls[0][:2], calls[1][:2], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(calls[1], calls[2], strict=True))


def test_accumulation_of_the_environment_is_that_of_the_flag(images, tmp_path, monkeypatch):
    by_flag = train(images, tmp_path / "flag", "--gradient_accumulation_steps", 2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    by_environment = train(images, tmp_path / "environment")
    assert same_weights(by_environment, by_flag)
    assert record(by_environment)["arguments"]["gradient_accumulation_steps"] == 2


def failing_at(call: int, function):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise RuntimeError("no memory for samples")
        return function(*args, **kwargs)

    return fail


def test_what_would_fail_at_the_end_fails_before_the_first_step(images, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(DTRPipeline, "__call__", failing_at(1, DTRPipeline.__call__))
    monkeypatch.setattr(training.Trainer, "_backward", lambda *args: steps.append(args))
    with pytest.raises(ValueError, match=r"Validation cannot sample with .*no memory for samples"):
        train(images, tmp_path / "run")
    assert steps == []


def test_result_is_saved_before_it_is_validated(images, tmp_path, monkeypatch):
    monkeypatch.setattr(DTRPipeline, "__call__", failing_at(2, DTRPipeline.__call__))
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no memory for samples"):
        train(images, run)
    assert record(run)["results"] == {}
    assert (run / "README.md").is_file()
    monkeypatch.undo()
    assert DTRPipeline.from_pretrained(run)("a", num_inference_steps=2).images


def test_saved_pipeline_knows_its_classes_schedule_and_routing(images, tmp_path):
    flags = ["--num_train_timesteps", 20, "--routing_beta", 0.5, "--prediction_type", "sample", "--learn_sigma"]
    pipeline = DTRPipeline.from_pretrained(train(images, tmp_path / "run", *flags))
    schedule, model = pipeline.scheduler.config, pipeline.transformer.config
    assert pipeline.labels == {"a": [0], "b": [1], "c": [2]}
    assert (schedule.num_train_timesteps, schedule.prediction_type) == (20, "sample")
    assert (model.out_channels, schedule.variance_type) == (2, "learned_range")
    assert (tuple(model.routing_timestep_range), model.routing_beta) == ((0, 19), 0.5)
    assert pipeline(class_labels=["b"], num_inference_steps=2).images[0].size == (8, 8)


def test_preset_trains_on_colour_pixels_without_an_autoencoder(images, tmp_path, monkeypatch):
    script, small = load_script(SCRIPT), {key: value for key, value in MODEL.items() if key != "in_channels"}
    monkeypatch.setattr(script, "DIT_PRESETS", {"DiT-S/2": {**script.DIT_PRESETS["DiT-S/2"], **small}})
    args = script.parse_args(arguments(images, tmp_path / "run", source=("--model_preset", "DiT-S/2")))
    classes = SimpleNamespace(num_classes=3)
    config = script.load_transformer(args, training.load_noise_scheduler(args), None, classes)[1].config
    assert (config.in_channels, config.out_channels, config.freq_shift) == (3, 3, 0)


def test_epochs_count_steps_where_no_steps_are_given(images, tmp_path):
    argv = arguments(images, tmp_path / "run", "--num_train_epochs", 2, "--gradient_accumulation_steps", 2)
    run = run_main(load_script(SCRIPT), without(argv, "--max_train_steps"))
    assert record(run)["arguments"]["max_train_steps"] == 6  # 24 images twice, 8 a step
    assert (run / "checkpoint-6").is_dir()


def without(argv: list[str], flag: str) -> list[str]:
    at = argv.index(flag)
    return argv[:at] + argv[at + 2 :]


def test_gradient_checkpointing_changes_no_weight(images, plain, tmp_path, monkeypatch):
    recomputed = []
    func = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: recomputed.append(1) or func(*a, **k))
    run = train(images, tmp_path / "run", "--max_train_steps", 4, "--gradient_checkpointing")
    assert len(recomputed) == 4 * MODEL["num_layers"]
    assert same_weights(run, plain)


def test_compile_compiles_the_whole_model(images, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **options: asked.append((type(model), options)))
    train(images, tmp_path / "run", "--compile")
    assert asked == [(DTRTransformer2DModel, {"fullgraph": True})]


def test_validation_draws_grids_and_measures_the_held_out_loss(images, tmp_path):
    held_out = make_images(tmp_path / "held_out", count=3)
    flags = ["--validation_steps", 2, "--validation_data_dir", held_out, "--num_validation_images", 5]
    run = train(images, tmp_path / "run", *flags)
    grids = sorted((run / "samples").iterdir())
    assert [path.name for path in grids] == ["step-00000002.png", "step-00000003.png"]
    assert Image.open(grids[0]).size == (24, 16)
    found = record(run)
    eighths = {f"validation_loss/eighth_{number}" for number in range(8)}
    assert found["results"].keys() == {"validation_loss"} | eighths
    # Few images are noised more often.
    assert (found["held_out"]["images"], found["held_out"]["noised_samples"]) == (3, 9)
    limited = record(train(images, tmp_path / "limited", *flags, "--max_held_out_images", 2))
    assert limited["held_out"]["images"] == 2


def test_validation_is_in_eval_mode_and_once_for_every_step(images, tmp_path, monkeypatch, caplog):
    """In training mode the held-out loss would be of labels that are dropped at random."""
    modes = set()
    spy_on_forward(monkeypatch, lambda model, *_: modes.add((torch.is_grad_enabled(), model.training)))
    with caplog.at_level(logging.INFO):
        train(images, tmp_path / "run", "--validation_steps", 1, "--validation_data_dir", images)
    assert modes == {(True, True), (False, False)}
    validated = [message.split(":")[0] for message in caplog.messages if "held-out loss" in message]
    assert validated == ["Step 1", "Step 2", "Step 3"]


def test_result_is_validated_at_its_own_routing_however_long_the_warm_up(images, tmp_path, monkeypatch):
    width = MODEL["num_attention_heads"] * MODEL["attention_head_dim"]
    active = {True: [], False: []}

    def spy(model, *_):
        active[model.training].append(int(model.routing.mask(torch.zeros(1), width).sum()))

    spy_on_forward(monkeypatch, spy)
    train(images, tmp_path / "run", "--routing_beta", 0.4, "--routing_warmup_steps", 3)
    assert active[True] == [int(share * width) for share in (1, 0.8, 0.6)]
    assert set(active[False]) == {int(0.4 * width)}


@pytest.mark.parametrize("flags", [("--validation_guidance_scale", 3), ("--validation_num_inference_steps", 4)])
def test_flag_changes_the_samples(flags, images, tmp_path):
    def samples(*flags):
        number = len(list(tmp_path.iterdir()))
        run = train(images, tmp_path / str(number), "--learning_rate", 0.1, "--class_dropout_prob", 0.5, *flags)
        return (run / "samples" / "step-00000003.png").read_bytes()

    assert samples() == samples()
    assert samples() != samples(*flags)


def test_averaged_weights_are_sampled_during_training_as_at_its_end(images, tmp_path):
    flags = ["--use_ema", "--ema_max_decay", 0.5, "--learning_rate", 0.1, "--validation_steps", 3]
    longer = train(images, tmp_path / "longer", *flags, "--max_train_steps", 4)
    shorter = train(images, tmp_path / "shorter", *flags, "--max_train_steps", 3)
    one, other = ((run / "samples" / "step-00000003.png").read_bytes() for run in (longer, shorter))
    assert one == other


def test_dataset_flags_choose_configuration_columns_and_splits(images, tmp_path):
    rows = datasets.load_dataset("imagefolder", data_dir=str(images), split="train", cache_dir=str(tmp_path / "c"))
    rows = rows.rename_columns({"image": "picture", "label": "kind"})
    dataset = tmp_path / "dataset"
    for name in ("small", "large"):
        for split, part in (("train", rows.select(range(12))), ("test", rows.select(range(12, 24)))):
            (dataset / name).mkdir(parents=True, exist_ok=True)
            part.to_parquet(dataset / name / f"{split}.parquet")
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("small", "large"))
    (dataset / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    named = ["--dataset_name", dataset, "--dataset_config_name", "small"]
    columns = ["--image_column", "picture", "--label_column", "kind"]
    run, other = (
        run_main(
            load_script(SCRIPT),
            without(arguments(images, tmp_path / name, *named, *columns, *flags), "--train_data_dir"),
        )
        for name, flags in (("run", ["--validation_split", "test"]), ("other", ["--train_split", "test"]))
    )
    assert "validation_loss" in record(run)["results"]
    assert not same_weights(run, other)


def test_loss_that_is_not_finite_stops_the_run_with_the_last_good_checkpoint(images, tmp_path):
    flags = ["--learning_rate", 1e30, "--checkpointing_steps", 1]
    with pytest.raises(FloatingPointError, match=r"The loss was not finite at step 2\..*run/checkpoint-1;"):
        train(images, tmp_path / "run", *flags)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


def test_tensorboard_gets_losses_rates_and_pictures(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--logging_steps", 2, "--validation_steps", 2, "--validation_data_dir", images, "--logging_dir", "board"]
    run = train(images, tmp_path / "run", "--report_to", "tensorboard", *flags)
    events = EventAccumulator(str(run / "board" / "class-conditional")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 3]
    assert events.Scalars("lr")[0].value == pytest.approx(1e-2)
    assert [event.step for event in events.Scalars("validation_loss")] == [2, 3]
    assert [event.step for event in events.Images("samples")] == [2, 3]


def test_token_is_written_nowhere(images, tmp_path, caplog, capfd, monkeypatch):
    secret = "hf_very_secret"
    argv = arguments(images, tmp_path / "run", "--hub_token", secret, "--report_to", "tensorboard")
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *argv])
    run_main(load_script(SCRIPT), argv)
    assert "--seed" not in record(tmp_path / "run")["command"]
    assert "--model_config" in record(tmp_path / "run")["command"]
    assert not [name for name, content in files(tmp_path / "run").items() if secret.encode() in content]
    assert secret not in caplog.text + "".join(capfd.readouterr())


def test_script_is_short_and_uses_the_public_package_only():
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 200
    kinds = [(not name.isupper(), not name[0].isupper(), name) for name in training.__all__]
    assert kinds == sorted(kinds)
    assert (EXAMPLES / "class_conditional" / "requirements.txt").exists()
