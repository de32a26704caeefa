from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from tutelage.scoring import majority, matches, wilson


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Paris", "paris"),
        ("  **Paris.** ", "Paris"),
        ("“Paris”", "Paris"),
        ("`x = 1`", "x = 1"),
        ("grand  mother", "grand mother"),
        ("Ｐａｒｉｓ", "paris"),
        ("5", "5.0"),
        ("+5", "5"),
        ("5,000", "5000"),
        ("−7", "-7"),
        ("-0", "0.00"),
        ("0.50", "0.5"),
        ("12345678901234567890123456789012345678.0", "12345678901234567890123456789012345678"),
    ],
)
def test_answers_that_say_the_same_match(answer: str, label: str) -> None:
    assert matches(answer, label)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("The answer is 5", "5"),
        ("Paris, France", "Paris"),
        ("", "5"),
        ("007", "7"),
        ("5,00", "500"),
        ("10²", "102"),
        ("½", "1/2"),
        ("1.5", "15"),
        ("12345678901234567890123456789012345678", "12345678901234567890123456789012345679"),
        ("*", "."),
        ("nan", "0"),
    ],
)
def test_answers_that_say_something_else_do_not_match(answer: str, label: str) -> None:
    assert not matches(answer, label)


@given(st.text())
def test_every_text_matches_itself(text: str) -> None:
    assert matches(text, text)


@given(st.text(), st.text())
def test_matching_is_symmetric(a: str, b: str) -> None:
    assert matches(a, b) == matches(b, a)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.integers(0, 4))
def test_zeros_after_the_fraction_change_nothing(value: object, zeros: int) -> None:
    assert matches(f"{value:f}" + "0" * zeros, f"{value:f}")


@settings(deadline=None)  # the first call imports scipy
@given(st.integers(0, 400), st.integers(0, 400))
def test_the_wilson_interval_holds_the_rate_and_stays_within_0_and_1(wrong: int, right: int) -> None:
    found = wilson(right, wrong + right)
    assert 0.0 <= found.lo <= found.rate + 1e-12
    assert found.rate - 1e-12 <= found.hi <= 1.0


def test_the_wilson_interval_is_the_published_one() -> None:
    found = wilson(81, 263)  # Newcombe 1998, table I
    assert (found.lo, found.hi) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@given(st.integers(0, 500), st.integers(1, 500), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_the_wilson_interval_is_the_one_of_scipy(k: int, more: int, level: float) -> None:
    interval = binomtest(k, k + more).proportion_ci(confidence_level=level, method="wilson")
    found = wilson(k, k + more, confidence=level)

    assert (found.lo, found.hi) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_nothing_observed_means_anything_is_possible() -> None:
    found = wilson(0, 0)
    assert (found.rate, found.lo, found.hi) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(("k", "n"), [(3, 2), (-1, 2)])
def test_counts_that_are_no_share_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson(k, n)


def test_the_majority_counts_spellings_of_one_answer_together() -> None:
    found = majority(["5", "5.0", "five", "**5**", "6"])
    assert (found.k, found.n) == (3, 5)


def test_no_labels_have_no_majority() -> None:
    assert majority([]).n == 0
