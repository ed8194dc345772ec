"""Tokens become pieces of text that never break a character, up to the first stop string."""

import random

import pytest

from app.chat_text import TextStream
from tests.chat_repository import END, make_tokenizer

TOKENIZER = make_tokenizer()


def pieces(text: str | bytes, *stop: str) -> tuple[list[str], TextStream]:
    """What is told after each byte of `text`, and at the end."""
    stream = TextStream(TOKENIZER, stop)
    told = [stream.push(byte) for byte in (text if isinstance(text, bytes) else text.encode())]
    return [*told, stream.finish()], stream


def test_a_character_comes_whole() -> None:
    told, _ = pieces("aé漢🙂!")
    assert [piece for piece in told if piece] == ["a", "é", "漢", "🙂", "!"]


@pytest.mark.parametrize("text", [b"\xe6\xbc", b"a\xff\xffb", b"\xf0\x9f\x99", b"\xc3\xc3\xa9", "\ufffd".encode()])
def test_bytes_of_no_character_are_replaced(text: bytes) -> None:
    assert "".join(pieces(text)[0]) == text.decode(errors="replace")


def test_special_tokens_are_left_out() -> None:
    stream = TextStream(TOKENIZER)
    assert [stream.push(token) for token in (ord("a"), END, ord("b"))] == ["a", "", "b"]


def test_the_text_ends_before_the_stop_string() -> None:
    told, stream = pieces("one, two\n\nthree", "\n\n")
    assert "".join(told) == "one, two"
    assert stream.stopped
    assert stream.push(ord("x")) == stream.finish() == ""


def test_what_only_began_like_a_stop_string_is_told() -> None:
    told, stream = pieces("abaabab", "abac")
    assert "".join(told) == "abaabab"
    assert not stream.stopped
    assert told[:4] == ["", "", "", "aba"]


def test_the_first_of_several_to_be_complete_counts() -> None:
    assert "".join(pieces("wxyz", "xyz", "y")[0]) == "wx"
    assert "".join(pieces("wxyz", "xyz", "yz")[0]) == "w"
    assert "".join(pieces("a漢b", "漢")[0]) == "a"


def test_pieces_together_are_the_text_before_the_stop() -> None:
    """Against the obvious way, on texts of few letters, where strings overlap."""
    drawn = random.Random(0)
    for _ in range(300):
        text = "".join(drawn.choices("abé", k=drawn.randint(0, 12)))
        stops = ["".join(drawn.choices("abé", k=drawn.randint(1, 4))) for _ in range(drawn.randint(0, 3))]
        told, stream = pieces(text, *stops)
        # A stop string ends the text as soon as it is there: the first to be complete.
        ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
        complete = min(ends)[0] if ends else len(text)
        expected = text[: min(place for end, place in ends if end == complete)] if ends else text
        assert "".join(told) == expected, (text, stops)
        assert stream.stopped == bool(ends)
