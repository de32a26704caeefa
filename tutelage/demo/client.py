"""A client of the gateway as a user's program would be: the official OpenAI client, and a user's word on a share of the answers.

It refuses to know who answers and what becomes of it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.demo.console import Stage
from tutelage.demo.traffic import Item
from tutelage.scoring import matches

FEEDBACK_SHARE = 0.5


@dataclass(frozen=True)
class Sent:
    """One request as its client saw it: the item, the reply's text and headers, the seconds until the whole of it was there; `text`
    None when nobody answered."""

    item: Item
    text: str | None
    headers: dict[str, str]
    seconds: float = 0.0

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")

    @property
    def correct(self) -> bool:
        return self.text is not None and matches(self.text, self.item.label)


async def send(
    url: str,
    key: str,
    items: Sequence[Item],
    stage: Stage,
    *,
    at_once: int,
    feedback_seed: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> list[Sent]:
    """Send the items in their order, `at_once` of them at a time; with a `feedback_seed`, say of a share of the answers whether they were
    right, and what would have been."""
    import httpx
    import openai

    gate, chance = asyncio.Semaphore(at_once), random.Random(feedback_seed)
    told = {i for i in range(len(items)) if feedback_seed is not None and chance.random() < FEEDBACK_SHARE}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=2, timeout=300) as client, httpx.AsyncClient() as http:

        async def one(index: int, item: Item) -> Sent:
            async with gate:
                sent = await _ask(client, item, headers or {})
                if index in told and sent.text is not None:
                    said = {"request_id": sent.request_id, "score": float(sent.correct), "label": item.label}
                    (await http.post(f"{url}/v1/feedback", json=said, headers={"authorization": f"Bearer {key}"})).raise_for_status()
            stage.advance()
            return sent

        return list(await asyncio.gather(*(one(i, item) for i, item in enumerate(items))))


async def _ask(client: Any, item: Item, headers: Mapping[str, str]) -> Sent:
    import openai

    started = time.perf_counter()
    try:
        raw = await client.chat.completions.with_raw_response.create(
            model="auto", messages=item.messages(), temperature=0, extra_headers=dict(headers)
        )
    except openai.APIStatusError as refused:
        return Sent(item, None, dict(refused.response.headers), time.perf_counter() - started)
    text = raw.parse().choices[0].message.content or ""
    return Sent(item, text, dict(raw.headers), time.perf_counter() - started)
