"""What a checkpoint stands for, and what of it a resumed run may change."""

import json
import logging
from dataclasses import replace

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from diffusers import DDPMScheduler
from run_config import run_config
from tiny_dit import routed_dit

from diffusers_dtr.training.data.captions import Captions
from diffusers_dtr.training.data.training_images import TrainingImages
from diffusers_dtr.training.run import resuming
from diffusers_dtr.training.run.resuming import IMAGES_PER_STEP, RunState, run_settings


def settings(
    options: dict | None = None, *, routing: dict | None = None, schedule: dict | None = None, **others: object
) -> dict:
    model, scheduler = routed_dit(**(routing or {})), DDPMScheduler(**(schedule or {}))
    config = run_config(**{"resolution": 32, **(options or {})})
    return run_settings(config, model, scheduler, Accelerator(cpu=True), **others)


def go_on(before: dict, after: dict, allow: bool = False) -> list[dict]:
    state = RunState(10, before)
    state.go_on(after, allow)
    assert state.settings == after
    return state.changes


def test_every_flag_that_a_resumed_run_may_change_exists():
    known = run_config().options.keys()
    assert known >= resuming._OUTPUT_FLAGS
    assert known >= resuming._ADJUSTABLE_FLAGS
    assert not resuming._OUTPUT_FLAGS & resuming._ADJUSTABLE_FLAGS


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"schedule": {"prediction_type": "v_prediction"}}, "`--prediction_type` was epsilon and is v_prediction now"),
        ({"schedule": {"beta_schedule": "sigmoid"}}, "`--noise_schedule` was linear and is sigmoid now"),
        ({"schedule": {"beta_start": 1e-3}}, "`beta_start of the noise scheduler` was 0.0001 and is 0.001 now"),
        ({"routing": {"routing_beta": 0.5}}, "`--routing_beta` was 0.8 and is 0.5 now"),
        ({"routing": {"class_dropout_prob": 0.5}}, "`--class_dropout_prob` was 0.1 and is 0.5 now"),
        ({"options": {"loss_weighting": "min_snr"}}, "`--loss_weighting` was constant and is min_snr now"),
        ({"options": {"random_flip": True}}, "`--random_flip` was False and is True now"),
        ({"options": {"resolution": 16}}, "`--resolution` was 32 and is 16 now"),
        ({"options": {"rank": 4}}, "`--rank` was None and is 4 now"),
        ({"options": {"dataset_name": "mnist", "train_data_dir": None}}, "`--dataset_name` was None and is mnist now"),
        ({"images": 7}, "`images` was None and is 7 now"),
    ],
    ids=str,
)
def test_another_objective_model_or_data_is_refused_unless_allowed(after, message):
    after = settings(**after)
    with pytest.raises(ValueError, match="another `--output_dir`, or pass `--allow_changed_settings`") as error:
        go_on(settings(), after)
    assert message in str(error.value)
    changes = go_on(settings(), after, allow=True)
    (change,) = (change for change in changes if change["setting"] != "--train_data_dir")  # which is elsewhere
    assert change["step"] == 10
    assert message == f"`{change['setting']}` was {change['before']} and is {change['after']} now"


def images_of(names: list[str | None], labels: list[int], captions: list[str] | None = None) -> dict:
    """The settings of images by the names of their files and their labels."""
    rows = {"image": [{"path": name and f"/here/{name}", "bytes": None if name else b"0"} for name in names]}
    dataset = datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(decode=False)}))
    images = TrainingImages(dataset, "image", np.array(labels))
    if captions is not None:
        images = replace(images, captions=Captions(datasets.Dataset.from_dict({"text": captions}), "text"))
    return resuming.data_settings(images)


@pytest.mark.parametrize(
    ("names", "labels"),
    [(["b.png", "a.png", "c.png"], [0, 0, 1]), (["a.png", "b.png", "d.png"], [0, 0, 1]), (["a.png"] * 3, [0, 1, 1])],
    ids=["order", "name", "label"],
)
def test_other_files_or_labels_in_the_places_of_images_are_refused(names, labels):
    with pytest.raises(ValueError, match="`fingerprint of file names and labels` was"):
        go_on(images_of(["a.png", "b.png", "c.png"], [0, 0, 1]), images_of(names, labels))


@pytest.mark.parametrize("captions", [["two", "one"], ["onetwo", ""], ["one", "Two"]])
def test_other_captions_are_refused_unless_allowed(captions):
    images = ["a.png", "b.png"], [0, 0]
    before, after = images_of(*images, ["one", "two"]), images_of(*images, captions)
    with pytest.raises(ValueError, match=r"^`fingerprint of captions` was [^`]* now: .*--allow_changed_settings"):
        go_on(before, after)
    assert [change["setting"] for change in go_on(before, after, allow=True)] == ["fingerprint of captions"]
    assert go_on(before, images_of(*images, [["one"], ["two"]])) == []


def test_images_that_are_not_files_are_compared_by_number():
    three, four = (images_of([None] * count, [0] * count) for count in (3, 4))
    assert go_on(three, images_of([None] * 3, [0] * 3)) == []
    with pytest.raises(ValueError, match="`number of images` was 3 and is 4"):
        go_on(three, four)


@pytest.mark.parametrize("before", [False, True])
def test_an_average_cannot_begin_or_end_on_the_way(before):
    with pytest.raises(
        ValueError, match=rf"`--use_ema` was {before} and is {not before} now: .* start a run in another"
    ):
        go_on(settings({"use_ema": before}), settings({"use_ema": not before}), allow=True)


def test_what_balancing_has_learned_cannot_go_on_with_other_clusters():
    with pytest.raises(
        ValueError,
        match=r"`--num_clusters` was 8 and is 4 now: .* made with, or start .* in another `--output_dir`\.$",
    ):
        go_on(settings(), settings({"num_clusters": 4}), allow=True)


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 1e-5), ("ema_max_decay", 0.5), ("max_train_steps", 9)])
def test_hyperparameters_may_change_and_the_change_is_remembered(name, value):
    averaged = {"use_ema": True}
    (change,) = go_on(settings(averaged), settings({**averaged, name: value}))
    assert (change["setting"], change["after"]) == (f"--{name}", value)


@pytest.mark.parametrize(
    "options",
    [
        *({"report_to": "none"}, {"output_dir": "elsewhere"}, {"validation_steps": 3}, {"hub_token": "hf_x"}),
        {"prediction_type": "epsilon", "routing_beta": 0.8},  # which is so anyway
    ],
)
def test_outputs_and_what_is_so_anyway_are_no_change(options):
    assert go_on(settings(), settings(options)) == []


def test_a_flag_that_the_older_run_did_not_know_is_no_change_while_it_is_off():
    before = settings()
    del before["--random_flip"], before["--snr_gamma"]
    assert go_on(before, settings()) == []
    with pytest.raises(ValueError, match="`--random_flip` was None and is True now"):
        go_on(before, settings({"random_flip": True}))


def test_another_seed_says_that_draws_are_other_ones_from_here_on(caplog):
    (change,) = go_on(settings({"seed": 3}), settings({"seed": 4}))
    assert change == {"step": 10, "setting": "--seed", "before": 3, "after": 4}
    assert caplog.messages == [
        "`--seed` was 3 and is 4 now. The order of the images, noise and timesteps are other ones from here on."
    ]


def test_another_batch_size_says_which_images_are_skipped_or_seen_again(caplog):
    with caplog.at_level(logging.WARNING):
        go_on(settings(**{IMAGES_PER_STEP: 16}), settings(**{IMAGES_PER_STEP: 20}))
        go_on(settings(**{IMAGES_PER_STEP: 16}), settings(**{IMAGES_PER_STEP: 8}))
    skipped, again = caplog.messages
    assert skipped.endswith("had seen 160 images and goes on at image 200: 40 images are skipped.")
    assert again.endswith("had seen 160 images and goes on at image 80: 80 images are seen again.")


def test_a_folder_that_has_moved_is_the_same(tmp_path):
    for parent in ("one", "other"):
        (tmp_path / parent / "model").mkdir(parents=True)
    flag = "pretrained_model_name_or_path"
    before, after = (settings({flag: str(tmp_path / name / "model")}) for name in ("one", "other"))
    assert before == after
    assert str(tmp_path) not in json.dumps(before)


def test_state_is_read_as_it_was_written(tmp_path):
    state = RunState(3, settings(), [{"step": 1, "setting": "--seed", "before": 0, "after": 1}], 1.5)
    file = tmp_path / "state.json"
    state.write(file)
    assert RunState.read(file) == state
    # Of an earlier version, which passed over images
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unreadable_images": ["1.png"]}))
    assert RunState.read(file) == state


def test_of_a_thousand_classes_that_differ_three_are_named():
    before, after = ({f"class {label}": f"{name} {label}" for label in range(1000)} for name in ("cat", "dog"))
    with pytest.raises(ValueError, match=r"`class 2` was .* now; … \(1000 classes in all differ\)") as error:
        go_on(before, after)
    assert len(str(error.value)) < 500


def test_a_fingerprint_that_a_checkpoint_of_another_version_lacks_is_no_difference():
    assert go_on({"--seed": 0}, {"--seed": 0, "fingerprint of captions": "78"}) == []
    with pytest.raises(ValueError, match="`fingerprint of captions` was 77 and is 78 now"):
        go_on({"fingerprint of captions": "77"}, {"fingerprint of captions": "78"})
