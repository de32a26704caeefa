"""What a worker recalls for requests of domains that the gap ledger calls knowledge: accepted answers to similar earlier requests, one
index a tenant and domain, in memory, the newest only.

It refuses to know who is asked with them in context (`routing/strategies.py`) and what makes a domain one of knowledge.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tutelage.evolution.evidence import Tally
from tutelage.gateway.exchange import Asked, Known
from tutelage.routing.promises import RISK, lower_bound
from tutelage.routing.recall import Recall, Recalled
from tutelage.settings import RoutingSettings
from tutelage.stores import answers
from tutelage.stores.database import Pool
from tutelage.tasks import end

log = logging.getLogger(__name__)

MOST_CHARACTERS = 4_000  # of a question and its answer: longer ones are no facts, and context is paid for


@dataclass(frozen=True)
class Shelf:
    """One domain's index. `assured`: how often the answer to the most similar request surely is right. `erasures`: the tenant's, when this
    was read: what was erased since must not be said again."""

    index: Recall
    assured: float
    erasures: int


@dataclass
class Recalling:
    """Keeps the shelves as the ledger says, reading them again every `recall_seconds`; requests use what is held meanwhile."""

    pool: Pool
    routing: Callable[[], RoutingSettings]
    erasures: Callable[[str], int]
    shelves: dict[tuple[str, str], Shelf] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None

    def find(self, asked: Asked, domain: str | None, embedding: Any) -> Known | None:
        """What is on record of the most similar requests; None where that is nothing."""
        shelf = self.shelves.get((asked.caller.tenant_id, domain or ""))
        if shelf is None or shelf.erasures != asked.caller.erasures or not self.routing().recall:
            return None
        found = shelf.index.nearest(embedding, least=self.routing().recall_similarity)
        return Known(tuple(found), shelf.assured) if found else None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await end(self._task)

    async def look(self) -> None:
        """Read every shelf again, let go those whose domain is no longer one of knowledge."""
        ledger = await answers.knowledge(self.pool) if self.routing().recall else {}
        wanted = {(tenant_id, domain): tally for tenant_id, told in ledger.items() for domain, tally in told.items()}
        for place in self.shelves.keys() - wanted.keys():
            del self.shelves[place]
        for place, tally in wanted.items():
            erasures = self.erasures(place[0])  # before the rows: an erasure meanwhile makes them useless
            rows = await answers.accepted(self.pool, *place, limit=self.routing().recall_answers)
            self.shelves[place] = await asyncio.to_thread(_shelf, rows, tally, erasures)

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception as failed:  # what is held serves until the next look
                log.warning("earlier answers not read: %r", failed)
            await asyncio.sleep(self.routing().recall_seconds)


def _shelf(rows: Sequence[dict[str, Any]], tally: Tally, erasures: int) -> Shelf:
    import numpy as np

    told = [(Recalled(_question(row["messages"]), row["answer"]), row["embedding"]) for row in rows]
    short = [(recalled, vector) for recalled, vector in told if len(recalled.prompt) + len(recalled.answer) <= MOST_CHARACTERS]
    vectors = np.stack([np.frombuffer(vector, "f4") for _, vector in short]) if short else np.zeros((0, 1), "f4")
    assured = lower_bound(tally.wins / tally.n, tally.n, risk=RISK) if tally.n else 0.0
    return Shelf(Recall([recalled for recalled, _ in short], vectors), assured, erasures)


def _question(messages: Sequence[dict[str, Any]]) -> str:
    """The last user message, which is what the embedding is of."""
    texts = [message.get("content") for message in messages if message["role"] == "user"]
    content = texts[-1] if texts else ""
    return content if isinstance(content, str) else "\n".join(part.get("text") or "" for part in content or ())
