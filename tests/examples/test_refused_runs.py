"""What a user can mend ends a script with one line, and nothing is left of a run that was refused."""

import subprocess
import sys

import pytest
import torch
from training_runs import EXAMPLES, MODEL, SCRIPT, arguments, load_script, make_images, reset_accelerate

from diffusers_dtr import DTRPipeline
from diffusers_dtr.training.run.folder import unlock_run_folder
from diffusers_dtr.user_errors import exit_code


TRAIN = sorted(EXAMPLES.glob("*/train_*.py"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/*.py")), ids=lambda path: path.stem)
def test_scripts_say_errors_of_their_user_in_one_line(path):
    _, has_main, end = path.read_text().partition('if __name__ == "__main__":\n')
    # The minimal loop shows what a loop needs, and has flags alone.
    assert not has_main or end.startswith("    run_script(main") or path.stem == "train_minimal"


WRONG_VALUES = {
    **dict.fromkeys(("train_class_conditional", "train_unconditional"), "--train_batch_size many"),
    **dict.fromkeys(("train_text_to_image", "train_text_to_video", "compute_task_affinity"), "--resolution wide"),
    **dict.fromkeys(("run_study", "compare_lora"), "--seeds -1"),
    "measure_negative_transfer": "--script other",
    "benchmark": "--groups other",
    "benchmark_task_affinity": "--batch_size 0",
    "evaluate_digits": "--num_per_digit 0",
    "prepare_digits": "--test_share 1.5",
    "prepare_text_to_image": "--family other",
    "evaluate": "--seed -1",
    "train_feature_extractor": "--width 0",
    "precompute_latents": "--shard_size 0",
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_the_parser_of_every_script_names_the_flag_of_a_wrong_value(name, monkeypatch, capsys):
    (path,) = EXAMPLES.glob(f"*/{name}.py")
    flag, value = WRONG_VALUES[name].split()
    monkeypatch.setattr("sys.argv", [path.name, flag, value])
    with pytest.raises(SystemExit):
        load_script(path).parse_args()
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {flag}" in message
    assert value in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_data_dir", "nowhere"], "`train_data_dir` must be a folder, got 'nowhere'."),
        (["--model_config", {**MODEL, "out_channels": 2}], "`out_channels` is 2 in `--model_config`, but 1 by "),
        (["--model_config", {**MODEL, "out_channels": 1}, "--learn_sigma"], "but 2 by `in_channels` and `--learn_"),
        (["--model_config", {**MODEL, "num_embeds_ada_norm": 9}], "is 9 in `--model_config`, but 3 by the classes"),
        (["--model_config", {**MODEL, "num_layer": 2}], "got `num_layer`. Did you mean `num_layers`?"),
        (["--validation_guidance_scale", 3, "--class_dropout_prob", 0], "`--validation_guidance_scale` must be 1"),
        (["--resume_from_checkpoint", "checkpoint-7"], "`resume_from_checkpoint` must be a complete checkpoint"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_nothing_is_left_of_a_run_that_was_refused(flags, message, images, tmp_path, capsys):
    refuse(images, tmp_path, flags)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_nothing_is_left_of_a_run_whose_end_does_not_work(images, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(DTRPipeline, "__call__", lambda *_, **__: torch.zeros(2) + torch.zeros(3))
    refuse(images, tmp_path, ["--report_to", "tensorboard"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: Validation cannot sample with `--resolution 8`")
    assert "RuntimeError" in caplog.text  # with the traceback of what is none of the user's


def refuse(images, tmp_path, flags):
    script, output_dir = load_script(SCRIPT), tmp_path / "made" / "run"
    try:
        assert exit_code("train.py", script.main, script.parse_args(arguments(images, output_dir, *flags))) == 2
    finally:
        reset_accelerate()
        unlock_run_folder(output_dir)  # as at the end of a process
    assert [*tmp_path.iterdir()] == []


def test_a_denoiser_without_classes_is_not_made_of_a_config_with_classes(images, tmp_path):
    script = load_script(EXAMPLES / "unconditional" / "train_unconditional.py")
    source = ("--transformer_config", {**MODEL, "num_embeds_ada_norm": 3})
    with pytest.raises(ValueError, match="`num_embeds_ada_norm` is 3 in `--transformer_config`, but None by the cla"):
        script.main(script.parse_args(arguments(images, tmp_path / "run", source=source)))
    reset_accelerate()
    unlock_run_folder(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in TRAIN if path.stem != "train_minimal"], ids=lambda path: path.stem)
def test_a_process_that_is_refused_ends_with_one_line(path, tmp_path):
    source = {"train_class_conditional": "--model_preset DiT-S/8", "train_unconditional": "--model_preset DiT-S/8"}
    flags = source.get(path.stem, "--pretrained_model_name_or_path ./nowhere").split()
    flags += ["--train_data_dir", "./nowhere", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, str(path), *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{path.name}: ")
    assert [*tmp_path.iterdir()] == []
