"""A judging model's word on an answer, for tasks that no program can verify: asked over HTTP, both ways round.

What it is asked and what its words amount to are `tutelage.routing.judge`'s rules. It refuses to know how verdicts are counted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import httpx

from tutelage.errors import ConfigInvalid, EngineFailed
from tutelage.routing import judge
from tutelage.settings import JudgedBySettings
from tutelage.verifiers.rules import Verdict, Verifier


class ModelJudge:
    """The judge that `settings` name. Raises ConfigInvalid where its key is not in the environment."""

    def __init__(self, settings: JudgedBySettings) -> None:
        self._settings = settings
        self._headers: dict[str, str] = {}
        if settings.api_key_env is not None:
            key = os.environ.get(settings.api_key_env)
            if not key:
                raise ConfigInvalid(f"the judge's key is expected in ${settings.api_key_env}, which is not set; export it")
            self._headers["authorization"] = f"Bearer {key}"

    def compare(self, prompt: str, answer: str, reference: str) -> judge.Verdict:
        """The verdict on `answer` against `reference`. Raises EngineFailed when the judge does not answer."""
        straight, swapped = self._asked(prompt, answer, reference), self._asked(prompt, reference, answer)
        return judge.combine(straight, swapped)

    def _asked(self, prompt: str, first: str, second: str) -> judge.Said | None:
        settings = self._settings
        body = {"model": settings.model, "messages": judge.question(prompt, first, second), "temperature": 0, "max_tokens": 8}
        try:
            reply = httpx.post(
                f"{settings.base_url.rstrip('/')}/chat/completions", json=body, headers=self._headers, timeout=settings.timeout_seconds
            )
            reply.raise_for_status()
            text = str(reply.json()["choices"][0]["message"]["content"])
        except (httpx.HTTPError, KeyError, IndexError, ValueError) as broken:
            raise EngineFailed(
                f"the judge {settings.model} at {settings.base_url} did not answer ({broken!r}); check the endpoint and its key"
            ) from broken
        return judge.read(text)


def judged(verify: Verifier, by: ModelJudge) -> Verifier:
    """`verify`, and of an answer that it does not find right what the judge says: right when it prefers the answer to the label or finds
    both equal, asked both ways round; a preference that turns with the places is none. The row's `prompt` is what was asked."""

    def check(answer: str, label: str, row: Mapping[str, Any]) -> Verdict:
        verdict = verify(answer, label, row)
        if verdict.right or not answer.strip():
            return verdict
        found = by.compare(str(row["prompt"]), answer, label)
        right = found.verdict == "win" or found.reason == judge.EQUAL
        return Verdict(float(right), right, found.reason)

    return check
