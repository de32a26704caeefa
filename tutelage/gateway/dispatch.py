"""Who answers a prompt, and asking them: its place in the tenant's traffic, and the steps of its plan one after another or at once.

It refuses to know who asks, what is cached and what is recorded, and why a plan is as it is (`planning.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tutelage.errors import BackendErred, BackendFailed, BackendRefused, InvalidRequest, ModelNotFound, Unavailable
from tutelage.fleet.backends import Answer, Backend
from tutelage.gateway import openai
from tutelage.gateway.cache import Servable
from tutelage.gateway.exchange import NOBODY_CHOSE, Asked, Chosen, Outcome, Placed
from tutelage.gateway.judging import Judging
from tutelage.gateway.models import Models
from tutelage.gateway.planning import Planned, Planning, affordable
from tutelage.gateway.recalling import Recalling
from tutelage.gateway.snapshot import TenantView, lineage_of
from tutelage.records import Attempt, Tier
from tutelage.routing.encoder import Encoder
from tutelage.routing.exploration import propensity
from tutelage.routing.policy import StudentSnapshot, again, judge, score_again
from tutelage.routing.recall import Recalled, in_context
from tutelage.routing.signs import AGAIN, AGAIN_TEMPERATURE, ALTERNATIVES, agreement, read
from tutelage.routing.strategies import Step
from tutelage.routing.votes import agree
from tutelage.settings import RoutingSettings
from tutelage.telemetry import Metrics

log = logging.getLogger(__name__)

TIERS: tuple[Tier, ...] = ("student", "ta", "teacher")


class Alone(NamedTuple):
    """The one model that answers without being judged. `most_microusd`: what its answer may cost; None: whatever it costs. `recalled`:
    earlier answers that it, and no fallback of it, is given in context. `digest`: of the student's version; None: it is no student."""

    tier: Tier
    backend: Backend
    route: str
    reason: str
    lineage: str
    chosen: Chosen = NOBODY_CHOSE
    most_microusd: int | None = None
    recalled: tuple[Recalled, ...] = ()
    digest: str | None = None


class Tried(NamedTuple):
    """What became of asking a student: its answer, if it gave one, and what is on record of it. Without either it was not reached."""

    outcome: Outcome | None
    attempts: tuple[Attempt, ...]


class Dispatch:
    """Finds who answers and asks them. `models` and `routing` may be replaced while requests run (`change`)."""

    def __init__(
        self, encoder: Encoder, *, models: Models, planning: Planning, judging: Judging, recalling: Recalling, metrics: Metrics
    ) -> None:
        self._encoder = encoder
        self._recalling = recalling
        self._models = models
        self._planning = planning
        self._judging = judging
        self._metrics = metrics

    def change(self, models: Models, routing: RoutingSettings) -> None:
        self._models = models
        self._planning.change(routing)

    @property
    def models(self) -> Models:
        return self._models

    async def place(self, asked: Asked, view: TenantView) -> Placed:
        given = asked.given_domain
        if view.index is None:
            return Placed(given, None, "no domains yet")
        # the encoder computes without the interpreter's lock; a thread keeps the event loop answering
        embedding = (await asyncio.to_thread(self._encoder.encode, [asked.request.prompt]))[0]
        assignment = view.index.assign(embedding)
        domain, reason = (given, "the client named the domain") if given else (assignment.domain, assignment.reason)
        known = self._recalling.find(asked, domain, embedding)
        return Placed(domain, embedding.tobytes(), reason, assignment.similarity, known)

    def alone(self, asked: Asked, view: TenantView, placed: Placed) -> Alone | None:
        """The one model that answers without being judged: the one asked for, or the one that the plan names.

        Raises:
            ModelNotFound: none has this name.
            InvalidRequest: nobody answers for what it may cost.
        """
        if asked.request.model != "auto":
            return self._named(asked.request, view, placed)
        planned = self._planning.plan(asked, view, placed, self._models)
        return self._single(planned, placed)

    def _single(self, planned: Planned, placed: Placed) -> Alone | None:
        plan = planned.plan
        if not plan.steps and self._models.configured:
            raise InvalidRequest(f"{plan.reason}; allow more, or ask for a shorter answer", param="x-tutelage-max-cost-usd")
        if len(plan.steps) != 1 or plan.steps[0].candidate.student is not None:
            return None
        step = plan.steps[0]
        alone = self._configured(step.candidate.tier, self._models.by_name[step.candidate.name][1], plan.shape, plan.reason)
        recalled = _recalled(step, placed)
        return alone._replace(chosen=_chosen(planned, plan.propensity), most_microusd=step.most_microusd, recalled=recalled)

    def _named(self, request: openai.Chat, view: TenantView, placed: Placed) -> Alone:
        """Whoever the client named. While a challenger is on its way to a student's place, its share of the requests is its own here too;
        an adapter's name means that version and no other."""
        model = request.model
        for tier in TIERS:
            if model == tier:
                return self._of_tier(tier, view, placed, request)
        named = self._models.by_name.get(model)
        if named is not None:
            return self._configured(named[0].tier, named[1], "direct", "the client named the model")
        for student in view.students:
            if model == student.name:
                return self._served(student, view, request, "the client named the student")
            if model == view.adapters[student.name]:
                return self._student(student, student, model, "the client named the version")
        known = ["auto", *TIERS, *(entry.name for entry, _ in self._models.configured), *(s.name for s in view.students)]
        raise ModelNotFound(f"model {model!r} does not exist here; available: {', '.join(known)}", param="model")

    def _configured(self, tier: Tier, backend: Backend, route: str, reason: str) -> Alone:
        return Alone(tier, backend, route, reason, self._models.lineages.get(backend.name, ""))

    def _served(self, student: StudentSnapshot, view: TenantView, request: openai.Chat, reason: str) -> Alone:
        serving, adapter = view.serving(student, request.prompt)
        return self._student(student, serving, adapter, reason)

    def _student(self, student: StudentSnapshot, serving: StudentSnapshot, adapter: str, reason: str) -> Alone:
        return Alone(student.tier, self._models.adapter(adapter), "direct", reason, lineage_of(serving), digest=serving.digest)

    def _of_tier(self, tier: Tier, view: TenantView, placed: Placed, request: openai.Chat) -> Alone:
        """The domain's student of this tier, else the first configured model of it."""
        for student in view.students:
            if student.tier == tier and student.domain == placed.domain:
                return self._served(student, view, request, "the client named the tier")
        configured = [entry.name for entry in self._models.answering(placed.domain) if entry.tier == tier]
        if not configured:
            raise ModelNotFound(f"no {tier} answers domain {placed.domain or 'unknown'!r} yet; use model 'auto'", param="model")
        return self._configured(tier, self._models.by_name[configured[0]][1], "direct", "the client named the tier")

    def lineage(self, name: str, alone: Alone) -> str:
        """Of the answer that model `name` gave in the place of `alone`: itself, or one of its fallbacks."""
        return alone.lineage if name == alone.backend.name else self._models.lineages.get(name, "")

    def servable(self, view: TenantView) -> Servable:
        """Which kept answers may be given again."""
        return Servable(self._models.servable, view.lineages, self._planning.policy(view).threshold)

    def policy(self, asked: Asked, view: TenantView) -> str:
        """What decides who answers, beside the models themselves and the threshold."""
        return self._planning.key(asked, view)

    async def ask(self, asked: Asked, view: TenantView, placed: Placed) -> Outcome:
        """The model asked for, or what the tenant's strategy plans.

        Raises:
            ModelNotFound, BackendRefused, InvalidRequest: it cannot be answered as it is.
            Unavailable: nobody can answer it now.
        """
        if asked.request.model != "auto":
            return await self._ask_alone(asked.request, self._named(asked.request, view, placed), [])
        planned = self._planning.plan(asked, view, placed, self._models)
        alone = self._single(planned, placed)
        if alone is not None:
            return await self._ask_alone(asked.request, alone, self._models.teachers(placed.domain))
        if planned.plan.shape == "parallel":
            return await self._ask_all(asked.request, placed, planned)
        return await self._ask_in_turn(asked.request, view, placed, planned)

    async def _ask_alone(self, request: openai.Chat, alone: Alone, others: Sequence[Backend]) -> Outcome:
        chain = self._models.chain([alone.backend, *others])
        answer, name = await self._first_answer(request, chain, alone.most_microusd, alone.recalled)
        return spoken(alone, answer, name, self.tier_of(name, alone), self.lineage(name, alone))

    def tier_of(self, name: str, alone: Alone) -> Tier:
        """Of model `name` that answered in the place of `alone`."""
        return alone.tier if name == alone.backend.name else self._models.by_name[name][0].tier

    async def _ask_in_turn(self, request: openai.Chat, view: TenantView, placed: Placed, planned: Planned) -> Outcome:
        """Students until one is sure enough, then the model behind them."""
        plan, attempts = planned.plan, list[Attempt]()
        tried: Outcome | None = None
        reached = True  # every student that should have answered did
        for step in plan.steps:
            if step.candidate.student is None:
                continue
            student, adapter = view.serving(step.candidate.student, request.prompt)
            outcome, on_record = await self.try_student(request, student, adapter, least=step.least, promised=step.promised)
            attempts.extend(on_record)
            reached = reached and outcome is not None
            if outcome is None:
                continue
            tried = outcome._replace(route=plan.shape, attempts=tuple(attempts), reason=f"{plan.reason}: {outcome.reason}")
            if outcome.attempts[0].accepted:
                return tried._replace(chosen=_after(planned, attempts, given=True) if reached else _chosen(planned, None))
        behind = [self._models.by_name[s.candidate.name][1] for s in plan.steps if s.candidate.student is None]
        chosen = _after(planned, attempts, given=False) if reached else _chosen(planned, None)
        try:
            chain = self._models.chain([*behind, *self._models.teachers(placed.domain)])
            answer, name = await self._first_answer(request, chain, plan.steps[-1].most_microusd, _recalled(plan.steps[-1], placed))
        except Unavailable:
            # a promoted student is proven good enough as a whole: while every teacher is down its answer is better than none
            if tried is not None and tried.tier != "student":
                accepted = (*tried.attempts[:-1], replace(tried.attempts[-1], accepted=True))
                told = tried._replace(route="cascade-degraded", reason="every teacher is down", attempts=accepted)
                return told._replace(chosen=_chosen(planned, None))
            raise
        if behind and name != behind[0].name:
            chosen = _chosen(planned, None)
        reason = f"{plan.reason}: {attempts[-1].reason}" if attempts else plan.reason
        tier = self._models.by_name[name][0].tier
        lineage = self._models.lineages.get(name, "")
        return Outcome(answer, name, tier, plan.shape, reason, None, tuple(attempts), lineage=lineage, chosen=chosen)

    async def _ask_all(self, request: openai.Chat, placed: Placed, planned: Planned) -> Outcome:
        """All at once; what most of them say is given, and where they all differ what the judge prefers, or the one trusted most."""
        plan = planned.plan
        asking = [self._answer_of(request, step, placed) for step in plan.steps]
        answered = [
            (step, found) for step, found in zip(plan.steps, await asyncio.gather(*asking), strict=True) if isinstance(found, Answer)
        ]
        if not answered:
            return await self._ask_alone(request, self._fallback(planned), self._models.teachers(placed.domain))
        agreed = agree([found.text for _, found in answered], [step.candidate.worth for step, _ in answered])
        attempts: list[Attempt] = []
        if agreed.votes == 1 and len(answered) > 1 and self._judging.able:
            agreed, attempts = await self._judging.best(request, [found.text for _, found in answered], agreed)
        for place, (step, found) in enumerate(answered):
            if place != agreed.index:
                cost = round(found.cost_usd * 1e6)
                name, tier = step.candidate.name, step.candidate.tier
                attempts.append(Attempt(name, tier, None, found.text, None, None, False, agreed.reason, cost))
        step, answer = answered[agreed.index]
        name, lineage = step.candidate.name, self._models.lineages.get(step.candidate.name, "")
        whole = len(answered) == len(plan.steps)
        chosen = _chosen(planned, plan.propensity if whole else None)
        reason = f"{plan.reason}; {agreed.reason}"
        return Outcome(answer, name, step.candidate.tier, "parallel", reason, None, tuple(attempts), lineage=lineage, chosen=chosen)

    def _fallback(self, planned: Planned) -> Alone:
        step = planned.plan.steps[0]
        alone = self._configured(step.candidate.tier, self._models.by_name[step.candidate.name][1], "parallel", planned.plan.reason)
        return alone._replace(chosen=_chosen(planned, None), most_microusd=step.most_microusd)

    async def _answer_of(self, request: openai.Chat, step: Step, placed: Placed) -> Answer | None:
        chain = [self._models.by_name[step.candidate.name][1]]
        try:
            return (await self._first_answer(request, chain, step.most_microusd, _recalled(step, placed)))[0]
        except (Unavailable, BackendRefused) as failed:
            log.warning("%s did not answer beside others: %s", step.candidate.name, failed)
            return None

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
            body = self._body(request, backend, alone.most_microusd, alone.recalled if backend is alone.backend else ())
            if body is None:
                failures.append(f"model {backend.name} costs more than may be spent")
                continue
            chunks = backend.stream(body)
            try:
                return backend, chunks, await anext(chunks)
            except StopAsyncIteration:
                failures.append(f"model {backend.name} sent nothing")
            except BackendFailed as failed:
                failures.append(str(failed))
        raise Unavailable(f"no model could answer ({'; '.join(failures)}); try again shortly")

    async def try_student(
        self, request: openai.Chat, student: StudentSnapshot, adapter: str, *, least: float | None, promised: float | None = None
    ) -> Tried:
        """The student's answer with its calibrated confidence; without one the next model answers. `least`: the confidence from which it
        is given; None: it is given as it is, if it is whole and of the version in charge. `promised`: as in `policy.judge`."""
        backend = self._models.adapter(adapter)
        most = self._planning.routing.max_student_tokens
        alternatives = max(ALTERNATIVES, request.alternatives)
        body = payload(request) | {"logprobs": True, "top_logprobs": alternatives, "max_tokens": min(request.longest or most, most)}
        body.pop("max_completion_tokens", None)
        try:
            answer = await backend.complete(body)
        except (BackendFailed, BackendRefused) as failed:
            log.warning("student %s did not answer: %s", student.name, failed)
            self._metrics.fallbacks.labels(student.name).inc()
            # only what is the version's own fault stands against it: a tier that is down says nothing of those it holds
            erred = Attempt(student.name, student.tier, student.digest, "", None, None, False, f"failed: {failed}", 0)
            return Tried(None, (erred,) if isinstance(failed, BackendErred) else ())
        told = read(answer.logprobs)
        found = student.calibrator.reading.score(told)
        verdict = judge(student, found, needed=least or 0.0, promised=promised)
        whole = answer.finish_reason == "stop" and answer.body.get("system_fingerprint") == student.digest
        surer = again(student, told, needed=least or 0.0, promised=promised) if whole and not verdict.accepted else None
        if surer is not None:
            agreed, cost_usd = await self._ask_again(backend, body, answer.text)
            answer = answer._replace(cost_usd=answer.cost_usd + cost_usd)
            verdict = judge(surer, score_again(surer, told, agreed), needed=least or 0.0, promised=promised)
            verdict = replace(verdict, reason=f"{verdict.reason}, asked again it agreed in {agreed:.2f}")
        reason = verdict.reason if whole else f"not the whole answer of the version in charge ({answer.finish_reason})"
        accepted, confidence = (verdict.accepted, verdict.confidence) if whole else (False, 0.0)
        cost = round(answer.cost_usd * 1e6)
        attempt = Attempt(student.name, student.tier, student.digest, answer.text, found, confidence, accepted, reason, cost)
        outcome = Outcome(answer, student.name, student.tier, "cascade", reason, confidence, (attempt,), lineage=lineage_of(student))
        return Tried(outcome, outcome.attempts)

    async def _ask_again(self, backend: Backend, body: Mapping[str, Any], text: str) -> tuple[float, float]:
        """The share of further answers that end with the same as `text`, and their dollars; one that fails agrees with nothing."""

        drawn = {name: value for name, value in body.items() if name not in ("logprobs", "top_logprobs")}

        async def once(seed: int) -> Answer | None:
            try:
                return await backend.complete(drawn | {"temperature": AGAIN_TEMPERATURE, "seed": seed})
            except (BackendFailed, BackendRefused) as failed:
                log.warning("%s did not answer again: %s", backend.name, failed)
                return None

        self._metrics.asked_again.inc()
        answers = [found for found in await asyncio.gather(*map(once, range(AGAIN))) if found is not None]
        agreed = agreement(text, [found.text for found in answers]) if answers else 0.0
        return agreed * len(answers) / AGAIN, sum(found.cost_usd for found in answers)

    async def ask_teacher(self, request: openai.Chat, placed: Placed) -> tuple[Answer, str]:
        """What the domain's teacher says, whoever has answered. Raises BackendRefused, Unavailable."""
        return await self._first_answer(request, self._models.chain(self._models.teachers(placed.domain)), None)

    async def _first_answer(
        self, request: openai.Chat, chain: Sequence[Backend], most_microusd: int | None, recalled: Sequence[Recalled] = ()
    ) -> tuple[Answer, str]:
        """Of the first that can answer, and its name; the first of the chain is given what was recalled. Raises BackendRefused: nobody
        else would; Unavailable: nobody can."""
        failures, wait = list[str](), list[int]()
        for backend in chain:
            body = self._body(request, backend, most_microusd, recalled if backend is chain[0] else ())
            if body is None:
                failures.append(f"model {backend.name} costs more than may be spent")
                continue
            try:
                return await backend.complete(body), backend.name
            except BackendFailed as failed:
                failures.append(str(failed))
                wait.append(failed.retry_after or 5)
        told = "; ".join(failures) or "no teacher is configured in models.yaml"
        raise Unavailable(f"no model could answer ({told}); try again shortly", retry_after=min(wait, default=5))

    def _body(
        self, request: openai.Chat, backend: Backend, most_microusd: int | None, recalled: Sequence[Recalled]
    ) -> dict[str, Any] | None:
        """What a model is sent, its answer no longer than what may be spent on it; None where nothing can be said for that."""
        if recalled:
            return payload(request) | {"messages": in_context(request.messages, recalled)}
        if most_microusd is None:
            return payload(request)
        tokens = affordable(self._models.by_name[backend.name][0].price, request, most_microusd)
        if tokens is None:
            return payload(request)
        name = "max_completion_tokens" if "max_completion_tokens" in request.shape else "max_tokens"
        return payload(request) | {name: min(request.longest or tokens, tokens)} if tokens else None


def _recalled(step: Step, placed: Placed) -> tuple[Recalled, ...]:
    """What the step's model is given in context."""
    return placed.known.answers if step.candidate.recalled and placed.known is not None else ()


def spoken(alone: Alone, answer: Answer, name: str, tier: Tier, lineage: str) -> Outcome:
    """The answer of the one model that was asked, or of `name` in its place: what was drawn says nothing of another's answer. A student's
    is an attempt that was accepted, as in a cascade: by that it is known whose it was."""
    itself = name == alone.backend.name
    reason = alone.reason if itself else f"{alone.reason}, it failed and its fallback answered"
    chosen = alone.chosen if itself else alone.chosen._replace(propensity=None)
    cost = round(answer.cost_usd * 1e6)
    tried = (Attempt(name, tier, alone.digest, answer.text, None, None, True, reason, cost),) if itself and alone.digest else ()
    return Outcome(answer, name, tier, alone.route, reason, attempts=tried, lineage=lineage, chosen=chosen)


def _after(planned: Planned, attempts: Sequence[Attempt], *, given: bool) -> Chosen:
    """Where tries in turn have ended, with the probability that they ended so."""
    if all(step.least is None for step in planned.undrawn.steps):
        return _chosen(planned, planned.plan.propensity if given or not attempts else None)
    confidences = [attempt.confidence or 0.0 for attempt in attempts]
    return _chosen(planned, propensity(planned.undrawn, planned.exploration, confidences, given=given) or None)


def _chosen(planned: Planned, likely: float | None) -> Chosen:
    return Chosen(planned.plan.strategy, likely, planned.plan.explored, planned.policy.version, planned.policy.threshold)


def payload(request: openai.Chat) -> dict[str, Any]:
    """The request as a model gets it: everything the client sent, but for what is between it and us."""
    return request.shape
