from __future__ import annotations

import shlex

from hypothesis import given
from hypothesis import strategies as st

from diffusers_dtr.model_card.prose import wrap_command


@given(st.lists(st.text(alphabet="ab -'\"$", max_size=40).map("--{}".format) | st.text(max_size=5), min_size=1))
def test_a_wrapped_command_has_the_same_words(words):
    wrapped = wrap_command(shlex.join(words))
    assert shlex.split(wrapped.replace(" \\\n", " ")) == words


def test_lines_are_broken_before_flags_and_as_late_as_fits():
    flags = [f"--flag{number} {number}" for number in range(9)]
    first, *rest = wrap_command(f"accelerate launch train.py {' '.join(flags)}", width=40).split(" \\\n")
    assert first == "accelerate launch train.py --flag0 0"
    assert rest == ["  " + " ".join(flags[start : start + 3]) for start in (1, 4, 7)]
