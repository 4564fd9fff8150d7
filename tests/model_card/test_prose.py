from __future__ import annotations

import json
import shlex

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import diffusers_dtr
from diffusers_dtr.model_card.prose import overview, samples_caption, wrap_command
from diffusers_dtr.model_card.trained_model import TrainedModel
from diffusers_dtr.run_folder import RECORD_FILE


ROUTED_CLASSES = [name for name in diffusers_dtr.__all__ if hasattr(getattr(diffusers_dtr, name), "plain_class")]


@pytest.mark.parametrize("name", ROUTED_CLASSES)
def test_every_routed_class_is_called_what_people_call_it(name, tmp_path):
    (tmp_path / RECORD_FILE).write_text(json.dumps({"model": {"class": name}}))
    assert "diffusion model" not in overview(TrainedModel(tmp_path))


@given(st.lists(st.text(alphabet="ab -'\"$", max_size=40).map("--{}".format) | st.text(max_size=5), min_size=1))
def test_a_wrapped_command_has_the_same_words(words):
    # Inside a word this is no end of a line, as which the comparison below would take it.
    assume(not any(" \\\n" in word for word in words))
    wrapped = wrap_command(shlex.join(words))
    assert shlex.split(wrapped.replace(" \\\n", " ")) == words


def test_lines_are_broken_before_flags_and_as_late_as_fits():
    flags = [f"--flag{number} {number}" for number in range(9)]
    first, *rest = wrap_command(f"accelerate launch train.py {' '.join(flags)}", width=40).split(" \\\n")
    assert first == "accelerate launch train.py --flag0 0"
    assert rest == ["  " + " ".join(flags[start : start + 3]) for start in (1, 4, 7)]


@pytest.mark.parametrize(
    ("scale", "said"), [(0.0, "without guidance"), (1.0, "without guidance"), (1.5, "guidance 1.5")]
)
def test_guidance_of_one_is_none(scale, said, tmp_path):
    record = {"arguments": {"validation_guidance_scale": scale, "validation_num_inference_steps": 20}}
    (tmp_path / RECORD_FILE).write_text(json.dumps(record))
    assert samples_caption(TrainedModel(tmp_path)) == f"Samples, not picked, {said}, 20 steps."
