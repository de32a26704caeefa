"""After a reply is given: what was its answer worth? Tries that were not given are held against the teacher's answer, which is there
anyway; of a share of students' answers that were given the teacher is asked in the background, on the tenant's bill as endpoint `shadow`.
A student whose promise is broken is asked behind the teacher's back instead, so that it can win its confidence back; a challenger is asked
beside the champion, so that verdicts on the request, and the teacher's answer where there is one, tell of both.

Nothing here delays a reply or fails a request: more shadows than may run at once are not drawn. It refuses to know what follows from an
outcome.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import asyncpg

from tutelage import scoring
from tutelage.errors import TutelageError
from tutelage.fleet.backends import Answer
from tutelage.gateway.dispatch import Dispatch
from tutelage.gateway.exchange import Asked, Placed
from tutelage.gateway.exchange import Outcome as Given
from tutelage.gateway.judging import Judging
from tutelage.gateway.snapshot import Challenger, TenantView
from tutelage.gateway.verifying import Verifying
from tutelage.records import Attempt, Interaction, Outcome, Tier, new_id
from tutelage.routing.drift import looked_at
from tutelage.settings import RoutingSettings
from tutelage.stores import outcomes
from tutelage.stores.database import Pool
from tutelage.stores.interactions import Recorder, add_attempt

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # that long a worker that stops waits for shadows under way


@dataclass(frozen=True)
class _Beside:
    """A challenger that may be asked beside the champion, as attempt number `place`; and the probabilities that its answer is held against
    the teacher's where the teacher was needed (`escalated`) and where the champion's answer was given (`accepted`)."""

    challenger: Challenger
    place: int
    escalated: float
    accepted: float

    @classmethod
    def of(cls, view: TenantView, placed: Placed, given: Given, *, escalated: float, accepted: float) -> _Beside | None:
        """None without a challenger, and where the champion tried nothing or the challenger did itself."""
        challenger = view.challengers.get(placed.domain or "")
        if challenger is None or not given.attempts or any(a.digest == challenger.student.digest for a in given.attempts):
            return None
        return cls(challenger, len(given.attempts), escalated, accepted)

    def looked(self, needed: float) -> float:
        """The probability of a comparison, whether or not the champion's answer was given; `needed`: that the teacher's is."""
        return needed * self.escalated + (1 - needed) * self.accepted


class Shadows:
    """The shadows of one worker; `randomness` draws them."""

    def __init__(
        self,
        pool: Pool,
        recorder: Recorder,
        dispatch: Dispatch,
        judging: Judging,
        verifying: Verifying,
        *,
        routing: Callable[[], RoutingSettings],
        randomness: random.Random,
        clock: Callable[[], datetime],
    ) -> None:
        self._pool, self._recorder, self._dispatch, self._judging, self._verifying = pool, recorder, dispatch, judging, verifying
        self._routing = routing
        self._random = randomness
        self._clock = clock
        self._running: set[asyncio.Task[None]] = set()

    def consider(self, asked: Asked, view: TenantView, placed: Placed, given: Given) -> None:
        """Look into an answer that was given, if there is anything to learn from it. Returns at once."""
        case = self._verifying.case(asked, placed)
        if case is not None:
            self._start(self._verifying.note(case, asked, placed, given))
        chosen = given.chosen
        spawned = view.spawned.get(placed.domain or "")
        by_teacher = given.tier == "teacher" and not given.by_student
        if chosen.strategy is None or (by_teacher and not view.students and spawned is None):
            return
        settings = self._routing()
        tried = [attempt for attempt in given.attempts if attempt.score is not None and attempt.confidence]  # whole ones
        share = max((looked_at(settings.shadow, s.calibrator) for s in view.students if s.domain == placed.domain), default=settings.shadow)
        # one number for both: where the teacher is asked beside a champion the challenger is too, and each such request is a pair
        number, room = self._random.random(), len(self._running) < settings.shadows_at_once
        if spawned is not None and by_teacher and not given.attempts and room and number < settings.shadow:
            self._start(self._ask_spawned(asked, placed, spawned, given.answer, observed=settings.shadow))
        drawn, contested = room and number < share, room and number < settings.shadow_challenger
        beside = _Beside.of(view, placed, given, escalated=settings.shadow_challenger, accepted=min(share, settings.shadow_challenger))
        if by_teacher and tried:
            likely = chosen.propensity or 1.0
            looked = 1 - (1 - likely) * (1 - share)
            self._start(self._compare(asked, placed, given.answer, tried, served=False, observed=looked))
            if beside is not None and contested:
                self._start(self._ask_challenger(asked, placed, beside, given.answer, observed=beside.looked(likely)))
        elif tried and given.by_student and drawn:
            likely = chosen.propensity or 1.0
            looked = 1 - likely * (1 - share)
            self._start(self._ask_teacher(asked, placed, tried[-1], observed=looked, beside=beside if contested else None, likely=likely))
        elif beside is not None and contested:
            self._start(self._ask_challenger(asked, placed, beside, None, observed=1.0))
        elif not by_teacher and not tried and drawn:
            alone = Attempt(given.model, given.tier, None, given.answer.text, None, None, True, given.reason, 0)
            self._start(self._ask_teacher(asked, placed, alone, observed=share))
        elif by_teacher and drawn:
            self._start(self._ask_doubted(asked, view, placed, given.answer, observed=share))

    async def close(self) -> None:
        """Wait a little for those under way; what is not done by then is given up."""
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()

    async def settled(self) -> None:
        """Until none is under way."""
        while self._running:
            await asyncio.wait(self._running)

    def _start(self, looking: object) -> None:
        async def guarded() -> None:
            try:
                await looking  # type: ignore[misc]
            except (TutelageError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as failed:
                log.warning("an answer's worth was not found out: %r", failed)

        task = asyncio.create_task(guarded())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _ask_teacher(
        self, asked: Asked, placed: Placed, attempt: Attempt, *, observed: float, beside: _Beside | None = None, likely: float = 1.0
    ) -> None:
        answer, name = await self._dispatch.ask_teacher(asked.request, placed)
        await self._bill(asked, placed, answer, name, "teacher", f"a sample of what {attempt.model} answers, beside the teacher")
        await self._compare(asked, placed, answer, [attempt], served=True, observed=observed)
        if beside is not None:
            await self._ask_challenger(asked, placed, beside, answer, observed=beside.looked(1 - likely))

    async def _ask_challenger(self, asked: Asked, placed: Placed, beside: _Beside, teachers: Answer | None, *, observed: float) -> None:
        """Its answer to a request that the champion tried, kept as one more attempt at it, and what it is worth beside the teacher's."""
        challenger = beside.challenger
        found, _ = await self._dispatch.try_student(asked.request, challenger.student, challenger.adapter, least=None)
        if found is None:
            return
        await self._bill(asked, placed, found.answer, challenger.student.name, challenger.student.tier, "a challenger beside the champion")
        attempt = replace(found.attempts[0], accepted=False, reason="a challenger beside the champion", cost_microusd=0)
        kept = attempt if asked.caller.bodies == "full" else replace(attempt, answer="")
        await add_attempt(self._pool, asked.id, beside.place, kept)
        if teachers is not None and attempt.confidence:
            await self._compare(asked, placed, teachers, [attempt], served=False, observed=observed)

    async def _ask_spawned(self, asked: Asked, placed: Placed, spawned: Challenger, teachers: Answer, *, observed: float) -> None:
        """What a student that is still being trained says as the bare base: how good it was before, on the domain's own requests."""
        found, _ = await self._dispatch.try_student(asked.request, spawned.student, spawned.adapter, least=None)
        if found is None or not found.attempts[0].accepted:
            return
        await self._bill(asked, placed, found.answer, spawned.student.name, spawned.student.tier, "a student in training, as its base")
        await self._compare(asked, placed, teachers, found.attempts, served=False, observed=observed)

    async def _ask_doubted(self, asked: Asked, view: TenantView, placed: Placed, teachers: Answer, *, observed: float) -> None:
        for student in view.students:
            if student.domain != placed.domain or student.calibrator.reliability >= 1:
                continue
            found, _ = await self._dispatch.try_student(asked.request, student, view.adapters[student.name], least=None)
            if found is None or not found.attempts[0].accepted:
                continue
            await self._bill(asked, placed, found.answer, student.name, student.tier, "does it keep its promise again?")
            await self._compare(asked, placed, teachers, found.attempts, served=False, observed=observed)

    async def _compare(
        self,
        asked: Asked,
        placed: Placed,
        teachers: Answer,
        attempts: Sequence[Attempt],
        *,
        served: bool,
        observed: float,
    ) -> None:
        """What each try is worth beside the teacher's answer: as good when it says the same, or when the judge finds it no worse."""
        if teachers.finish_reason != "stop" or not teachers.text:
            return
        for attempt in attempts:
            good = scoring.matches(attempt.answer, teachers.text)
            judged = not good and self._judging.able
            if judged:
                verdict, asking = await self._judging.compare(asked.request.prompt, attempt.answer, teachers.text)
                for answer, name in asking:
                    await self._bill(asked, placed, answer, name, "teacher", "judged an answer")
                if len(asking) < 2:  # a judge that is down has said nothing, and nothing is noted
                    continue
                good = verdict.acceptable
            outcome = Outcome(
                asked.caller.tenant_id, asked.id, attempt.model, attempt.digest, placed.domain, attempt.score, attempt.confidence,
                float(good), served, "judge" if judged else "teacher", observed,
            )  # fmt: skip
            await outcomes.add(self._pool, [outcome])

    async def as_good(self, asked: Asked, question: str, kept: str, fresh: str) -> bool:
        """Whether the judge finds a kept answer no worse than a fresh one; without a judge nobody finds so."""
        if not self._judging.able:
            return False
        verdict, asking = await self._judging.compare(question, kept, fresh)
        for answer, name in asking:
            await self._bill(asked, Placed(asked.given_domain, None, "a kept answer"), answer, name, "teacher", "judged a kept answer")
        return len(asking) == 2 and verdict.acceptable  # half a judge's word would count as a tie

    async def _bill(self, asked: Asked, placed: Placed, answer: Answer, model: str, tier: Tier, reason: str) -> None:
        """Its line on the tenant's bill; no text of it is kept, and it counts as no query."""
        now = self._clock()
        await self._recorder.record(
            Interaction(
                request_id=new_id("shadow", now),
                tenant_id=asked.caller.tenant_id,
                key_id=asked.caller.key_id,
                created_at=now,
                messages=None,
                prompt_hash=b"",
                answer="",
                model=model,
                tier=tier,
                route="shadow",
                reason=f"{reason}; request {asked.id}",
                cache="bypass",
                domain=placed.domain,
                given_domain=None,
                confidence=None,
                finish_reason=answer.finish_reason,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
                tokens_estimated=answer.estimated,
                cost_microusd=round(answer.cost_usd * 1e6),
                latency_ms=0,
                endpoint="shadow",
            )
        )
