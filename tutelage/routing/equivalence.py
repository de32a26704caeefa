"""Guards that see what a sentence embedding does not: two questions that differ in a negation, a number, a unit, a name, a direction, or in
what kind of answer they want are not the same question, however close they lie.

Pure rules over texts: English words, numbers and names in any language. It refuses to know how near two questions are (`pairs.py`) and
what error is tolerable (`budget.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tutelage.routing import words

Guard = Literal["context", "negation", "opposite", "number", "unit", "direction", "name", "kind"]
GUARDS: tuple[Guard, ...] = ("context", "negation", "opposite", "number", "unit", "direction", "name", "kind")
MOST_CHARACTERS = 4_000  # longer questions are not compared word by word

WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)?", re.UNICODE)
NEGATIONS = frozenset(words.NEGATIONS.split())
COMMON = frozenset(words.COMMON.split())
UNITS = {unit: line.split()[0] for line in words.UNITS.strip().splitlines() for unit in line.split()}
NUMERALS = {word: str(value) for value, line in enumerate(words.NUMERALS.strip().splitlines()) for word in line.split()} | words.LARGE
OPPOSITE: dict[str, set[str]] = {}
for _pair in words.OPPOSITES.split():
    _one, _other = _pair.split("/")
    OPPOSITE.setdefault(_one, set()).add(_other)
    OPPOSITE.setdefault(_other, set()).add(_one)
DIRECTED = re.compile(r"\b(\w+)\s+((?:in)?to|than|from|over|before|after|by)\s+(?:an?\s+|the\s+)?(\w+)", re.IGNORECASE)
TURNING = frozenset({"to", "into", "than", "from", "over", "before", "after", "by"})
KINDS: tuple[tuple[str, str], ...] = (
    ("how many", r"how\s+(many|much)|number\s+of|amount\s+of|cost|price"),
    ("how long", r"how\s+(long|old|tall|far|big|large|high|deep|fast|often)"),
    ("why", r"why|reasons?|how\s+come|what\s+causes|cause"),
    ("when", r"when|what\s+(time|year|date|day)|which\s+(year|day|date)"),
    ("where", r"where|which\s+(place|country|city)|what\s+(place|country|city)"),
    ("who", r"who|whom|whose|which\s+(person|people)"),
    ("how", r"how"),
    ("what", r"what|which"),
    ("whether", r"(is|are|was|were|do|does|did|can|could|will|would|should|has|have|had|am|may|might)\b"),
)  # fmt: skip
KIND = tuple((name, re.compile(rf"\W*(?:\w+\W+){{0,1}}?(?:{pattern})\b", re.IGNORECASE)) for name, pattern in KINDS)
APART = {frozenset(pair) for pair in (
    ("who", "when"), ("who", "where"), ("when", "where"), ("why", "who"), ("why", "when"), ("why", "where"), ("how many", "who"),
    ("how many", "where"), ("how many", "when"), ("how many", "why"), ("how long", "who"), ("how long", "where"), ("how long", "why"),
)}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question as it is compared: its text, and a digest of all else that shapes its answer (`context`)."""

    text: str
    context: str = ""

    @cached_property
    def words(self) -> tuple[str, ...]:
        """In order and lower case, with numerals as digits."""
        found = (word.lower().replace("’", "'") for word in WORD.findall(self.text[:MOST_CHARACTERS]))
        return tuple(NUMERALS.get(word, word) for word in found)

    @cached_property
    def content(self) -> frozenset[str]:
        """The stems of the words that carry meaning."""
        return frozenset(stem(word) for word in self.words if (word not in COMMON and len(word) > 1) or word[0].isdigit())

    @cached_property
    def numbers(self) -> Counter[str]:
        return Counter(_number(word) for word in self.words if word[0].isdigit())

    @cached_property
    def units(self) -> frozenset[str]:
        """Units of measure and currencies that are named."""
        return frozenset(UNITS[word] for word in self.words if word in UNITS) | {
            name for sign, name in words.SIGNS.items() if sign in self.text
        }

    @cached_property
    def negations(self) -> int:
        plain = (word.replace("'", "") for word in self.words)
        return sum(word in NEGATIONS for word in plain)

    @cached_property
    def names(self) -> frozenset[str]:
        """Stems of words written as names: capitals not at the beginning of a sentence, or within, or beside digits."""
        text = self.text[:MOST_CHARACTERS]
        found = set()
        for at in WORD.finditer(text):
            word = at[0]
            first = not text[: at.start()].rstrip(" \"'“‘(").strip() or text[: at.start()].rstrip(" \"'“‘(")[-1:] in ".?!:"
            if any(c.isupper() for c in (word[1:] if first else word)) and word.lower() not in COMMON:
                found.add(stem(NUMERALS.get(word.lower(), word.lower())))
        return frozenset(found)

    @cached_property
    def kind(self) -> str:
        return next((name for name, pattern in KIND if pattern.match(self.text)), "other")


def stem(word: str) -> str:
    """Without the endings that English gives to the same word."""
    word = word.removesuffix("'s")
    for ending, least in (("ies", 5), ("ing", 6), ("ed", 5), ("es", 5), ("s", 4), ("ly", 6), ("e", 5)):
        if word.endswith(ending) and len(word) >= least and not word.endswith("ss"):
            return word.removesuffix(ending) + ("y" if ending == "ies" else "")
    return word


@dataclass(frozen=True)
class Difference:
    """Why two questions are not the same."""

    guard: Guard
    reason: str


@dataclass(frozen=True)
class Comparison:
    """What sets two questions apart; symmetric. `numbers`, `units` and `names` are how many of the two sides have some that the other
    has not: 2 is one put for another, 1 is one left out."""

    context: bool
    negation: bool
    opposite: str | None
    numbers: int
    units: int
    direction: bool
    names: int
    kind: bool

    @property
    def difference(self) -> Difference | None:
        """The first guard that speaks against it. A number left out is another question; a name or unit left out may be an abbreviation."""
        found: list[tuple[bool, Guard, str]] = [
            (self.context, "context", "the conversation, the instructions or the parameters differ"),
            (self.negation, "negation", "one of them is negated"),
            (self.opposite is not None, "opposite", f"one says {self.opposite}"),
            (self.numbers > 0, "number", "their numbers differ"),
            (self.units > 1, "unit", "their units differ"),
            (self.direction, "direction", "they go in opposite directions"),
            (self.names > 1, "name", "they are about different names"),
            (self.kind, "kind", "they ask for different kinds of answer"),
        ]
        return next((Difference(guard, reason) for differs, guard, reason in found if differs), None)


def compare(a: Question, b: Question) -> Comparison:
    """All differences that the guards know."""
    only_a, only_b = set(a.words) - set(b.words), set(b.words) - set(a.words)
    opposite = next((f"{w}, the other {min(o)}" for w in sorted(only_a) if (o := OPPOSITE.get(w, set()) & only_b)), None)
    stems_a, stems_b = {stem(word) for word in a.words}, {stem(word) for word in b.words}
    return Comparison(
        context=a.context != b.context,
        negation=a.negations % 2 != b.negations % 2,
        opposite=opposite,
        numbers=bool(a.numbers - b.numbers) + bool(b.numbers - a.numbers),
        units=bool(a.units - b.units) + bool(b.units - a.units),
        direction=_turned(a, b),
        names=bool(a.names - stems_b) + bool(b.names - stems_a),
        kind=frozenset((a.kind, b.kind)) in APART,
    )


def _turned(a: Question, b: Question) -> bool:
    """Whether one goes from x to y and the other from y to x, or the same words stand in another order around such a word."""
    ways_a, ways_b = _ways(a.text), _ways(b.text)
    if any((y, how, x) in ways_b and (x, how, y) not in ways_b for x, how, y in ways_a):
        return True
    order_a, order_b = ([stem(word) for word in q.words if word not in COMMON] for q in (a, b))
    turning = not TURNING.isdisjoint(a.words) and not TURNING.isdisjoint(b.words)
    return turning and order_a != order_b and Counter(order_a) == Counter(order_b)


def _ways(text: str) -> set[tuple[str, str, str]]:
    found = DIRECTED.findall(text[:MOST_CHARACTERS].lower())
    return {(stem(x), how.removeprefix("in"), stem(y)) for x, how, y in found}


def _number(word: str) -> str:
    plain = word.replace(",", "")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain
