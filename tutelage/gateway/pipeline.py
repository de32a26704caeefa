"""A request on one page: authenticate → cache → route → call → record → reply.

It refuses to know HTTP (`app.py`) and how any of the steps is done.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from tutelage.errors import BackendFailed, BackendRefused, ModelNotFound, Unauthenticated, Unavailable
from tutelage.fleet.backends import Answer, Backend
from tutelage.gateway import keys, openai
from tutelage.gateway.cache import CacheKey, ExactCache, cache_key
from tutelage.gateway.snapshot import TenantView, Watcher
from tutelage.records import Attempt, CacheState, Interaction, Tier
from tutelage.routing.confidence import score
from tutelage.routing.encoder import Encoder
from tutelage.routing.policy import StudentSnapshot, accept, choose_student
from tutelage.settings import ModelEntry, RoutingSettings
from tutelage.stores.interactions import Recorder
from tutelage.telemetry import Metrics

log = logging.getLogger(__name__)

TIERS: tuple[Tier, ...] = ("student", "ta", "teacher")


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    tenant_id: str
    key_id: str


@dataclass(frozen=True)
class Options:
    """What the request's headers ask for."""

    cache: str = ""
    domain: str | None = None


@dataclass(frozen=True)
class Placed:
    """Where in the tenant's traffic a prompt belongs."""

    domain: str | None
    embedding: bytes | None
    reason: str


@dataclass(frozen=True)
class Outcome:
    """An answer that may be given: who gave it, how it was chosen, and what was tried on the way."""

    answer: Answer
    model: str
    tier: Tier
    route: str
    reason: str
    confidence: float | None = None
    attempts: tuple[Attempt, ...] = ()
    domain: str | None = None  # only a cached outcome knows it; others are placed first

    @property
    def cost_usd(self) -> float:
        """The answer and every rejected try before it."""
        return self.answer.cost_usd + sum(a.cost_microusd for a in self.attempts if not a.accepted) / 1e6


@dataclass(frozen=True)
class Reply:
    """What goes back to the client: the whole completion and the headers that say where it came from."""

    body: dict[str, Any]
    headers: dict[str, str]


@dataclass(frozen=True)
class Models:
    """The backends of models.yaml, in their order, and the local tier's clients by adapter name."""

    configured: tuple[tuple[ModelEntry, Backend], ...]
    adapter: Callable[[str], Backend]

    def teachers(self, domain: str | None) -> list[Backend]:
        """Those that name the domain first, then those that answer anything."""
        teachers = [(entry, backend) for entry, backend in self.configured if entry.tier == "teacher"]
        own = [backend for entry, backend in teachers if domain is not None and domain in entry.domains]
        return own + [backend for entry, backend in teachers if not entry.domains]

    def named(self, name: str) -> tuple[Tier, Backend] | None:
        return next(((entry.tier, backend) for entry, backend in self.configured if entry.name == name), None)


class Pipeline:
    """Holds what a request needs; one a worker."""

    def __init__(
        self,
        *,
        watcher: Watcher,
        cache: ExactCache,
        recorder: Recorder,
        encoder: Encoder,
        models: Models,
        routing: RoutingSettings,
        secret: str,
        metrics: Metrics,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._watcher = watcher
        self._cache = cache
        self._recorder = recorder
        self._encoder = encoder
        self._models = models
        self._routing = routing
        self._secret = secret
        self._metrics = metrics
        self._clock = clock

    def authenticate(self, authorization: str | None) -> Caller:
        """Raises Unauthenticated, or Unavailable while no keys have been read."""
        presented = keys.parse(authorization)
        snapshot = self._watcher.current
        key = keys.check(presented, snapshot.keys.get(presented.id), pepper=self._secret, now=self._clock())
        if key.tenant_id is None:
            raise Unauthenticated("this is an operator key; requests need a tenant's key: tutelage keys create TENANT")
        return Caller(key.tenant_id, key.id)

    async def answer(self, request: openai.ChatRequest, caller: Caller, options: Options) -> Reply:
        """One request from start to end; its interaction is durable when this returns."""
        started, request_id = time.monotonic(), f"chatcmpl-{uuid.uuid4().hex}"
        view = self._watcher.current.view(caller.tenant_id)
        place = cache_key(caller.tenant_id, request.shape(), secret=self._secret, generation=view.generation)
        cached = await self._look_up(request, place, options)
        if isinstance(cached, Outcome):
            placed = Placed(cached.domain, None, "served from cache")
            return await self._finish(request, caller, options, cached, placed, "hit-exact", request_id, started)
        placed = await self._place(request, view, options)
        outcome = await self._route(request, view, placed)
        reply = await self._finish(request, caller, options, outcome, placed, cached, request_id, started)
        if cached == "miss":
            await self._remember(place, outcome, placed)
        return reply

    async def stream(
        self, request: openai.ChatRequest, caller: Caller, options: Options
    ) -> tuple[dict[str, str], AsyncIterator[dict[str, Any]]]:
        """As `answer`, in chunks. A model that answers alone is passed through as it speaks; a cascade must see the whole answer
        before it can judge it. The last chunk is held back until the interaction is durable."""
        view = self._watcher.current.view(caller.tenant_id)
        placed = await self._place(request, view, options)
        alone = self._alone(request, view, placed)
        if options.cache == "bypass" and alone is not None:
            return await self._pass_through(request, caller, options, placed, alone)
        place = cache_key(caller.tenant_id, request.shape(), secret=self._secret, generation=view.generation)
        cached = await self._look_up(request, place, options)
        if isinstance(cached, Outcome) or alone is None:
            reply = await self.answer(request, caller, options)
            return reply.headers, self._replay(reply.body, request)
        return await self._pass_through(request, caller, options, placed, alone, place=place if cached == "miss" else None)

    # --- cache -----------------------------------------------------------------------------------------------------

    async def _look_up(self, request: openai.ChatRequest, place: CacheKey, options: Options) -> Outcome | CacheState:
        sampled = (request.temperature or 0) > 0 or (request.n or 1) > 1
        if options.cache in ("bypass", "private") or sampled:
            return "bypass"
        found = await self._cache.get(place)
        if found is None:
            return "miss"
        answer = Answer(found["body"], found["tokens"][0], found["tokens"][1], True, 0.0)
        return Outcome(
            answer,
            found["model"],
            found["tier"],
            "cache",
            "the same request was answered before",
            found["confidence"],
            domain=found["domain"],
        )

    async def _remember(self, place: CacheKey, outcome: Outcome, placed: Placed) -> None:
        answer = outcome.answer
        if answer.finish_reason != "stop" or outcome.route.endswith("degraded"):
            return
        value = {"body": answer.body, "tokens": [answer.prompt_tokens, answer.completion_tokens], "model": outcome.model}
        await self._cache.put(place, value | {"tier": outcome.tier, "confidence": outcome.confidence, "domain": placed.domain})

    # --- route -----------------------------------------------------------------------------------------------------

    async def _place(self, request: openai.ChatRequest, view: TenantView, options: Options) -> Placed:
        given = options.domain or (request.metadata or {}).get("domain")
        if view.index is None:
            return Placed(given, None, "no domains yet")
        # the encoder computes without the interpreter's lock; a thread keeps the event loop answering
        embedding = (await asyncio.to_thread(self._encoder.encode, [request.prompt()]))[0]
        if given:
            return Placed(given, embedding.tobytes(), "the client named the domain")
        assignment = view.index.assign(embedding)
        return Placed(assignment.domain, embedding.tobytes(), assignment.reason)

    def _alone(self, request: openai.ChatRequest, view: TenantView, placed: Placed) -> tuple[Tier, Backend, str] | None:
        """The one model that answers without being judged: the one asked for, or the teacher where no student can try."""
        if request.model == "auto":
            choice = choose_student(placed.domain, view.students, quality_floor=self._routing.threshold)
            teachers = self._models.teachers(placed.domain)
            return ("teacher", teachers[0], choice.reason) if choice.student is None and teachers else None
        if request.model in TIERS:
            return self._of_tier(request.model, view, placed)
        named = self._models.named(request.model)
        if named is not None:
            return named[0], named[1], "the client named the model"
        for student in view.students:
            if request.model in (student.name, view.adapters[student.name]):
                return student.tier, self._models.adapter(view.adapters[student.name]), "the client named the student"
        known = ["auto", *TIERS, *(entry.name for entry, _ in self._models.configured), *(s.name for s in view.students)]
        raise ModelNotFound(f"model {request.model!r} does not exist here; available: {', '.join(known)}", param="model")

    def _of_tier(self, tier: Tier, view: TenantView, placed: Placed) -> tuple[Tier, Backend, str]:
        for student in view.students:
            if student.tier == tier and student.domain == placed.domain:
                return tier, self._models.adapter(view.adapters[student.name]), "the client named the tier"
        teachers = self._models.teachers(placed.domain) if tier == "teacher" else []
        if not teachers:
            raise ModelNotFound(f"no {tier} answers domain {placed.domain or 'unknown'!r} yet; use model 'auto'", param="model")
        return tier, teachers[0], "the client named the tier"

    async def _route(self, request: openai.ChatRequest, view: TenantView, placed: Placed) -> Outcome:
        alone = self._alone(request, view, placed)
        if alone is not None and request.model != "auto":
            tier, backend, reason = alone
            answer = await backend.complete(self._payload(request))
            return Outcome(answer, backend.name, tier, "direct", reason)
        choice = choose_student(placed.domain, view.students, quality_floor=self._routing.threshold)
        tried = await self._try_student(request, view, choice.student) if choice.student else None
        if tried is not None and tried.attempts[0].accepted:
            return tried
        attempts = tried.attempts if tried else ()
        try:
            answer, name = await self._ask_teachers(request, placed)
        except Unavailable:
            # a promoted student is proven good enough as a whole: while every teacher is down its answer is better than none
            if tried is not None and tried.tier != "student":
                accepted = replace(tried.attempts[0], accepted=True)
                return replace(tried, route="cascade-degraded", reason="every teacher is down", attempts=(accepted,))
            raise
        if attempts:
            return Outcome(answer, name, "teacher", "cascade", attempts[0].reason, None, attempts)
        return Outcome(answer, name, "teacher", "always-teacher" if choice.student is None else "cascade", choice.reason)

    async def _try_student(self, request: openai.ChatRequest, view: TenantView, student: StudentSnapshot) -> Outcome | None:
        """The student's answer with its calibrated confidence; None when it cannot be reached, so the teacher answers."""
        backend = self._models.adapter(view.adapters[student.name])
        payload = self._payload(request) | {"logprobs": True}
        asked = request.max_completion_tokens or request.max_tokens or self._routing.max_student_tokens
        payload.pop("max_completion_tokens", None)
        payload["max_tokens"] = min(asked, self._routing.max_student_tokens)
        try:
            answer = await backend.complete(payload)
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
        return Outcome(answer, student.name, student.tier, "cascade", reason, verdict.confidence, (attempt,))

    async def _ask_teachers(self, request: openai.ChatRequest, placed: Placed) -> tuple[Answer, str]:
        failures = []
        for teacher in self._models.teachers(placed.domain):
            try:
                return await teacher.complete(self._payload(request)), teacher.name
            except BackendFailed as failed:
                failures.append(str(failed))
        told = "; ".join(failures) or "no teacher is configured in models.yaml"
        raise Unavailable(f"no teacher could answer ({told}); try again shortly")

    @staticmethod
    def _payload(request: openai.ChatRequest) -> dict[str, Any]:
        return request.shape() | {"messages": request.conversation()}

    # --- record and reply --------------------------------------------------------------------------------------------

    async def _finish(
        self,
        request: openai.ChatRequest,
        caller: Caller,
        options: Options,
        outcome: Outcome,
        placed: Placed,
        state: CacheState,
        request_id: str,
        started: float,
    ) -> Reply:
        answer, now = outcome.answer, self._clock()
        seconds = time.monotonic() - started
        await self._recorder.record(
            Interaction(
                request_id=request_id,
                tenant_id=caller.tenant_id,
                key_id=caller.key_id,
                created_at=now,
                messages=request.conversation(),
                prompt_hash=hashlib.sha256(request.prompt().encode()).digest(),
                answer=answer.text,
                model=outcome.model,
                tier=outcome.tier,
                route=outcome.route,
                reason=outcome.reason,
                cache=state,
                domain=placed.domain,
                given_domain=options.domain or (request.metadata or {}).get("domain"),
                confidence=outcome.confidence,
                finish_reason=answer.finish_reason,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
                tokens_estimated=answer.estimated,
                cost_microusd=round(outcome.cost_usd * 1e6),
                latency_ms=round(seconds * 1000),
                embedding=placed.embedding,
                attempts=outcome.attempts,
            )
        )
        self._metrics.answered(outcome.tier, outcome.route, state, seconds, outcome.cost_usd)
        body = openai.completion(
            request_id,
            created=int(now.timestamp()),
            model=outcome.model,
            answer=self._visible(answer.body, request),
            tokens=(answer.prompt_tokens, answer.completion_tokens),
        )
        return Reply(body, self._headers(outcome, placed, state, request_id))

    @staticmethod
    def _visible(body: dict[str, Any], request: openai.ChatRequest) -> dict[str, Any]:
        """The cascade asks for log-probabilities; the client sees them only if it asked too."""
        if request.logprobs:
            return body
        return body | {"choices": [choice | {"logprobs": None} for choice in body["choices"]]}

    @staticmethod
    def _headers(outcome: Outcome, placed: Placed, state: CacheState, request_id: str) -> dict[str, str]:
        headers = {
            "x-request-id": request_id,
            "x-tutelage-model": outcome.model,
            "x-tutelage-tier": outcome.tier,
            "x-tutelage-route": outcome.route,
            "x-tutelage-cache": state,
            "x-tutelage-cost-usd": f"{outcome.cost_usd:.9f}",
        }
        if placed.domain:
            headers["x-tutelage-domain"] = quote(placed.domain, safe=" !#$&'()*+,/:;=?@[]")  # a client may name it in any script
        if outcome.confidence is not None:
            headers["x-tutelage-confidence"] = f"{outcome.confidence:.4f}"
        return headers

    # --- streams -----------------------------------------------------------------------------------------------------

    @staticmethod
    async def _replay(body: dict[str, Any], request: openai.ChatRequest) -> AsyncIterator[dict[str, Any]]:
        for chunk in openai.chunks_of(body):
            yield chunk
        if request.stream_options and request.stream_options.include_usage:
            yield openai.usage_chunk(body)

    async def _pass_through(
        self,
        request: openai.ChatRequest,
        caller: Caller,
        options: Options,
        placed: Placed,
        alone: tuple[Tier, Backend, str],
        *,
        place: CacheKey | None = None,
    ) -> tuple[dict[str, str], AsyncIterator[dict[str, Any]]]:
        tier, backend, reason = alone
        started, request_id = time.monotonic(), f"chatcmpl-{uuid.uuid4().hex}"
        others = [b for b in self._models.teachers(placed.domain) if b is not backend] if request.model == "auto" else []
        backend, chunks, first = await self._first_chunk(request, [backend, *others])
        route = "always-teacher" if request.model == "auto" else "direct"
        state: CacheState = "miss" if place is not None else "bypass"

        async def speak() -> AsyncIterator[dict[str, Any]]:
            heard = _Heard(request_id, int(self._clock().timestamp()), backend.name)
            yield heard.listen(first)
            async for chunk in chunks:
                # finish reasons are withheld: they are the acknowledgement, and nothing is acknowledged before it is recorded
                visible = heard.listen(chunk)
                if visible["choices"]:
                    yield visible
            outcome = Outcome(heard.answer(backend, self._payload(request), self._encoder.count_tokens), backend.name, tier, route, reason)
            reply = await self._finish(request, caller, options, outcome, placed, state, request_id, started)
            if place is not None:
                await self._remember(place, outcome, placed)
            for chunk in list(openai.chunks_of(reply.body))[len(reply.body["choices"]) :]:
                yield chunk
            if request.stream_options and request.stream_options.include_usage:
                yield openai.usage_chunk(reply.body)

        headers = self._headers(
            Outcome(Answer({"choices": [{"message": {}}]}, 0, 0, True, 0.0), backend.name, tier, route, reason), placed, state, request_id
        )
        headers.pop("x-tutelage-cost-usd")  # not known before the stream has ended; the usage chunk and the ledger have it
        return headers, speak()

    async def _first_chunk(
        self, request: openai.ChatRequest, backends: list[Backend]
    ) -> tuple[Backend, AsyncIterator[dict[str, Any]], dict[str, Any]]:
        """The first backend that begins to speak: until then another may take over and nothing visible breaks."""
        failures = []
        for backend in backends:
            chunks = backend.stream(self._payload(request))
            try:
                return backend, chunks, await anext(chunks)
            except StopAsyncIteration:
                failures.append(f"model {backend.name} sent nothing")
            except BackendFailed as failed:
                failures.append(str(failed))
        raise Unavailable(f"no model could answer ({'; '.join(failures)}); try again shortly")


class _Heard:
    """Collects a passing stream into the completion it amounts to."""

    def __init__(self, request_id: str, created: int, model: str) -> None:
        self._frame = {"id": request_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: dict[str, Any] | None = None
        self._fingerprint: str | None = None

    def listen(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """The chunk as the client may see it now: our id, no finish reason, no usage."""
        self._usage = chunk.get("usage") or self._usage
        self._fingerprint = chunk.get("system_fingerprint") or self._fingerprint
        visible = []
        for part in chunk.get("choices", []):
            choice = self._choices.setdefault(part["index"], {"content": [], "tool_calls": {}, "logprobs": [], "finish_reason": None})
            delta = part.get("delta") or {}
            choice["content"].append(delta.get("content") or "")
            choice["logprobs"] += (part.get("logprobs") or {}).get("content") or []
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
            for call in delta.get("tool_calls") or []:
                _merge_call(choice["tool_calls"].setdefault(call.get("index", 0), {}), call)
            if delta or part.get("logprobs"):
                visible.append({**part, "finish_reason": None})
        return self._frame | {"choices": visible}

    def answer(self, backend: Backend, payload: dict[str, Any], count: Callable[[str], int]) -> Answer:
        choices = []
        for index, heard in sorted(self._choices.items()):
            message: dict[str, Any] = {"role": "assistant", "content": "".join(heard["content"])}
            if heard["tool_calls"]:
                message["tool_calls"] = [call for _, call in sorted(heard["tool_calls"].items())]
            logprobs = {"content": heard["logprobs"]} if heard["logprobs"] else None
            choices.append({"index": index, "message": message, "finish_reason": heard["finish_reason"], "logprobs": logprobs})
        if not choices:
            raise BackendFailed(f"model {backend.name} ended its stream without an answer")
        body = {"choices": choices, "usage": self._usage, "system_fingerprint": self._fingerprint}
        text = "".join(choice["message"]["content"] for choice in choices)
        prompt_tokens, completion_tokens, estimated = backend.count(self._usage, payload, text)
        return Answer(body, prompt_tokens, completion_tokens, estimated, backend.price(body, prompt_tokens, completion_tokens))


def _merge_call(known: dict[str, Any], part: dict[str, Any]) -> None:
    """Tool calls arrive in pieces: the id and name once, the arguments a few characters at a time."""
    for field in ("id", "type"):
        if part.get(field):
            known[field] = part[field]
    function = known.setdefault("function", {"name": "", "arguments": ""})
    for field in ("name", "arguments"):
        function[field] += (part.get("function") or {}).get(field) or ""
