"""Asking the configured judge which of two answers is better, both ways round. Off by default. It refuses to know the verdict's rule
(`routing/judge.py`) and what becomes of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from tutelage.errors import ConfigInvalid, TutelageError
from tutelage.fleet.backends import Answer
from tutelage.gateway import openai
from tutelage.gateway.models import Models
from tutelage.records import Attempt
from tutelage.routing import judge
from tutelage.routing.votes import Agreed
from tutelage.settings import RoutingSettings

log = logging.getLogger(__name__)


class Judging:
    """The judge of one worker; `change` when its configuration does. Raises ConfigInvalid for one that models.yaml does not name."""

    def __init__(self, models: Models, routing: RoutingSettings) -> None:
        self.change(models, routing)

    def change(self, models: Models, routing: RoutingSettings) -> None:
        if routing.judge is not None and routing.judge.model not in models.by_name:
            known = ", ".join(models.by_name) or "none"
            raise ConfigInvalid(f"routing.yaml: judge: model {routing.judge.model!r} is not in models.yaml; there are: {known}")
        self._models, self._settings = models, routing.judge

    @property
    def able(self) -> bool:
        return self._settings is not None

    async def compare(self, prompt: str, mine: str, other: str) -> tuple[judge.Verdict, list[tuple[Answer, str]]]:
        """The verdict on `mine` against `other`, and what the judge said, with its name, for the bill. A judge that fails finds no
        difference."""
        if self._settings is None:
            return judge.Verdict("tie", "no judge is configured"), []
        said = await asyncio.gather(self._ask(prompt, mine, other), self._ask(prompt, other, mine))
        straight, swapped = (None if answer is None else judge.read(answer.text) for answer in said)
        return judge.combine(straight, swapped), [(answer, self._settings.model) for answer in said if answer is not None]

    async def best(self, request: openai.Chat, texts: Sequence[str], agreed: Agreed) -> tuple[Agreed, list[Attempt]]:
        """The answer that the judge prefers to the one agreed on, challenged by each other in turn; and what judging took."""
        if self._settings is None:
            return agreed, []
        index, cost = agreed.index, 0
        for place, text in enumerate(texts):
            if place == agreed.index:
                continue
            verdict, asking = await self.compare(request.prompt, text, texts[index])
            cost += sum(round(answer.cost_usd * 1e6) for answer, _ in asking)
            index = place if verdict.verdict == "win" else index
        reason = f"no two of {len(texts)} answers agree: {self._settings.model} judged them"
        tried = Attempt(self._settings.model, "teacher", None, "", None, None, False, "judged the answers", cost)
        return Agreed(index, 1, reason), [tried]

    async def _ask(self, prompt: str, first: str, second: str) -> Answer | None:
        assert self._settings is not None
        body = {"messages": judge.question(prompt, first, second), "temperature": 0, "max_tokens": 16}
        try:
            return await self._models.by_name[self._settings.model][1].complete(body)
        except TutelageError as failed:
            log.warning("the judge did not answer: %s", failed)
            return None
