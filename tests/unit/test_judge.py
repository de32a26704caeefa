from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.routing.judge import combine, question, read, unbiased
from tutelage.routing.votes import agree
from tutelage.settings import JudgeSettings

SAID = [None, "first", "second", "tie"]


@given(st.sampled_from(SAID), st.sampled_from(SAID))
def test_a_preference_counts_only_if_it_is_the_same_both_ways_round(straight: str | None, swapped: str | None) -> None:
    found = combine(straight, swapped)  # type: ignore[arg-type]
    expected = {("first", "second"): "win", ("second", "first"): "lose"}.get((straight, swapped), "tie")  # type: ignore[arg-type]
    assert found.verdict == expected
    assert found.reason


def test_a_judge_that_always_prefers_the_first_prefers_nobody() -> None:
    assert combine("first", "first").verdict == "tie"


@pytest.mark.parametrize(
    ("text", "said"),
    [("FIRST", "first"), ("Second.", "second"), ("**TIE**", "tie"), ("first or second", None), ("neither", None), ("", None)],
)
def test_a_verdict_is_one_word_and_anything_else_is_none(text: str, said: str | None) -> None:
    assert read(text) == said


def test_the_question_tells_nothing_of_who_answered() -> None:
    asked = question("What is 2 + 2?", "4", "5")
    assert asked[1]["content"].index("4") < asked[1]["content"].index("5")
    assert "student" not in str(asked) and "teacher" not in str(asked)


def test_a_share_of_verdicts_is_corrected_for_the_judges_errors() -> None:
    random = np.random.default_rng(3)
    good = random.random(20_000) < 0.6
    said = np.where(good, random.random(20_000) < 0.9, random.random(20_000) < 0.25)
    counted = [unbiased(float(verdict), sensitivity=0.9, specificity=0.75) for verdict in said]
    assert abs(np.mean(said) - 0.6) > 0.03
    assert np.mean(counted) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(("family", "sensitivity"), [("OpenAI", 1.0), ("other", 0.0001)])
def test_a_judge_of_the_teachers_family_and_one_that_tells_nothing_are_refused(family: str, sensitivity: float) -> None:
    with pytest.raises(ValueError, match=r"family|nothing"):
        JudgeSettings(model="j", family=family, teacher_families=("openai",), sensitivity=sensitivity, specificity=0.5)


def test_what_most_say_is_given_whatever_the_order_of_the_others() -> None:
    for texts in permutations(["four", "5", "Four."]):
        found = agree(texts, [0.2, 0.3, 0.9])
        assert texts[found.index].casefold().startswith("four")
        assert found.votes == 2


def test_where_all_differ_the_most_trusted_is_given() -> None:
    assert agree(["a", "b", "c"], [0.2, 0.9, 0.3]).index == 1
