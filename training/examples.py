"""One row of training or evaluation data: a conversation, the answer to learn and the label to judge by.

Knows the two JSONL shapes of the contract and how prompts are told apart. It refuses to know tokens and splits.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage.errors import TrafficUnreadable

# What each strategy takes from a row beside its answer.
ASPECTS = {
    "response": frozenset[str](),
    "soft-targets": frozenset({"targets"}),
    "reasoning": frozenset({"rationale"}),
    "metric-aware": frozenset({"weight", "rejected"}),
    "multi-aspect": frozenset({"targets", "rationale", "weight", "rejected"}),
}
EXPECTED = 'expected {"prompt": text, "label": text} or {"messages": [{"role", "content"}, …, {"role": "assistant", "content"}]}'


@dataclass(frozen=True)
class Example:
    """`prompt` ends with a user's turn; `answer` is what a student learns to say, `label` what an answer is judged by.

    Distilled rows may carry more: `weight` of their loss, `rationale` for the answer, a teacher's `targets` for its tokens, and a
    worse answer that was `rejected`.
    """

    prompt: tuple[dict[str, str], ...]
    answer: str
    label: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    rationale: str | None = None
    targets: Mapping[str, Any] | None = None
    rejected: str | None = None

    @property
    def text(self) -> str:
        """The last user message, for people who read a report."""
        return self.prompt[-1]["content"]

    @property
    def facts(self) -> dict[str, Any]:
        """What a verifier may look at beside answer and label."""
        return {**self.metadata, "prompt": self.text}

    def row(self) -> dict[str, Any]:
        """The example as a JSONL object that `parse` reads back."""
        answered = [*self.prompt, {"role": "assistant", "content": self.answer}]
        row = {"messages": answered, "label": self.label, "metadata": dict(self.metadata)}
        extra = {
            "rationale": self.rationale,
            "targets": self.targets,
            "chosen": self.answer if self.rejected else None,
            "rejected": self.rejected,
        }
        row |= {name: value for name, value in extra.items() if value is not None}
        return row | ({"weight": self.weight} if self.weight != 1 else {})


def read(file: Path) -> list[Example]:
    """All examples of a JSONL file; blank lines are skipped.

    Raises:
        TrafficUnreadable: the file is missing or empty, or a line is not an example; the message names the line.
    """
    examples = []
    for number, line in lines(file):
        try:
            examples.append(parse(line))
        except TrafficUnreadable as broken:
            raise TrafficUnreadable(f"{file} line {number}: {broken.message}") from broken
    if not examples:
        raise TrafficUnreadable(f"{file} holds no rows; {EXPECTED}, one object a line")
    return examples


def lines(file: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their 1-based numbers. Raises TrafficUnreadable unless it is UTF-8 text."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as broken:
        raise TrafficUnreadable(f"cannot read {file} as UTF-8 text ({broken}); pass a JSONL file") from broken
    # not splitlines: a JSON string may hold U+2028, which ends no line of JSONL
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def parse(line: str) -> Example:
    """One JSONL line as an example. Raises TrafficUnreadable saying what is wrong and what is expected."""
    try:
        row = json.loads(line)
    except ValueError as broken:
        raise TrafficUnreadable(f"not JSON ({broken}); {EXPECTED}") from broken
    if not isinstance(row, dict):
        raise TrafficUnreadable(f"a JSON {type(row).__name__}, not an object; {EXPECTED}")
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise TrafficUnreadable(f"metadata is a {type(metadata).__name__}, not an object; leave it out or write an object")
    messages, answer = _conversation(row)
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if (chosen is None) != (rejected is None):
        raise TrafficUnreadable("chosen and rejected come together; write both or neither")
    answer = answer if chosen is None else chosen
    label = row.get("label", metadata.get("label"))
    label = answer if label is None else label
    answer = label if answer is None else answer
    if not isinstance(label, str) or not isinstance(answer, str) or not answer.strip() or not label.strip():
        raise TrafficUnreadable(f"no answer and no label as non-empty text; {EXPECTED}")
    try:
        json.dumps([messages, answer, label, metadata, row.get("rationale"), rejected], ensure_ascii=False).encode()
    except UnicodeEncodeError as broken:
        raise TrafficUnreadable(f"text that is no valid Unicode ({broken.reason}); {EXPECTED}") from broken
    return Example(tuple(messages), answer, label, metadata, _weight(row), _text(row, "rationale"), _targets(row), rejected)


def prompt_key(prompt: tuple[dict[str, str], ...]) -> str:
    """Sha256 (hex) of a prompt whose case, spacing and width of letters are ignored: equal keys are one prompt."""
    folded = [[m["role"], " ".join(unicodedata.normalize("NFKC", m["content"]).casefold().split())] for m in prompt]
    return hashlib.sha256(json.dumps(folded, ensure_ascii=False).encode()).hexdigest()


def _conversation(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], str | None]:
    """Messages up to the last user turn, and the assistant's answer if it is there."""
    if "messages" not in row:
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise TrafficUnreadable(f"no messages, and prompt is {type(prompt).__name__} or empty; {EXPECTED}")
        return [{"role": "user", "content": prompt}], None
    messages = row["messages"]
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        raise TrafficUnreadable(f"messages must be a list of role and content, both text; {EXPECTED}")
    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    answer = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
    if not turns or turns[-1]["role"] != "user":
        raise TrafficUnreadable(f"the conversation has no user message before its end; {EXPECTED}")
    return turns, answer


def _text(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise TrafficUnreadable(f"{name} is {value!r:.40}; leave it out or write text")
    return value


def _weight(row: Mapping[str, Any]) -> float:
    value = row.get("weight", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise TrafficUnreadable(f"weight is {value!r:.40}; leave it out or write a number above 0")
    return float(value)


def _targets(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    value = row.get("targets")
    if value is not None and not isinstance(value, dict):
        raise TrafficUnreadable(f"targets is a {type(value).__name__}, not an object; leave it out when the teacher gave no probabilities")
    return value


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
