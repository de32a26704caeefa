"""What a demo's teacher says: the right answer, or on a known share of prompts the right answer to another prompt of the same task.

Seeded, and the same for every repeat of a prompt, as a file of recorded answers is. It refuses to know who asks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tutelage.demo.traffic import Item
from tutelage.scoring import matches


def write(items: Sequence[Item], target: Path, *, error_rate: float = 0.0, seed: int = 0) -> None:
    """The recording as the gateway reads it: a JSON line of messages and answer for each item."""
    with target.open("w", encoding="utf-8") as file:
        for item, answer in zip(items, answers(items, error_rate=error_rate, seed=seed), strict=True):
            file.write(json.dumps({"messages": item.messages(), "answer": answer}, ensure_ascii=False) + "\n")


def answers(items: Sequence[Item], *, error_rate: float, seed: int) -> list[str]:
    """What the teacher answers to each item; of a task whose labels are all the same every answer is right."""
    labels: dict[str, set[str]] = {}
    for item in items:
        labels.setdefault(item.task, set()).add(item.label)
    choices = {task: sorted(names) for task, names in labels.items()}
    return [_answer(item, choices[item.task], error_rate, seed) for item in items]


def _answer(item: Item, choices: Sequence[str], error_rate: float, seed: int) -> str:
    """Drawn by the prompt's hash: neither the order nor the number of prompts changes which are answered wrongly."""
    drawn = hashlib.sha256(f"{seed} {item.key}".encode()).digest()
    if int.from_bytes(drawn[:8]) >= error_rate * 2**64:
        return item.label
    wrong = [label for label in choices if not matches(label, item.label)]
    return wrong[int.from_bytes(drawn[8:16]) % len(wrong)] if wrong else item.label
