import argparse
import json
import re

import pytest

from diffusers_dtr import training
from diffusers_dtr.training import argument_checks, arguments, text_to_image_arguments
from diffusers_dtr.training.arguments import routing_flags


# The names that diffusers' training scripts use.
FLAGS_OF_DIFFUSERS = re.findall(
    r"\w+",
    """
    dataset_name dataset_config_name train_data_dir image_column label_column cache_dir resolution center_crop
    random_flip train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing
    learning_rate lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
    use_ema ema_max_decay ema_inv_gamma ema_power mixed_precision allow_tf32 dataloader_num_workers seed logging_dir
    checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_steps report_to output_dir
    push_to_hub hub_model_id hub_token hub_private_repo prediction_type scale_lr lr_num_cycles lr_power noise_offset
    input_perturbation validation_epochs offload_ema tracker_project_name snr_gamma
    """,
)


def parse(*flags: str, data: tuple[str, ...] = ("--train_data_dir", "images")) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for add in {**vars(arguments), **vars(text_to_image_arguments)}.values():
        if getattr(add, "__name__", "").startswith("add_"):
            add(parser)
    parser.add_argument("--pretrained_model_name_or_path")
    args = parser.parse_args(["--output_dir", "run", *data, *flags])
    training.check_arguments(parser, args)
    return args


def test_flags_have_the_names_that_users_of_diffusers_know():
    assert set(FLAGS_OF_DIFFUSERS) <= vars(parse()).keys()


WARM_UP = ("--lr_scheduler", "constant_with_warmup")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train_batch_size", "0"), "--train_batch_size: must be an integer >= 1, got 0"),
        (("--seed", "-1"), "--seed: must be an integer in [0, 2^63), got -1"),
        (("--resolution", "big"), "--resolution: must be an integer >= 1, got 'big'"),
        (("--lr_scheduler", "piecewise_constant"), "invalid choice: 'piecewise_constant'"),
        (("--report_to", "pigeon"), "invalid choice: 'pigeon'"),
        (("--dataset_name", "mnist"), "exactly one of --dataset_name and --train_data_dir must be given"),
        (("--validation_split", "test"), "with --train_data_dir use --validation_data_dir"),
        (("--cache_latents",), "--cache_latents needs --vae_name_or_path"),
        (("--cache_latents", "--vae_name_or_path", "vae"), "--cache_latents needs --center_crop"),
        (
            ("--max_train_steps", "5", "--routing_warmup_steps", "6"),
            "`--routing_warmup_steps` must be at most the 5 steps of the run, got 6",
        ),
        (("--lr_warmup_steps", "5"), "no effect on --lr_scheduler constant: use constant_with_warmup"),
        (
            ("--max_train_steps", "5", *WARM_UP, "--lr_warmup_steps", "5"),
            "`--lr_warmup_steps` must be below the 5 steps",
        ),
        (("--lr_num_cycles", "2"), "--lr_num_cycles has an effect on --lr_scheduler cosine_with_restarts only"),
        (
            ("--lr_power", "2", "--lr_scheduler", "cosine"),
            "--lr_power has an effect on --lr_scheduler polynomial only",
        ),
        (("--lr_scheduler", "polynomial", "--learning_rate", "1e-7"), "--learning_rate must be above 1e-07"),
        (("--ema_power", "1"), "--ema_power has an effect with --use_ema only"),
        (("--offload_ema",), "--offload_ema has an effect with --use_ema only"),
        (
            ("--tracker_project_name", "p", "--report_to", "none"),
            "--tracker_project_name has no effect on --report_to",
        ),
        (
            ("--validation_epochs", "1", "--validation_steps", "1"),
            "at most one of --validation_steps and --validation_e",
        ),
        (("--input_perturbation", "0.1", "--learn_sigma"), "--input_perturbation does not go with --learn_sigma"),
        (("--snr_gamma", "5"), "no effect on --loss_weighting constant: use min_snr or soft_min_snr"),
        (("--balancing_update_every", "2"), "no effect on --balancing uniform: it is for aligned_mtl"),
        (("--cluster_cost", "affinity"), "--cluster_cost affinity and --affinity_path need each other"),
        (("--affinity_path", "a.safetensors"), "--cluster_cost affinity and --affinity_path need each other"),
        (("--logit_mean", "1"), "have an effect on --timestep_sampling logit_normal only"),
        (("--timestep_sampling", "logit_normal", "--logit_std", "0"), "--logit_std: must be a number > 0, got 0.0"),
        (("--num_clusters", "4", "--train_cluster", "4"), "--train_cluster must be below --num_clusters 4, got 4"),
        (("--train_cluster", "0", "--balancing", "uncertainty"), "--train_cluster leaves nothing to balance"),
        (("--train_cluster", "0", "--timestep_sampling", "clusters"), "--train_cluster leaves nothing to balance"),
        (("--hub_revision", "branch"), "--hub_revision has an effect with --push_to_hub only"),
        (("--hub_create_pr",), "--hub_create_pr has an effect with --push_to_hub only"),
        (("--hub_strategy", "checkpoint"), "--hub_strategy has an effect with --push_to_hub only"),
        (("--push_to_hub", "--hub_create_pr", "--hub_revision", "branch"), "--hub_create_pr is for the result alone"),
        (("--push_to_hub", "--hub_create_pr", "--hub_strategy", "checkpoint"), "--hub_create_pr is for the result"),
        (("--routing_beta", "1.5"), "must be a number in (0, 1], got 1.5"),
        (("--routing_alpha", "0"), "got 0.0"),
    ],
)
def test_flags_that_make_no_sense_are_refused_with_the_reason(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(*flags)
    assert message in capsys.readouterr().err


def test_data_must_come_from_somewhere(capsys):
    with pytest.raises(SystemExit):
        parse(data=())
    assert "exactly one of --dataset_name and --train_data_dir" in capsys.readouterr().err


def test_held_out_images_come_from_one_place(capsys):
    with pytest.raises(SystemExit):
        parse("--validation_split", "test", "--validation_data_dir", "d", data=("--dataset_name", "mnist"))
    assert "at most one of --validation_split and --validation_data_dir" in capsys.readouterr().err


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_tracker_that_is_not_installed_is_named(tracker, capsys, monkeypatch):
    monkeypatch.setattr(argument_checks, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse("--report_to", tracker)
    assert f"--report_to {tracker} needs the package {tracker}" in capsys.readouterr().err


def test_token_is_not_given_to_a_tracker_that_uploads_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(argument_checks, "find_spec", lambda name: name)
    with pytest.raises(SystemExit):
        parse("--report_to", "wandb", "--hub_token", "hf_secret")
    error = capsys.readouterr().err
    assert "hf auth login" in error
    assert "hf_secret" not in error
    assert parse("--report_to", "trackio", "--hub_token", "hf_secret").hub_token == "hf_secret"


def test_latents_of_a_pretrained_pipeline_can_be_cached():
    assert parse("--cache_latents", "--center_crop", "--pretrained_model_name_or_path", "owner/model").cache_latents


def test_config_is_json_or_a_file_of_it(tmp_path):
    config = {"num_layers": 2, "_class_name": "DTRTransformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for text in (json.dumps(config), f" {json.dumps(config)}", str(tmp_path / "config.json")):
        assert training.json_config(text) == {"num_layers": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.json", "must be a JSON object or a file that holds one: .*No such file"),
        ("{broken", "must be a JSON object or a file that holds one"),
        ("[1]", r"must be a JSON object or a file that holds one"),
    ],
)
def test_config_that_is_none_is_refused(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        training.json_config(text)


def test_file_that_holds_no_object_is_refused(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(argparse.ArgumentTypeError, match="must hold a JSON object, got list"):
        training.json_config(str(tmp_path / "list.json"))


def test_only_given_flags_overrule_a_pretrained_model():
    assert routing_flags(parse()) == {}
    args = parse("--routing_beta", "0.5", "--routing_type", "random", "--routing_timestep_range", "200", "800")
    expected = {"routing_beta": 0.5, "routing_type": "random", "routing_timestep_range": [200, 800]}
    assert routing_flags(args) == expected
    args = parse("--routing_alpha", "2", "--routing_seed", "0")
    assert routing_flags(args) == {"routing_alpha": 2.0, "routing_seed": 0}


def test_warm_up_may_take_the_whole_run():
    assert parse("--max_train_steps", "5", "--routing_warmup_steps", "5").routing_warmup_steps == 5
