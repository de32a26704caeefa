"""Which kept questions lie near, within a context and a bound."""

from __future__ import annotations

import numpy as np

from tutelage.gateway.cache import CacheKey
from tutelage.gateway.neighbours import Kept, Neighbours
from tutelage.routing.equivalence import Question


def kept(name: str, *, context: str = "c", until: float = 100.0) -> Kept:
    return Kept(Question(name, context), CacheKey("t", f"{context}:{name}"), until)


def at(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)]], dtype=np.float32)


def names(neighbours: Neighbours, context: str = "c") -> list[str]:
    return [one.question.text for one, _ in neighbours.near(at(0.0)[0], context, most=10)]


def test_the_nearest_come_first_and_only_those_of_the_context() -> None:
    near = Neighbours(2, 10)
    for name, angle, context in (("b", 0.5, "c"), ("a", 0.1, "c"), ("other", 0.0, "d")):
        near.add([kept(name, context=context)], at(angle))
    assert names(near) == ["a", "b"]
    assert names(near, "nothing") == []


def test_the_oldest_go_when_there_are_too_many() -> None:
    near = Neighbours(2, 10)
    for number in range(25):
        near.add([kept(str(number))], at(number / 100))
    assert len(near) <= 10
    assert "24" in names(near) and "0" not in names(near)


def test_what_expired_or_was_dropped_is_forgotten_with_its_context() -> None:
    near = Neighbours(2, 10)
    near.add([kept("soon", until=5.0)], at(0.1))
    near.add([kept("late", until=50.0)], at(0.2))
    near.expire(10.0)
    assert names(near) == ["late"]
    near.drop(kept("late").place)
    assert not near.knows("c")


def test_a_question_kept_again_is_there_once() -> None:
    near = Neighbours(2, 10)
    for until in (5.0, 50.0):
        near.add([kept("a", until=until)], at(0.1))
    near.expire(10.0)
    assert names(near) == ["a"]
