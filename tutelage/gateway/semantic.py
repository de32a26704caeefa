"""The second level of the cache: answers to questions that mean the same. Near questions of the same tenant and context are found by their
embeddings, verified, and served where the tenant's own re-verifications show that its error budget is kept. Everything else is a miss.

An answer itself is always taken from the exact cache, so tenant, lineage, expiry and size are held there. It refuses to know how questions
are compared (`routing/equivalence.py`, `routing/pairs.py`) and how much evidence is enough (`routing/budget.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from cachetools import LRUCache

from tutelage.gateway.cache import Cache, CacheKey, Entry, Servable
from tutelage.gateway.exchange import Asked
from tutelage.gateway.freshness import freshness
from tutelage.gateway.neighbours import Kept, Neighbours
from tutelage.routing import pairs
from tutelage.routing.agreement import agree
from tutelage.routing.budget import LEVELS, NEWEST, Allowance, Label, allowance
from tutelage.routing.equivalence import Question
from tutelage.routing.pairs import Classifier, Verdict
from tutelage.stores import labels
from tutelage.stores.labels import PairLabel
from tutelage.tasks import end
from tutelage.telemetry import Metrics

if TYPE_CHECKING:
    from tutelage.fleet.backends import Answer
    from tutelage.routing.encoder import Encoder
    from tutelage.settings import GatewaySettings
    from tutelage.stores.database import Pool

log = logging.getLogger(__name__)

LEAST_COSINE = 0.6  # further questions are not looked at
CANDIDATES = 4
AT_ONCE = 4  # look-ups that encode at the same time; whoever comes then is not looked up
MOST_WAITING = 512  # questions to be remembered
BATCH = 16
REST = 4  # times as long as remembering took: a fifth of a core at most
PATIENCE = 64  # look-ups in a row that found nothing like it; then only one in PATIENCE / 4 is made
LEARN_AGAIN = 1.25  # times as many labels as the classifier learned from

# who asks what, the kept answer, the fresh answer: is the kept one as good?
Judge = Callable[[Asked, str, str, str], Awaitable[bool]]


class Near(NamedTuple):
    """A kept answer to a question that means the same. `served` or else only compared with what the model says now."""

    entry: Entry
    probability: float
    traits: tuple[float, ...]
    question: str
    served: bool
    reason: str


class Semantic:
    """Of one worker. `statistics` counts by tenant what became of look-ups."""

    def __init__(
        self,
        cache: Cache,
        encoder: Encoder,
        pool: Pool,
        *,
        metrics: Metrics,
        secret: bytes,
        settings: Callable[[], GatewaySettings],
        tenants: int,
        erasures: Callable[[str], int],
        judge: Judge | None = None,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._cache, self._encoder, self._pool, self._metrics = cache, encoder, pool, metrics
        self._secret = hashlib.blake2b(secret, digest_size=32, person=b"context").digest()
        self._settings, self._clock, self._chance = settings, clock, chance
        self._judge, self._erasures = judge, erasures
        self._tenants: LRUCache[str, _Tenant] = LRUCache(tenants)
        self._waiting: deque[Kept] = deque(maxlen=MOST_WAITING)
        self._work = asyncio.Event()
        self._looking = 0
        self._seen = 0  # the newest label that was read
        self._tasks: set[asyncio.Task[None]] = set()
        self.statistics: dict[str, Counter[str]] = {}

    # --- what a request asks of it --------------------------------------------------------------------------------------

    def question(self, asked: Asked, policy: str) -> Question | None:
        """What is compared: the last message's text, and a digest of all else that shapes the answer. None where paraphrases are not looked
        for: switched off, or the last message is not simply a user's text."""
        settings, request = self._settings(), asked.request
        last = request.messages[-1]
        if not settings.semantic_cache or settings.bare or self._budget(asked) <= 0:
            return None
        if last.get("role") != "user" or not isinstance(last.get("content"), str):
            return None
        rest = {**request.shape, "messages": [*request.messages[:-1], {**last, "content": None}]}
        material = orjson.dumps([asked.caller.tenant_id, policy, rest], option=orjson.OPT_SORT_KEYS)
        return Question(last["content"], hashlib.blake2b(material, key=self._secret, digest_size=16).hexdigest())

    async def find(self, asked: Asked, question: Question, *, servable: Servable) -> Near | None:
        """A kept answer to the same question in other words, to be served or only to be compared with."""
        tenant = self._tenant(asked.caller.tenant_id)
        if not tenant.neighbours.knows(question.context) or self._looking >= AT_ONCE or tenant.tired():
            return None
        if not freshness(question.text, default_seconds=1).seconds:
            return None
        self._looking += 1
        try:
            verdicts = await asyncio.to_thread(self._look, tenant, question)
        finally:
            self._looking -= 1
        return await self._best(asked, question, tenant, verdicts, servable)

    def keep(self, question: Question, place: CacheKey, entry: Entry) -> None:
        """Remember the question of an answer that was kept; soon, nobody waits."""
        self._waiting.append(Kept(question, place, entry.expires_at))
        self._work.set()

    def compare(self, asked: Asked, near: Near, answer: Answer) -> None:
        """The model was asked all the same: was the kept answer right? Nobody waits."""
        if answer.finish_reason == "stop":
            self._spawn(self._compare(asked, near, answer.text))

    def allowance(self, tenant_id: str, *, budget: float) -> Allowance:
        """From which probability on this tenant's paraphrases are served now, and why."""
        return self._tenant(tenant_id).allowance(budget)

    # --- looking --------------------------------------------------------------------------------------------------------

    def _look(self, tenant: _Tenant, question: Question) -> list[tuple[Kept, Verdict]]:
        """In a thread: the encoder and the index compute without the interpreter's lock."""
        embedding = self._encoder.encode([question.text])[0]
        near = [
            (kept, cosine)
            for kept, cosine in tenant.neighbours.near(embedding, question.context, most=CANDIDATES)
            if cosine >= LEAST_COSINE
        ]
        known = [(kept.question, cosine) for kept, cosine in near]
        verdicts = pairs.verify(question, known, tenant.classifier, reader=self._encoder, least=min(LEVELS))
        return [(kept, verdict) for (kept, _), verdict in zip(near, verdicts, strict=True)]

    async def _best(
        self, asked: Asked, question: Question, tenant: _Tenant, verdicts: list[tuple[Kept, Verdict]], servable: Servable
    ) -> Near | None:
        found: list[tuple[Entry, Verdict]] = []
        for kept, verdict in verdicts:
            if verdict.difference is not None:
                self._count(tenant, f"rejected-{verdict.difference.guard}")
            elif (entry := await self._cache.find(kept.place, servable=servable, counted=False)) is None:
                tenant.neighbours.drop(kept.place)
                self._count(tenant, "stale")
            else:
                found.append((entry, verdict))
        stated = pairs.exclusive([verdict.probability for _, verdict in found], [kept_text(entry.body) for entry, _ in found])
        probability = max(stated, default=0.0)
        if probability < min(LEVELS):
            if found:
                self._count(tenant, "rejected-probability")
            tenant.fruitless += 1
            return None
        tenant.fruitless = 0
        entry, verdict = found[stated.index(probability)]
        allowed = tenant.allowance(self._budget(asked))
        sure = allowed.least is not None and probability >= allowed.least
        served = sure and self._chance() >= self._settings().semantic_shadow
        self._count(tenant, "hit" if served else "shadow" if sure else "unsure")
        reason = f"the same question with probability {probability:.3f}; {allowed.reason}"
        return Near(entry, probability, verdict.traits, question.text, served, reason)

    async def _compare(self, asked: Asked, near: Near, fresh: str) -> None:
        """What says the same is right; the judge that strategies go by decides on the rest, where there is one."""
        tenant_id, kept = asked.caller.tenant_id, kept_text(near.entry.body)
        right = await self._agrees(kept, fresh)
        if not right and self._judge is not None:
            right = bool(await self._judge(asked, near.question, kept, fresh))
        self._count(self._tenant(tenant_id), "verified-right" if right else "verified-wrong")
        await labels.add(self._pool, [PairLabel(tenant_id, near.probability, right, near.traits)])

    async def _agrees(self, kept: str, fresh: str) -> bool:
        def judged() -> bool:
            one, other = self._encoder.encode([kept, fresh])
            return agree(kept, fresh, cosine=float(one @ other)).same

        return await asyncio.to_thread(judged)

    def _budget(self, asked: Asked) -> float:
        own = asked.caller.semantic_error_budget
        return self._settings().semantic_error_budget if own is None else own

    # --- in the background ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._spawn(self._remember())
        self._spawn(self._refresh())

    async def stop(self) -> None:
        await asyncio.gather(*(end(task) for task in [*self._tasks]))

    async def _remember(self) -> None:
        """Encode questions of answers that were kept, a few at a time, and rest in between: answering goes first."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                began = time.monotonic()
                try:
                    embeddings = await asyncio.to_thread(self._encoder.encode, [kept.question.text for kept in batch])
                    for number, kept in enumerate(batch):
                        self._tenant(kept.place.tenant_id).neighbours.add([kept], embeddings[number : number + 1])
                except Exception as failed:  # a question that is not remembered is a miss
                    log.warning("questions not remembered: %r", failed)
                await asyncio.sleep(REST * (time.monotonic() - began))

    async def _refresh(self) -> None:
        """What other workers kept and what shadows said, and forgetting what has expired."""
        while True:
            try:
                await self._read_labels()
                for tenant_id, tenant in [*self._tenants.items()]:
                    tenant.neighbours.expire(self._clock())
                    await self._erase(tenant_id, tenant)
                    await self._read_kept(tenant_id, tenant)
                    await self._learn(tenant)
            except Exception as failed:  # a lost database must not end it: what is known stays
                log.warning("the semantic cache was not refreshed: %r", failed)
            await asyncio.sleep(self._settings().semantic_seconds)

    async def _read_labels(self) -> None:
        """Labels of tenants that this worker does not know are read when it meets them."""
        self._seen, found = await labels.read(self._pool, after=self._seen, newest=NEWEST)
        for label in found:
            self._tenant(label.tenant_id).labelled(label)
        for tenant_id in {label.tenant_id for label in found}:
            await labels.forget(self._pool, tenant_id, newest=NEWEST)

    async def _read_kept(self, tenant_id: str, tenant: _Tenant) -> None:
        found = await self._cache.kept_since(tenant_id, tenant.kept_until, most=MOST_WAITING)
        for place, entry, at in found:
            tenant.kept_until = at
            if entry.question is not None and place not in tenant.neighbours:
                self.keep(Question(entry.question, entry.context), place, entry)

    async def _erase(self, tenant_id: str, tenant: _Tenant) -> None:
        """No text from before an erasure stays."""
        if tenant.erasures != (now := self._erasures(tenant_id)):
            tenant.erasures, tenant.neighbours, tenant.kept_until = now, self._neighbours(), 0.0
            self._waiting = deque((kept for kept in self._waiting if kept.place.tenant_id != tenant_id), MOST_WAITING)
            await self._cache.clear(tenant_id)

    async def _learn(self, tenant: _Tenant) -> None:
        if tenant.unlearned < pairs.LEAST_LABELS or tenant.unlearned < len(tenant.labels) * (1 - 1 / LEARN_AGAIN):
            return
        tenant.unlearned = 0
        tenant.classifier = await asyncio.to_thread(_fitted, [*tenant.labels])

    def _tenant(self, tenant_id: str) -> _Tenant:
        known = self._tenants.get(tenant_id)
        if known is None:
            known = self._tenants[tenant_id] = _Tenant(tenant_id, self._neighbours(), self._erasures(tenant_id))
        return known

    def _neighbours(self) -> Neighbours:
        return Neighbours(self._encoder.dimension, self._settings().semantic_questions)

    def _count(self, tenant: _Tenant, what: str) -> None:
        self.statistics.setdefault(tenant.id, Counter())[what] += 1
        self._metrics.semantic.labels(what).inc()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Tenant:
    """What a worker knows of one tenant's questions."""

    def __init__(self, tenant_id: str, neighbours: Neighbours, erasures: int) -> None:
        self.id, self.neighbours, self.erasures = tenant_id, neighbours, erasures
        self.labels: deque[PairLabel] = deque(maxlen=NEWEST)
        self.unlearned = 0
        self.classifier: Classifier = pairs.Unfitted()
        self.kept_until = 0.0
        self.fruitless = 0
        self._allowances: dict[float, Allowance] = {}

    def labelled(self, label: PairLabel) -> None:
        self.labels.append(label)
        self.unlearned += 1
        self._allowances.clear()

    def allowance(self, budget: float) -> Allowance:
        known = self._allowances.get(budget)
        if known is None:
            known = allowance([Label(label.probability, label.right) for label in self.labels], budget=budget)
            self._allowances = {budget: known}
        return known

    def tired(self) -> bool:
        """Whether to pass this one over: nothing like the last questions was ever asked before."""
        if self.fruitless < PATIENCE:
            return False
        self.fruitless += 1
        return self.fruitless % (PATIENCE // 4) != 0


def kept_text(body: dict[str, Any]) -> str:
    """What a kept answer says."""
    return str((body["choices"][0]["message"].get("content")) or "")


def _fitted(known: list[PairLabel]) -> Classifier:
    import numpy as np

    same = [label for label in known if len(label.traits) == len(pairs.TRAITS)]  # others are of another version of this program
    traits = np.array([label.traits for label in same]).reshape(len(same), len(pairs.TRAITS))
    return pairs.fit(traits, np.array([label.right for label in same], dtype=bool), seed=0)


async def _logged(work: Any) -> None:
    try:
        await work
    except asyncio.CancelledError:
        raise
    except Exception as failed:  # nobody waits for it
        log.warning("the semantic cache: %r", failed)
