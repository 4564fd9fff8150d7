"""Nothing that was written by hand is lost when a card is generated anew."""

from __future__ import annotations

import logging
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dtr.model_card.edits import latest_edit, refresh_card, seal_card, was_edited


def generated(loss: str = "0.5", tags: str = "dtr", more: str = "") -> str:
    return seal_card(
        f"---\nlibrary_name: diffusers\ntags:\n- {tags}\n- images\n{more}---\n\n"
        "<!-- diffusers-dtr:seal -->\n\n# Digits\n\n"
        f"<!-- diffusers-dtr:begin results -->\n## Results\n\nThe loss is {loss}.\n"
        "<!-- diffusers-dtr:end results -->\n\n"
        "<!-- diffusers-dtr:begin limits -->\n<!-- diffusers-dtr:end limits -->\n\n"
        "<!-- diffusers-dtr:begin use -->\n## Use\n\n```python\npass\n```\n<!-- diffusers-dtr:end use -->\n"
    )


OLD = generated()
SEAL = next(line for line in OLD.splitlines() if "seal" in line)
NEW = generated("0.4", "new", more="license: mit\n")


def without_seal(card: str) -> str:
    return re.sub(r"<!-- diffusers-dtr:seal.*-->", "", card)


@st.composite
def edited(draw) -> tuple[str, str]:
    """A card in which some text was replaced by another, and that other text."""
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(OLD))] * 2)))
    text = draw(st.text(alphabet="aé# -:<>!\n`1", max_size=6).map("@{}@".format) | st.just(""))
    return OLD[:start] + text + OLD[end:], text


@given(edited())
def test_any_edit_is_as_it_was_after_a_refresh_with_nothing_new(edit):
    card, _ = edit
    assert without_seal(refresh_card(card, OLD)) == without_seal(card)


@given(edited())
def test_any_edit_is_still_there_after_a_refresh_with_news(edit):
    card, text = edit
    assert text in refresh_card(card, NEW)
    # What was cut out does not come back, but as something that is new.
    for word in ("# Digits", "The loss is", "## Use", "library_name: diffusers"):
        assert refresh_card(card, NEW).count(word) <= card.count(word)


@given(edited())
def test_refreshing_twice_is_refreshing_once(edit):
    once = refresh_card(edit[0], NEW)
    assert refresh_card(once, NEW) == once


def test_a_card_that_nobody_edited_becomes_the_new_one():
    assert refresh_card(OLD, NEW) == NEW
    assert refresh_card(OLD, OLD) == OLD


def test_other_parts_are_renewed_beside_an_edited_one(caplog):
    card = OLD.replace("pass", "mine()").replace("# Digits", "# My digits\n\nA word before.")
    with caplog.at_level(logging.WARNING):
        refreshed = refresh_card(card, NEW)
    assert "The loss is 0.4." in refreshed
    assert "mine()" in refreshed
    assert "A word before." in refreshed
    assert [record.getMessage() for record in caplog.records] == [
        "The card's section 'use' was edited by hand and stays as it is."
    ]
    assert "- new" in refreshed


def test_an_edited_section_stays_through_every_later_refresh():
    card = OLD.replace("0.5", "half")
    assert "half" in refresh_card(refresh_card(refresh_card(card, NEW), OLD), NEW)


def test_a_deleted_section_and_a_deleted_key_stay_deleted():
    card = re.sub(r"<!-- diffusers-dtr:begin results.*end results -->", "", OLD, flags=re.DOTALL)
    card = card.replace("library_name: diffusers\n", "")
    refreshed = refresh_card(refresh_card(card, NEW), NEW)
    assert "Results" not in refreshed
    assert "library_name: diffusers" not in refreshed
    assert "license: mit" in refreshed


def test_a_section_that_was_empty_is_filled_when_there_is_something_to_say():
    filled = seal_card(NEW.replace("<!-- diffusers-dtr:end limits", "Few.\n<!-- diffusers-dtr:end limits"))
    assert "Few." in refresh_card(OLD, filled)


def test_metadata_and_comments_added_by_hand_stay_beside_renewed_ones():
    card = OLD.replace("library_name", "# mine\nlanguage: [en]  # of the labels\nlibrary_name", 1)
    refreshed = refresh_card(card, NEW)
    assert "# mine\nlanguage: [en]  # of the labels\nlibrary_name: diffusers\ntags:\n- new\n" in refreshed
    assert yaml.safe_load(refreshed.split("---")[1]) == {
        "language": ["en"],
        "library_name": "diffusers",
        "tags": ["new", "images"],
        "license": "mit",
    }


def test_edited_metadata_stays_and_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        refreshed = refresh_card(OLD.replace("- images\n", "- images\n- mine\n"), NEW)
    assert "tags:\n- dtr\n- images\n- mine\nlicense: mit\n---" in refreshed
    assert "'tags'" in caplog.text


def test_a_key_that_is_no_longer_generated_stays():
    assert "license: mit" in refresh_card(NEW, OLD)


def test_a_key_that_was_written_by_hand_is_not_replaced_by_a_generated_one():
    card = OLD.replace("---\n\n", "license: apache-2.0\n---\n\n")
    refreshed = refresh_card(refresh_card(card, NEW), NEW)
    assert "license: apache-2.0" in refreshed
    assert "license: mit" not in refreshed


@pytest.mark.parametrize("card", ["", "# By hand\n", "---\ntags: [mine]\n---\nBy hand.\r\n", "---\r\na: b\r\n---\r\n"])
def test_a_card_written_by_hand_is_left_alone(card):
    assert refresh_card(card, NEW) == card
    assert was_edited(card)


def test_line_endings_stay_and_are_no_edit():
    windows = OLD.replace("\n", "\r\n")
    assert refresh_card(windows, NEW) == NEW.replace("\n", "\r\n")
    assert not was_edited(windows)


@given(edited())
def test_an_edit_is_noticed_until_the_card_is_refreshed(edit):
    card, _ = edit
    if without_seal(card) != without_seal(OLD):
        assert was_edited(card)
    if SEAL in card:
        assert not was_edited(refresh_card(card, NEW))


def test_the_edited_one_of_two_versions_is_the_one_to_go_on_from(caplog):
    edited_here, edited_there = OLD.replace("# Digits", "# Here"), OLD.replace("# Digits", "# There")
    assert latest_edit(None, None) is None
    assert latest_edit(OLD, None) == latest_edit(None, OLD) == OLD
    assert latest_edit(OLD, edited_there) == edited_there
    assert latest_edit(edited_here, OLD) == edited_here
    assert latest_edit(edited_here, edited_here) == edited_here
    # One that has been refreshed since is the newer one, though it is not edited now.
    assert latest_edit(OLD, refresh_card(edited_there, NEW)) == refresh_card(edited_there, NEW)
    assert not caplog.records
    assert latest_edit(edited_here, edited_there) == edited_here
    assert "history" in caplog.text
