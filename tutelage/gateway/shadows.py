"""After a reply is given: what was its answer worth? Tries that were not given are held against the teacher's answer, which is there
anyway; of a share of students' answers that were given the teacher is asked in the background, on the tenant's bill as endpoint `shadow`.
A student whose promise is broken is asked behind the teacher's back instead, so that it can win its confidence back; a challenger is asked
beside the champion, so that verdicts on the request tell of both.

Nothing here delays a reply or fails a request: more shadows than may run at once are not drawn. It refuses to know what follows from an
outcome.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from tutelage.records import Attempt, Interaction, Outcome, Tier
from tutelage.routing.drift import looked_at
from tutelage.settings import RoutingSettings
from tutelage.stores import outcomes
from tutelage.stores.database import Pool
from tutelage.stores.interactions import Recorder, add_attempt

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # that long a worker that stops waits for shadows under way


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
        if chosen.strategy is None or (given.tier == "teacher" and not view.students):
            return
        settings = self._routing()
        challenger = view.challengers.get(placed.domain or "")
        beside = challenger is not None and given.attempts and all(a.digest != challenger.student.digest for a in given.attempts)
        if challenger is not None and beside and self._drawn(settings.shadow_challenger):
            self._start(self._ask_challenger(asked, placed, challenger, place=len(given.attempts)))
        tried = [attempt for attempt in given.attempts if attempt.score is not None and attempt.confidence]  # whole ones
        share = max((looked_at(settings.shadow, s.calibrator) for s in view.students if s.domain == placed.domain), default=settings.shadow)
        drawn = self._drawn(share)
        if given.tier == "teacher" and tried:
            looked = 1 - (1 - (chosen.propensity or 1.0)) * (1 - share)
            self._start(self._compare(asked, placed, given.answer, tried, served=False, observed=looked))
        elif tried and tried[-1].accepted and given.model == tried[-1].model and drawn:
            looked = 1 - (chosen.propensity or 1.0) * (1 - share)
            self._start(self._ask_teacher(asked, placed, tried[-1], observed=looked))
        elif given.tier != "teacher" and not tried and drawn:
            alone = Attempt(given.model, given.tier, None, given.answer.text, None, None, True, given.reason, 0)
            self._start(self._ask_teacher(asked, placed, alone, observed=share))
        elif given.tier == "teacher" and drawn:
            self._start(self._ask_doubted(asked, view, placed, given.answer, observed=share))

    def _drawn(self, share: float) -> bool:
        return self._random.random() < share and len(self._running) < self._routing().shadows_at_once

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

    async def _ask_teacher(self, asked: Asked, placed: Placed, attempt: Attempt, *, observed: float) -> None:
        answer, name = await self._dispatch.ask_teacher(asked.request, placed)
        await self._bill(asked, placed, answer, name, "teacher", f"a sample of what {attempt.model} answers, beside the teacher")
        await self._compare(asked, placed, answer, [attempt], served=True, observed=observed)

    async def _ask_challenger(self, asked: Asked, placed: Placed, challenger: Challenger, *, place: int) -> None:
        """Its answer to a request that the champion tried, kept as one more attempt at it."""
        found = await self._dispatch.try_student(asked.request, challenger.student, challenger.adapter, least=None)
        if found is None:
            return
        await self._bill(asked, placed, found.answer, challenger.student.name, challenger.student.tier, "a challenger beside the champion")
        attempt = replace(found.attempts[0], accepted=False, reason="a challenger beside the champion", cost_microusd=0)
        kept = attempt if asked.caller.bodies == "full" else replace(attempt, answer="")
        await add_attempt(self._pool, asked.id, place, kept)

    async def _ask_doubted(self, asked: Asked, view: TenantView, placed: Placed, teachers: Answer, *, observed: float) -> None:
        for student in view.students:
            if student.domain != placed.domain or student.calibrator.reliability >= 1:
                continue
            found = await self._dispatch.try_student(asked.request, student, view.adapters[student.name], least=None)
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
        await self._recorder.record(
            Interaction(
                request_id=f"shadow-{os.urandom(16).hex()}",
                tenant_id=asked.caller.tenant_id,
                key_id=asked.caller.key_id,
                created_at=self._clock(),
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
