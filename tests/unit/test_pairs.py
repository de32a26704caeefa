"""What a pair is like, and what labelled pairs teach."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.routing import pairs
from tutelage.routing.equivalence import Question, compare

COSINE = [trait.name for trait in pairs.TRAITS].index("cosine")


class Letters:
    """Reads words by their letters alone."""

    def encode(self, texts: list[str]) -> np.ndarray:
        rows = [np.frombuffer(hashlib.sha256(text.encode("utf-8", "replace")).digest(), np.uint8) - 127.5 for text in texts]
        return np.array([row / np.linalg.norm(row) for row in rows], dtype=np.float32)

    def rarity(self, word: str) -> float:
        return float(len(word))


def traits(a: str, b: str) -> np.ndarray:
    one, other = Question(a), Question(b)
    return pairs.traits([(one, other, 0.9, compare(one, other))], reader=Letters())


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_traits_are_finite_and_the_same_in_either_order(a: str, b: str) -> None:
    assert np.isfinite(traits(a, b)).all()
    assert np.allclose(traits(a, b), traits(b, a), atol=1e-6)


def test_before_anything_was_learned_nearer_is_likelier_and_a_guard_makes_it_less_so() -> None:
    rows = np.zeros((3, len(pairs.TRAITS)))
    rows[:, COSINE] = (0.6, 0.9, 0.9)
    rows[2, COSINE + 1] = 1.0  # negation
    far, near, negated = pairs.Unfitted().probability(rows)
    assert far < near
    assert negated < near


def test_a_guard_refuses_whatever_the_probability() -> None:
    sure = pairs.verify(
        Question("Turn on the light"), [(Question("Turn off the light"), 1.0)], pairs.Unfitted(), reader=Letters(), least=0.0
    )[0]
    assert not sure.same
    assert sure.reason.startswith("opposite")


def test_labels_teach_what_tells_same_from_different() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(600, len(pairs.TRAITS)))
    same = rows[:, 3] + 0.3 * rng.normal(size=600) > 0
    fitted = pairs.fit(rows[:400], same[:400], seed=0)
    assert ((fitted.probability(rows[400:]) > 0.5) == same[400:]).mean() > 0.8


@pytest.mark.parametrize("n", [0, 50])
def test_too_few_labels_teach_nothing(n: int) -> None:
    assert isinstance(pairs.fit(np.zeros((n, len(pairs.TRAITS))), np.ones(n, bool), seed=0), pairs.Unfitted)


def test_where_no_pair_was_ever_labelled_what_was_learned_makes_nothing_likelier() -> None:
    class Always:
        def probability(self, traits: np.ndarray) -> np.ndarray:
            return np.ones(len(traits))

    far = pairs.verify(Question("red roses"), [(Question("blue whales"), 0.1)], Always(), reader=Letters(), least=0.8)[0]
    assert far.probability < 0.5


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), max_size=6))
def test_rivals_with_other_answers_make_each_less_likely_and_all_together_at_most_certain(rows: list[tuple[float, int]]) -> None:
    stated = pairs.exclusive([p for p, _ in rows], [answer for _, answer in rows])
    assert all(one <= p + 1e-9 for one, (p, _) in zip(stated, rows, strict=True))
    best = {answer: max(one for one, (_, other) in zip(stated, rows, strict=True) if other == answer) for _, answer in rows}
    assert sum(best.values()) <= 1 + 1e-9


def test_questions_with_the_same_answer_are_no_rivals() -> None:
    assert pairs.exclusive([0.9, 0.9], ["yes", "yes"]) == pytest.approx([0.9, 0.9])
    assert max(pairs.exclusive([0.9, 0.9], ["yes", "no"])) < 0.5
