"""Stop strings end an answer exactly before them, and nothing leaves early that could still be part of one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.transcript import Token, Transcript


def written(pieces: list[str], stop: tuple[str, ...]) -> tuple[Transcript, str]:
    """The transcript after all pieces, and the text as a stream would have shown it."""
    transcript, streamed = Transcript(stop), ""
    for number, piece in enumerate(pieces):
        streamed += "".join(token.text for token in transcript.add(Token(number, piece, -0.1)))
        if transcript.stopped:
            return transcript, streamed
    streamed += "".join(token.text for token in transcript.close())
    return transcript, streamed


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        (["a", "b", "c"], (), "abc"),
        (["ab", "cd"], ("bc",), "a"),
        (["one\n", "two"], ("\n",), "one"),
        (["x", "END"], ("END",), "x"),
        (["EN", "x"], ("END",), "ENx"),
        (["", "E", "", "ND", "y"], ("END",), ""),
        (["a", "E", "N"], ("END",), "aEN"),
        (["abc"], ("c", "b"), "a"),
    ],
)
def test_text_ends_before_the_first_stop_string(pieces: list[str], stop: tuple[str, ...], text: str) -> None:
    transcript, streamed = written(pieces, stop)
    assert transcript.text == streamed == text


def test_a_possible_stop_string_is_held_back() -> None:
    transcript = Transcript(("END",))
    assert transcript.add(Token(0, "aE", -1.0)) == []
    assert transcript.add(Token(1, "N", -1.0)) == []
    assert [token.id for token in transcript.add(Token(2, "x", -1.0))] == [0, 1, 2]


def test_a_cut_token_keeps_its_log_probability() -> None:
    transcript, _ = written(["hello END"], (" END",))
    assert [(token.text, token.logprob) for token in transcript.tokens] == [("hello", -0.1)]


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_any_split_into_tokens_gives_the_same_text(pieces: list[str], stop: list[str]) -> None:
    whole = "".join(pieces)
    cuts = [whole.find(s) for s in stop if s in whole]
    transcript, streamed = written(pieces, tuple(stop))
    assert transcript.stopped == bool(cuts)
    # The first stop string to be complete ends the answer, so the cut is at one of them, never beyond the earliest end.
    assert transcript.text == streamed == whole[: len(streamed)]
    assert not any(s in streamed for s in stop)
    if not cuts:
        assert streamed == whole
