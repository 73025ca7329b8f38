"""Cleaning of texts as the public ALBEF implementation does."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamo.data.cleaning import albef_caption, albef_question, cleaner
from mamo.data.pairs_reader import clean_caption

TEXTS = st.text(st.sampled_from("ab CD\t\n ,.'!?\"()*#:;~-/<>é…½ "), max_size=120)


@pytest.mark.parametrize(
    ("text", "caption", "question"),
    [
        ("A Red-Brown dog, isn't it?", "a red brown dog isnt it", "a red brown dog isnt it"),
        ("what's on/under: <PERSON>  (left)?", "whats on under person left", "whats on under <person>  left"),
        (" a  b ", "a b", " a  b"),
        ("…½ é", "…½ é", "…½ é"),  # Unicode is not normalised
        ("w " * 40, " ".join(["w"] * 30), " ".join(["w"] * 30)),
        ("w  " * 40, " ".join(["w"] * 30), "  ".join(["w"] * 15)[:44] + " "),  # empty words count
        ("?!", "", ""),
    ],
)
def test_texts_are_cleaned_as_albef_does(text: str, caption: str, question: str) -> None:
    """Bug: marks, capitals or words that its network never saw."""
    assert albef_caption(text) == caption
    assert albef_question(text).split(" ")[:30] == question.split(" ")[:30]


@given(TEXTS)
def test_cleaning_again_changes_nothing(text: str) -> None:
    """Bug: a text cleaned by the data set and again by the scorer becomes another."""
    once = albef_caption(text)
    assert albef_caption(once) == once
    assert not re.search(r"[,.'!?\"()*#:;~/A-Z-]|  ", once)
    assert len(once.split(" ")) <= 30


def test_the_default_is_as_before() -> None:
    """Bug: texts of one's own runs change."""
    assert cleaner("plain") is cleaner("plain", is_question=True) is clean_caption
