"""Cleaning is open_clip's, to the letter."""

from typing import get_args

import pytest
from open_clip.tokenizer import get_clean_fn

from app.clean import Cleaning, cleaner
from export.phrases import broken_texts, difficult_phrases


@pytest.mark.parametrize("kind", get_args(Cleaning))
def test_texts_become_what_open_clip_makes_of_them(kind: Cleaning) -> None:
    theirs, ours, texts = get_clean_fn(kind), cleaner(kind), (*broken_texts(), *difficult_phrases()[:600])
    assert [text for text in texts if ours(text) != theirs(text)] == []


def test_broken_unicode_and_entities_are_mended() -> None:
    assert cleaner("lower")("  CrÃ¨me &amp;amp; CafÃ©\u2019s ") == "crème & café's"
    assert cleaner("whitespace")("A\t B\n") == "A B"
    assert cleaner("canonicalize")("Don't_STOP, now!") == "dont stop now"


def test_without_a_name_nothing_is_cleaned() -> None:
    assert cleaner(None)(" A &amp; B ") == " A &amp; B "
