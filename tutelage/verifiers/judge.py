"""Ask another model which of two answers is better, for tasks that no program can verify.

Both orders are asked and a judge that changes its mind with the order has said nothing: a tie. A judge of the teacher's own family favours
its own kind of answer ("preference leakage"), so it is refused by name. It refuses to know how verdicts are counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import httpx

from tutelage.errors import ConfigInvalid, EngineFailed

CHOICE = re.compile(r"\b([AB])\b|\b(tie)\b", re.IGNORECASE)
QUESTION = (
    "Two answers to the same request are given. Which is better: right first, then clear, then short? Length alone is no merit.\n\n"
    "[Request]\n{prompt}\n\n[Answer A]\n{a}\n\n[Answer B]\n{b}\n\nReply with one word: A, B or tie."
)


class Judge(Protocol):
    """Whoever compares two answers."""

    def preference(self, prompt: str, answer: str, reference: str) -> float:
        """1: `answer` is better than `reference`; 0: worse; 0.5: a tie, or no consistent opinion."""
        ...


@dataclass(frozen=True)
class ModelJudge:
    """A model behind an OpenAI-compatible endpoint; `base_url` ends in /v1. `teacher` is the model whose answers it judges."""

    base_url: str
    model: str
    teacher: str
    api_key: str | None = None
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        if family(self.model) == family(self.teacher):
            raise ConfigInvalid(
                f"the judge {self.model!r} is of the family of the teacher {self.teacher!r} and would favour its kind of answer; "
                "name a judge of another family, or verify by program"
            )

    def preference(self, prompt: str, answer: str, reference: str) -> float:
        """Asks both orders. Raises EngineFailed when the endpoint fails."""
        first, second = self._asked(prompt, answer, reference), self._asked(prompt, reference, answer)
        if first == "A" and second == "B":
            return 1.0
        if first == "B" and second == "A":
            return 0.0
        return 0.5

    def _asked(self, prompt: str, a: str, b: str) -> str:
        message = {"role": "user", "content": QUESTION.format(prompt=prompt, a=a, b=b)}
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        body = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": 4}
        try:
            reply = httpx.post(f"{self.base_url.rstrip('/')}/chat/completions", json=body, headers=headers, timeout=self.timeout_seconds)
            reply.raise_for_status()
            text = str(reply.json()["choices"][0]["message"]["content"])
        except (httpx.HTTPError, KeyError, IndexError, ValueError) as broken:
            raise EngineFailed(
                f"the judge {self.model} at {self.base_url} did not answer ({broken!r}); check the endpoint and its key"
            ) from broken
        found = CHOICE.search(text)
        return found[1].upper() if found and found[1] else "tie"


def family(model: str) -> str:
    """The first word of a model's name without its owner: gpt-4o and openai/gpt-4o-mini are of one family."""
    return re.split(r"[-_.:\d]", model.rsplit("/", 1)[-1].casefold(), maxsplit=1)[0]
