"""Which questions are not the same, however near they lie."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.routing.agreement import agree
from tutelage.routing.equivalence import Question, compare

APART = [
    ("How do I turn on dark mode?", "How do I turn off dark mode?", "opposite"),
    ("Should I buy gold?", "Should I sell gold?", "opposite"),
    ("What are the pros of nuclear power?", "What are the cons of nuclear power?", "opposite"),
    ("Why can I log in?", "Why can't I log in?", "negation"),
    ("Which birds fly?", "Which birds never fly?", "negation"),
    ("What is 2 + 2?", "What is 2 + 3?", "number"),
    ("Name two planets", "Name three planets", "number"),
    ("What does error 404 mean?", "What does error mean?", "number"),
    ("How far is the Moon in km?", "How far is the Moon in miles?", "unit"),
    ("Convert 5 km to miles", "Convert 5 miles to km", "direction"),
    ("Is Rust faster than Go?", "Is Go faster than Rust?", "direction"),
    ("What is the capital of France?", "What is the capital of Spain?", "name"),
    ("Who wrote Hamlet?", "When was Hamlet written?", "kind"),
]
TOGETHER = [
    ("How do I reset the router?", "What is the way to reset a router?"),
    ("When did World War II end?", "When did World War 2 end?"),
    ("What is 1,000 + 2.50?", "what is 1000 + 2.5"),
    ("Explain how photosynthesis works", "How does photosynthesis work?"),
    ("Who invented the telephone?", "Who was the inventor of the telephone?"),
]
TEXTS = st.text(max_size=60)


@pytest.mark.parametrize(("one", "other", "guard"), APART)
def test_a_guard_tells_look_alikes_apart_in_either_order(one: str, other: str, guard: str) -> None:
    for a, b in ((one, other), (other, one)):
        difference = compare(Question(a), Question(b)).difference
        assert difference is not None
        assert difference.guard == guard


@pytest.mark.parametrize(("one", "other"), TOGETHER)
def test_no_guard_speaks_against_other_words_for_the_same(one: str, other: str) -> None:
    assert compare(Question(one), Question(other)).difference is None


def test_the_same_words_in_another_conversation_are_another_question() -> None:
    difference = compare(Question("And then?", "a"), Question("And then?", "b")).difference
    assert difference is not None
    assert difference.guard == "context"


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_comparing_is_symmetric_and_a_text_never_differs_from_itself(a: str, b: str) -> None:
    one, other = compare(Question(a), Question(b)).difference, compare(Question(b), Question(a)).difference
    assert (one and one.guard) == (other and other.guard)
    assert compare(Question(a), Question(a)).difference is None


HOLD = "Hold the button for about ten seconds until the red light blinks."
ON = "The service is switched on by default in all new accounts here."
ANSWERS = [
    ("42", "42.", 0.5, True),
    ("Paris", "Lyon", 0.99, False),
    (HOLD, "Keep the button held for ten seconds, till the red light blinks.", 0.95, True),
    (HOLD, HOLD.replace("ten", "five"), 0.99, False),
    (ON, ON.replace(" on ", " off "), 0.99, False),
    (ON, "A quite different text of many words about engines and their parts.", 0.3, False),
]


@pytest.mark.parametrize(("one", "other", "cosine", "same"), ANSWERS)
def test_answers_agree_when_equal_or_long_and_near_with_the_same_numbers(one: str, other: str, cosine: float, same: bool) -> None:
    assert agree(one, other, cosine=cosine).same is same
