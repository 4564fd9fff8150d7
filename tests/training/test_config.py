"""The options of a run: what they may be, how they go together, and where they come from."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from run_config import DEFAULT, AnyModelConfig, run_config

from diffusers_dtr.training import TrainingConfig, parse_config
from diffusers_dtr.training.config import (
    LabelledDataConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    RunConfig,
    TextConfig,
    VideoConfig,
    running,
)


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
REQUIRED = ("--output_dir", "run", "--train_data_dir", "images")


def parse(*flags: object, required: tuple[str, ...] = REQUIRED) -> TrainingConfig:
    parts = {"model": AnyModelConfig, "data": LabelledDataConfig, "text": TextConfig, "lora": LoraConfig}
    return parse_config([*required, *map(str, flags)], **parts)


def written(path, values: dict) -> tuple[str, str]:
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    return "--config", str(path)


def test_flags_have_the_names_that_users_of_diffusers_know():
    assert set(FLAGS_OF_DIFFUSERS) <= parse().options.keys()


def refuse_flags(capsys, *flags: object, **options) -> str:
    """What a script that ends for these flags says."""
    with pytest.raises(SystemExit) as end:
        parse(*flags, **options)
    assert end.value.code == 2
    return capsys.readouterr().err


# ---- what is refused; the range of every number is tested in test_flags.py

WARM_UP = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5}
POLYNOMIAL = {"lr_scheduler": "polynomial"}
REQUEST = {"push_to_hub": True, "hub_create_pr": True}
TWO_SPLITS = {"dataset_name": "mnist", "validation_split": "test", "validation_data_dir": "d"}
REFUSED = [
    ({"train_batch_size": 0}, "`--train_batch_size` must be an integer >= 1, got 0"),
    ({"learning_rate": "1e-4"}, "`--learning_rate` must be a number >= 0, got '1e-4'"),
    ({"center_crop": "yes"}, "`--center_crop` of a run must be true or false, got 'yes'"),
    (
        {"validation_prompts": "a cat"},
        "`--validation_prompts` of a run must be a list of strings or null, got",
    ),
    ({"routing_timestep_range": [1.0]}, "the cleanest and noisiest timestep, got [1.0]"),
    ({"routing_timestep_range": [9, 9]}, "the cleanest and noisiest timestep, got [9, 9]"),
    ({"report_to": "pigeon"}, "`--report_to` must be one of tensorboard, wandb, trackio, none, got 'pigeon'"),
    ({"dataset_name": "mnist", "train_data_dir": "images"}, "Exactly one of --dataset_name and --train_data_dir must"),
    ({"train_data_dir": None}, "Exactly one of --dataset_name and --train_data_dir must be given"),
    ({"validation_split": "test"}, "with --train_data_dir use --validation_data_dir"),
    ({"train_split": "test"}, "`--train_split` has an effect with --dataset_name only"),
    ({"dataset_config_name": "small"}, "`--dataset_config_name` has an effect with --dataset_name only"),
    (TWO_SPLITS, "At most one of --validation_split and --validation_data_dir"),
    ({"cache_latents": True, "center_crop": True}, "`--cache_latents` needs --vae_name_or_path"),
    ({"cache_latents": True, "vae_name_or_path": "vae"}, "`--cache_latents` needs --center_crop"),
    ({"latents_dir": "latents"}, "`--train_data_dir` does not go with --latents_dir"),
    ({"latents_dir": "latents", "train_data_dir": None}, "`--latents_dir` needs --center_crop"),
    ({"latents_dir": "l", "train_data_dir": None, "center_crop": True}, "`--latents_dir` needs --vae_name_or_path"),
    ({"lr_warmup_steps": 5}, "no effect on --lr_scheduler constant: use constant_with_warmup"),
    ({"max_train_steps": 5, **WARM_UP}, "`--lr_warmup_steps` must be below the 5 steps of the run, got 5"),
    ({"lr_num_cycles": 2}, "`--lr_num_cycles` has an effect on --lr_scheduler cosine_with_restarts only"),
    ({"lr_power": 2, "lr_scheduler": "cosine"}, "`--lr_power` has an effect on --lr_scheduler polynomial only"),
    ({"learning_rate": 1e-7, **POLYNOMIAL}, "`--learning_rate` must be above 1e-07"),
    ({"learning_rate": 5e-9, "scale_lr": True, "train_batch_size": 10, **POLYNOMIAL}, "must be above 1e-08"),
    ({"ema_power": 1}, "`--ema_power` has an effect with --use_ema only"),
    ({"tracker_project_name": "p", "report_to": "none"}, "`--tracker_project_name` has an effect on --report_to"),
    ({"validation_epochs": 1, "validation_steps": 1}, "At most one of --validation_steps and --validation_e"),
    ({"input_perturbation": 0.1, "learn_sigma": True}, "`--input_perturbation` does not go with --learn_sigma"),
    ({"snr_gamma": 5.0}, "`--snr_gamma` has an effect on --loss_weighting min_snr or soft_min_snr only"),
    ({"balancing_update_every": 2}, "`--balancing_update_every` has an effect on --balancing aligned_mtl"),
    ({"cluster_cost": "affinity"}, "--cluster_cost affinity and --affinity_path need each other"),
    ({"affinity_path": "a.safetensors"}, "--cluster_cost affinity and --affinity_path need each other"),
    ({"logit_mean": 1.0}, "`--logit_mean` has an effect on --timestep_sampling logit_normal only"),
    ({"num_clusters": 4, "train_cluster": 4}, "`--train_cluster` must be below --num_clusters 4, got 4"),
    ({"train_cluster": 0, "balancing": "uncertainty"}, "`--train_cluster` leaves nothing to balance"),
    ({"train_cluster": 0, "timestep_sampling": "clusters"}, "`--train_cluster` leaves nothing to balance"),
    ({"hub_revision": "branch"}, "`--hub_revision` has an effect with --push_to_hub only"),
    ({**REQUEST, "hub_revision": "branch"}, "`--hub_create_pr` is for the result alone"),
    ({**REQUEST, "hub_strategy": "checkpoint"}, "`--hub_create_pr` is for the result alone"),
    ({"lora_layers": ["to_q"]}, "`--lora_layers` has an effect with --rank only"),
    ({"use_ema": True, "ema_sigma_rel": 0.1}, "`--ema_sigma_rel` has an effect on --ema_type power only"),
    ({"use_ema": True, "ema_type": "power", "ema_power": 1}, "`--ema_power` has an effect on --ema_type warmup only"),
    ({"optimizer": "adafactor", "adam_beta1": 0.5}, "`--adam_beta1` has an effect on another --optimizer than adaf"),
    ({"rank": 4, "denoiser_config": {"num_layers": 1}}, "`--rank` does not go with --denoiser_config"),
    ({"rank": 4, "route_lora": True, "routing_warmup_steps": 5}, "which --route_lora leaves unrouted"),
    ({"logging_dir": "transformer"}, "`--logging_dir` must not be a folder of the result, got 'transformer'"),
    ({"train_data_dir": "data", "output_dir": "data/out"}, "`--output_dir` must not be in --train_data_dir"),
    ({"vae_name_or_path": "a/../run"}, "`--output_dir` must not be the folder of a pretrained model, got run"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_options_that_make_no_sense_are_refused_with_the_reason(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_config(**options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--resolution", "big"), "argument --resolution: invalid int value: 'big'"),
        (("--report_to", "pigeon"), "invalid choice: 'pigeon' (choose from"),
        (("--ema_power", "1"), "`--ema_power` has an effect with --use_ema only"),
        (("--train_batch", "4"), "unrecognized arguments: --train_batch 4"),
        (("--model_config", "nowhere.json"), "`--model_config` must be a JSON object or a file that holds one"),
    ],
)
def test_a_script_ends_with_the_reason(flags, message, capsys):
    assert message in refuse_flags(capsys, *flags)


def test_a_script_says_what_is_required(capsys):
    assert "the following arguments are required: --output_dir" in refuse_flags(capsys, required=())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RunConfig("run", report_to="trackio"), "`--report_to trackio` needs the package trackio"),
        (lambda: ObjectiveConfig(balancing="pcgrad"), r'`--balancing pcgrad` needs torchjd: pip install ".*balancing'),
        (lambda: LoraConfig(rank=1), r'`--rank` needs peft: pip install ".*training'),
    ],
)
def test_package_that_is_not_installed_is_named(build, message, monkeypatch):
    for module in ("learning", "data", "running"):
        monkeypatch.setattr(f"diffusers_dtr.training.config.{module}.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        build()


def test_token_is_not_given_to_a_tracker_that_uploads_the_command_line(monkeypatch):
    monkeypatch.setattr(running, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="hf auth login") as error:
        run_config(report_to="wandb", hub_token="hf_secret")
    assert "hf_secret" not in str(error.value)
    assert run_config(report_to="trackio", hub_token="hf_secret").hub.hub_token == "hf_secret"


def test_latents_of_a_pretrained_pipeline_can_be_cached_and_a_warm_up_take_the_whole_run():
    run_config(cache_latents=True, center_crop=True, pretrained_model_name_or_path="owner/model")
    run_config(max_train_steps=5, routing_warmup_steps=5)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="no options sead, tilt"):
        DEFAULT.replace(seed=1, sead=2, tilt=3)


def test_replacing_leaves_the_rest_as_it_is():
    config = run_config(seed=3, use_ema=True)
    other = config.replace(seed=4)
    assert (other.run.seed, other.ema) == (4, config.ema)
    assert replace(other, run=config.run) == config


# ---- configs of models


def test_config_is_json_or_a_file_of_it_or_a_dictionary(tmp_path):
    config = {"num_layers": 2, "_class_name": "DTRTransformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for value in (config, json.dumps(config), f" {json.dumps(config)}", str(tmp_path / "config.json")):
        assert AnyModelConfig(model_config=value).model_config == {"num_layers": 2}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.json", "`--model_config` must be a JSON object or a file that holds one: .*No such file"),
        ("{broken", "`--model_config` must be a JSON object or a file that holds one: .*is not JSON"),
        ("[1]", "`--model_config` must be a JSON object or a file that holds one"),
        ("list.json", "`--model_config` must be .*must hold a JSON object, got list"),
        ([1], r"`--model_config` .*must be .*, got \[1\]"),
    ],
    ids=str,
)
def test_config_that_is_none_is_refused(value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=message):
        AnyModelConfig(model_config=value)


# ---- routing


def test_only_given_flags_overrule_a_pretrained_model():
    assert parse("--routing_warmup_steps", 3).routing.given == {}
    config = parse("--routing_beta", 0.5, "--routing_type", "random", "--routing_timestep_range", 200, 800)
    expected = {"routing_beta": 0.5, "routing_type": "random", "routing_timestep_range": [200, 800]}
    assert config.routing.given == expected
    config = parse("--routing_alpha", 2, "--routing_seed", 0)
    assert config.routing.given == {"routing_alpha": 2.0, "routing_seed": 0}


# ---- files


@pytest.mark.parametrize("name", ["options.yaml", "options.json"])
def test_options_come_from_a_file_and_flags_take_precedence(name, tmp_path):
    values = {
        "output_dir": "elsewhere",
        "seed": 3,
        "learning_rate": 1e-5,
        "use_ema": True,
        "routing_timestep_range": [1e-5, 800],
        "validation_prompts": ["a cat", "a dog"],
        "model_config": {"num_layers": 2},
    }
    file = written(tmp_path / name, values)
    config = parse(*file, "--seed", 4, "--use_ema", "false", required=REQUIRED[2:])
    expected = {**values, "seed": 4, "use_ema": False, "train_data_dir": "images"}
    assert expected.items() <= config.options.items()


def test_yaml_may_have_a_choice_that_it_calls_false_and_a_number_that_it_calls_a_string(tmp_path):
    (tmp_path / "options.yaml").write_text("mixed_precision: no\nlearning_rate: 1e-4\n")
    config = parse("--config", tmp_path / "options.yaml")
    assert (config.run.mixed_precision, config.optimizer.learning_rate) == ("no", 1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sead": 3, "learning_rat": 1}, "options, got ['learning_rat', 'sead'] in it"),
        ({"train_batch_size": "many"}, "invalid int value: 'many'"),
        ({"train_batch_size": True}, "`--train_batch_size` must be an integer >= 1, got True"),
        ({"train_batch_size": None}, "`--train_batch_size` must be an integer >= 1, got None"),
        ({"hub_revision": 7}, "`--hub_revision` of a run must be a string or null, got 7"),
        ([1], "`--config` must be a"),
        (None, "`--config` must be a"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["options.yaml", "options.json"])
def test_a_file_is_checked_like_flags(name, values, message, tmp_path, capsys):
    assert message in refuse_flags(capsys, *written(tmp_path / name, values))


@pytest.mark.parametrize("text", ["{", "!!python/object:os.system {}", "[" * 2000, "\x00", None])
@pytest.mark.parametrize("name", ["options.yaml", "options.json"])
def test_a_file_that_cannot_be_read_is_named(name, text, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    message = refuse_flags(capsys, "--config", tmp_path / name)
    assert f"`--config` must be a YAML or JSON file of options, got {tmp_path / name}" in message


def test_a_saved_configuration_is_parsed_as_it_was(tmp_path):
    flags = (
        *("--model_config", '{"num_layers": 2}', "--resolution", 16, "--cache_dir", "\x7f ü"),
        *("--learning_rate", 1e-5, "--use_ema", "--routing_timestep_range", 1e-5, 800, "--push_to_hub"),
        *("--hub_private_repo", "false", "--validation_prompts", "a cat", "1e-5", "--train_cluster", 0),
    )
    config = parse(*flags)
    config.save(tmp_path / "run_config.json")
    assert parse("--config", tmp_path / "run_config.json", required=()) == config


def test_what_is_saved_is_what_was_given_but_for_tokens_and_resumption(tmp_path):
    once = {"hub_token": "hf_secret", "resume_from_checkpoint": "latest", "allow_changed_settings": True}
    given = {"output_dir": "run", "train_data_dir": "images", "seed": 3}
    run_config(**given, **once).save(tmp_path / "run_config.json")
    assert json.loads((tmp_path / "run_config.json").read_text()) == given


def test_every_kind_of_data_is_saved_with_what_it_requires(tmp_path):
    config = parse_config([*REQUIRED, "--num_frames", "9"], data=VideoConfig, text=TextConfig)
    config.save(tmp_path / "run_config.json")
    again = parse_config(["--config", str(tmp_path / "run_config.json")], data=VideoConfig, text=TextConfig)
    assert again == config


@pytest.mark.parametrize("name", ["options.yaml", "options.json"])
def test_an_option_that_a_file_gives_twice_is_refused(name, tmp_path, capsys):
    (tmp_path / name).write_text('{"learning_rate": 1.0, "learning_rate": 2.0}')
    assert "'learning_rate' is given twice" in refuse_flags(capsys, "--config", tmp_path / name)


def test_one_file_of_options_is_taken(capsys):
    assert "`--config` must be given once" in refuse_flags(capsys, "--config", "a.yaml", "--config", "b.yaml")


@pytest.mark.parametrize(
    ("part", "value"),
    [("noise", None), ("optimizer", {}), ("hub", RunConfig("o")), ("data", ModelConfig()), ("noise", NoiseConfig)],
)
def test_every_part_is_of_its_class(part, value):
    with pytest.raises(ValueError, match=f"`{part}` must be of "):
        replace(run_config(), **{part: value})


def test_paths_and_numbers_of_numpy_are_saved_as_json_has_them(tmp_path):
    run_config(learning_rate=np.float32(0.5), output_dir=tmp_path / "run").save(tmp_path / "run.json")
    saved = json.loads((tmp_path / "run.json").read_text())
    assert (saved["learning_rate"], saved["output_dir"]) == (0.5, str(tmp_path / "run"))
