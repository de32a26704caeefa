"""Reasoning-gym sums with reasons that a program writes. It refuses to know students."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace

from training.examples import Example


def chain_sums(count: int, *, terms: int, seed: int) -> list[Example]:
    """Sums and differences of `terms` numbers of two digits, answered by the number alone."""
    sys.modules.setdefault("pycosat", types.ModuleType("pycosat"))  # wanted at import by a puzzle that is not used here
    import reasoning_gym

    options = {"min_terms": terms, "max_terms": terms, "min_digits": 2, "max_digits": 2}
    made = reasoning_gym.create_dataset("chain_sum", size=count, seed=seed, **options)
    return [Example(({"role": "user", "content": item["question"]},), item["answer"], item["answer"]) for item in made]


def with_reasons(row: Example) -> Example:
    """The same question, answered by its running sums; the label stays the number."""
    terms = re.findall(r"[+-]?\s*\d+", row.text.rpartition(":")[2])
    values = [int(term.replace(" ", "")) for term in terms]
    total, lines = values[0], []
    for value in values[1:]:
        lines.append(f"{total} {'+' if value >= 0 else '-'} {abs(value)} = {total + value}")
        total += value
    return replace(row, answer="\n".join(lines))
