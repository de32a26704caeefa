"""Who answers a prompt, and asking them: its place in the tenant's traffic, the student that may try, the teachers behind it.

It refuses to know who asks, what is cached and what is recorded.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tutelage.errors import BackendFailed, BackendRefused, ModelNotFound, Unavailable
from tutelage.fleet.backends import Answer, Backend
from tutelage.gateway import openai
from tutelage.gateway.exchange import Asked, Outcome, Placed
from tutelage.gateway.snapshot import TenantView, lineage_of
from tutelage.records import Attempt, Tier
from tutelage.routing.confidence import score
from tutelage.routing.encoder import Encoder
from tutelage.routing.policy import StudentSnapshot, accept, choose_student
from tutelage.settings import ModelEntry, Price, RoutingSettings
from tutelage.telemetry import Metrics

log = logging.getLogger(__name__)

TIERS: tuple[Tier, ...] = ("student", "ta", "teacher")


@dataclass(frozen=True)
class Models:
    """The backends of models.yaml, in their order, and the local tier's clients by adapter name."""

    configured: tuple[tuple[ModelEntry, Backend], ...]
    adapter: Callable[[str], Backend]

    @cached_property
    def lineages(self) -> dict[str, str]:
        """What names each configured model and all that makes it answer as it does; by its name."""
        return {entry.name: _lineage(entry) for entry, _ in self.configured}

    @cached_property
    def _without_fallbacks(self) -> set[str]:
        return {entry.name for entry, _ in self.configured if not entry.fallbacks}

    @cached_property
    def dearest(self) -> Price:
        """The highest price of a token in and of one out, of all models that may answer."""
        prices = [entry.price for entry, _ in self.configured if entry.price is not None]
        return Price(
            input_per_mtok=max((price.input_per_mtok for price in prices), default=0.0),
            output_per_mtok=max((price.output_per_mtok for price in prices), default=0.0),
        )

    def teachers(self, domain: str | None) -> list[Backend]:
        """Those that name the domain first, then those that answer anything."""
        teachers = [(entry, backend) for entry, backend in self.configured if entry.tier == "teacher"]
        own = [backend for entry, backend in teachers if domain is not None and domain in entry.domains]
        return own + [backend for entry, backend in teachers if not entry.domains]

    @cached_property
    def by_name(self) -> dict[str, tuple[ModelEntry, Backend]]:
        return {entry.name: (entry, backend) for entry, backend in self.configured}

    def chain(self, first: Sequence[Backend]) -> list[Backend]:
        """Who is asked in turn: these models, then the fallbacks of each, then theirs; nobody twice."""
        if len(first) == 1 and first[0].name in self._without_fallbacks:
            return list(first)
        found = {backend.name: backend for backend in first}
        ahead = deque(found)
        while ahead:
            entry, _ = self.by_name.get(ahead.popleft(), (None, None))
            for name in entry.fallbacks if entry is not None else ():
                if name not in found:
                    found[name] = self.by_name[name][1]
                    ahead.append(name)
        return list(found.values())


@dataclass(frozen=True)
class Alone:
    """The one model that answers without being judged."""

    tier: Tier
    backend: Backend
    route: str
    reason: str
    lineage: str


class Dispatch:
    """Finds who answers and asks them. `models` and `routing` may be replaced while requests run (`change`)."""

    def __init__(self, encoder: Encoder, *, models: Models, routing: RoutingSettings, metrics: Metrics) -> None:
        self._encoder = encoder
        self._models = models
        self._routing = routing
        self._metrics = metrics

    def change(self, models: Models, routing: RoutingSettings) -> None:
        self._models, self._routing = models, routing

    @property
    def models(self) -> Models:
        return self._models

    async def place(self, asked: Asked, view: TenantView) -> Placed:
        given = asked.given_domain
        if view.index is None:
            return Placed(given, None, "no domains yet")
        # the encoder computes without the interpreter's lock; a thread keeps the event loop answering
        embedding = (await asyncio.to_thread(self._encoder.encode, [asked.request.prompt]))[0]
        if given:
            return Placed(given, embedding.tobytes(), "the client named the domain")
        assignment = view.index.assign(embedding)
        return Placed(assignment.domain, embedding.tobytes(), assignment.reason)

    def alone(self, request: openai.Chat, view: TenantView, placed: Placed) -> Alone | None:
        """The one model that answers without being judged: the one asked for, or the teacher where no student can try.

        Raises:
            ModelNotFound: none has this name.
        """
        if request.model == "auto":
            choice = choose_student(placed.domain, view.students, quality_floor=self._routing.threshold)
            teachers = self._models.teachers(placed.domain) if choice.student is None else []
            return self._configured("teacher", teachers[0], "always-teacher", choice.reason) if teachers else None
        if request.model in TIERS:
            return self._of_tier(request.model, view, placed)
        named = self._models.by_name.get(request.model)
        if named is not None:
            return self._configured(named[0].tier, named[1], "direct", "the client named the model")
        for student in view.students:
            if request.model in (student.name, view.adapters[student.name]):
                backend = self._models.adapter(view.adapters[student.name])
                return Alone(student.tier, backend, "direct", "the client named the student", lineage_of(student))
        known = ["auto", *TIERS, *(entry.name for entry, _ in self._models.configured), *(s.name for s in view.students)]
        raise ModelNotFound(f"model {request.model!r} does not exist here; available: {', '.join(known)}", param="model")

    def _configured(self, tier: Tier, backend: Backend, route: str, reason: str) -> Alone:
        return Alone(tier, backend, route, reason, self._models.lineages.get(backend.name, ""))

    def lineage(self, name: str, alone: Alone) -> str:
        """Of the answer that model `name` gave in the place of `alone`: itself, or one of its fallbacks."""
        return alone.lineage if name == alone.backend.name else self._models.lineages.get(name, "")

    def live(self, view: TenantView) -> frozenset[str]:
        """The lineages whose answers may be given again."""
        return view.lineages.union(self._models.lineages.values())

    def policy(self, model: str) -> str:
        """What decides who answers, beside the models themselves: the same question under another policy is another one."""
        routing = self._routing
        return f"{routing.threshold}:{routing.max_student_tokens}" if model == "auto" else ""

    def _of_tier(self, tier: Tier, view: TenantView, placed: Placed) -> Alone:
        for student in view.students:
            if student.tier == tier and student.domain == placed.domain:
                backend = self._models.adapter(view.adapters[student.name])
                return Alone(tier, backend, "direct", "the client named the tier", lineage_of(student))
        teachers = self._models.teachers(placed.domain) if tier == "teacher" else []
        if not teachers:
            raise ModelNotFound(f"no {tier} answers domain {placed.domain or 'unknown'!r} yet; use model 'auto'", param="model")
        return self._configured(tier, teachers[0], "direct", "the client named the tier")

    async def ask(self, request: openai.Chat, view: TenantView, placed: Placed) -> Outcome:
        """The model asked for, or the domain's student and behind it the teachers.

        Raises:
            ModelNotFound, BackendRefused: it cannot be answered as it is.
            Unavailable: nobody can answer it now.
        """
        alone = self.alone(request, view, placed)
        if alone is not None and request.model != "auto":
            answer, name = await self._first_answer(request, self._models.chain([alone.backend]))
            return Outcome(answer, name, alone.tier, alone.route, _told(alone, name), lineage=self.lineage(name, alone))
        choice = choose_student(placed.domain, view.students, quality_floor=self._routing.threshold)
        tried = await self._try_student(request, view, choice.student) if choice.student else None
        if tried is not None and tried.attempts[0].accepted:
            return tried
        attempts = tried.attempts if tried else ()
        try:
            answer, name = await self._first_answer(request, self._models.chain(self._models.teachers(placed.domain)))
        except Unavailable:
            # a promoted student is proven good enough as a whole: while every teacher is down its answer is better than none
            if tried is not None and tried.tier != "student":
                accepted = replace(tried.attempts[0], accepted=True)
                return tried._replace(route="cascade-degraded", reason="every teacher is down", attempts=(accepted,))
            raise
        reason, route = (attempts[0].reason, "cascade") if attempts else (choice.reason, "cascade" if choice.student else "always-teacher")
        return Outcome(answer, name, "teacher", route, reason, None, attempts, lineage=self._models.lineages.get(name, ""))

    async def begin(
        self, request: openai.Chat, placed: Placed, alone: Alone
    ) -> tuple[Backend, AsyncGenerator[dict[str, Any], None], dict[str, Any]]:
        """The first model that begins to speak, and its first chunk: until then another may take over and nothing visible breaks.

        Raises:
            BackendRefused: the request cannot be answered as it is.
            Unavailable: nobody begins.
        """
        others = self._models.teachers(placed.domain) if request.model == "auto" else []
        failures = []
        for backend in self._models.chain([alone.backend, *others]):
            chunks = backend.stream(payload(request))
            try:
                return backend, chunks, await anext(chunks)
            except StopAsyncIteration:
                failures.append(f"model {backend.name} sent nothing")
            except BackendFailed as failed:
                failures.append(str(failed))
        raise Unavailable(f"no model could answer ({'; '.join(failures)}); try again shortly")

    async def _try_student(self, request: openai.Chat, view: TenantView, student: StudentSnapshot) -> Outcome | None:
        """The student's answer with its calibrated confidence; None when it cannot be reached, so the teacher answers."""
        backend = self._models.adapter(view.adapters[student.name])
        asked = request.longest or self._routing.max_student_tokens
        body = payload(request) | {"logprobs": True, "max_tokens": min(asked, self._routing.max_student_tokens)}
        body.pop("max_completion_tokens", None)
        try:
            answer = await backend.complete(body)
        except (BackendFailed, BackendRefused) as failed:
            log.warning("student %s did not answer: %s", student.name, failed)
            self._metrics.fallbacks.labels(student.name).inc()
            return None
        found = score(answer.logprobs)
        verdict = accept(student, found, threshold=self._routing.threshold)
        whole = answer.finish_reason == "stop" and answer.body.get("system_fingerprint") == student.digest
        reason = verdict.reason if whole else f"not the whole answer of the version in charge ({answer.finish_reason})"
        accepted = verdict.accepted and whole
        cost = round(answer.cost_usd * 1e6)
        attempt = Attempt(student.name, student.tier, student.digest, answer.text, found, verdict.confidence, accepted, reason, cost)
        return Outcome(answer, student.name, student.tier, "cascade", reason, verdict.confidence, (attempt,), lineage=lineage_of(student))

    async def _first_answer(self, request: openai.Chat, chain: Sequence[Backend]) -> tuple[Answer, str]:
        """Of the first that can answer, and its name. Raises BackendRefused: nobody else would; Unavailable: nobody can."""
        failures = []
        for backend in chain:
            try:
                return await backend.complete(payload(request)), backend.name
            except BackendFailed as failed:
                failures.append(failed)
        told = "; ".join(str(failed) for failed in failures) or "no teacher is configured in models.yaml"
        wait = min((failed.retry_after or 5 for failed in failures), default=5)
        raise Unavailable(f"no model could answer ({told}); try again shortly", retry_after=wait)


def _told(alone: Alone, name: str) -> str:
    return alone.reason if name == alone.backend.name else f"{alone.reason}, it failed and its fallback answered"


def _lineage(entry: ModelEntry) -> str:
    """An entry that asks another model, or asks it elsewhere, may answer otherwise; its price and deadlines change no answer."""
    told = entry.model_dump_json(include={"kind", "base_url", "model", "path"})
    return f"model:{entry.name}:{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def payload(request: openai.Chat) -> dict[str, Any]:
    """The request as a model gets it: everything the client sent, but for what is between it and us."""
    return request.shape
