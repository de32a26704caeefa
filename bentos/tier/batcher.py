"""Requests in, batches out: the queue between HTTP and the engine.

Knows asyncio and one worker thread. It refuses to know HTTP. A batch runs to its end; requests that arrive meanwhile wait
for the next one, and beyond `max_waiting` they are refused. When a batch fails its requests run again one by one, so that one adapter's
fault is not the others'.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from inference.batching import next_batch
from inference.generation import Completion, Engine, Request, Token
from inference.rack import Attached
from tutelage.errors import TutelageError, Unavailable

log = logging.getLogger(__name__)


class Overloaded(TutelageError):
    """More requests wait than the tier accepts."""

    status = 429
    type = "rate_limit_error"
    code = "tier_overloaded"


@dataclass(eq=False)
class Job:
    """One request on its way. Events arrive in order: tokens (when streamed), then a Completion or an error."""

    request: Request
    digest: str
    prompt_tokens: int
    streamed: bool
    pinned: Attached | None
    cancelled: bool = False
    told: bool = False  # a token or the completion: it cannot run again
    answered: bool = False
    events: asyncio.Queue[Token | Completion | TutelageError] = field(default_factory=asyncio.Queue)

    async def tokens(self) -> AsyncIterator[Token | Completion]:
        """Yield tokens as they come and the completion last. Raises what the engine raised."""
        while True:
            event = await self.events.get()
            if isinstance(event, TutelageError):
                raise event
            if isinstance(event, Completion) and event.finish_reason == "cancelled":
                raise Unavailable("this tier is shutting down; try again", retry_after=1)
            yield event
            if isinstance(event, Completion):
                return

    async def completion(self) -> Completion:
        """Wait for the whole answer. Raises what the engine raised."""
        async for event in self.tokens():
            if isinstance(event, Completion):
                return event
        raise AssertionError("tokens() ends with a completion or raises")

    def cancel(self) -> None:
        """Nobody waits for this any more: leave the queue, or the running batch at its next step."""
        self.cancelled = True


class Batcher:
    """Runs an engine's batches in one thread of its own, oldest request first."""

    def __init__(
        self,
        engine: Engine,
        *,
        thread: ThreadPoolExecutor,
        max_batch: int,
        max_waiting: int,
        window_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._thread = thread
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._window = window_seconds
        self._clock = clock
        self._waiting: list[Job] = []
        self._arrived = asyncio.Event()
        self._batch_seconds = 1.0  # how long the last batch took
        self._runner = asyncio.create_task(self._run(), name="tier-batches")

    async def submit(self, request: Request, *, streamed: bool) -> Job:
        """Queue a request. Raises ModelNotFound, InvalidRequest, or Overloaded with when to come back.

        The adapter is the one its name means now, whatever is loaded under that name until the answer is complete.
        """
        self._refuse_when_full()
        pinned = None if request.adapter is None else self._engine.pin(request.adapter)
        try:
            request = replace(request, adapter=pinned.key if pinned else None)
            length = await asyncio.to_thread(self._engine.check, request)
            self._refuse_when_full()
        except BaseException:
            self._unpin(pinned)
            raise
        digest = pinned.digest if pinned else self._engine.fingerprint
        job = Job(request, digest, length, streamed, pinned)
        self._waiting.append(job)
        self._arrived.set()
        return job

    async def close(self) -> None:
        """Stop. Requests that wait are told that the tier is going away; a running batch ends at its next step."""
        self._runner.cancel()
        await asyncio.gather(self._runner, return_exceptions=True)
        for job in self._waiting:
            self._fail(job, Unavailable("this tier is shutting down; try again", retry_after=1))
        self._waiting.clear()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await asyncio.sleep(self._window)  # requests that arrive together share a pass
            jobs = self._take()
            if jobs:
                await self._answer(jobs)

    def _take(self) -> list[Job]:
        """Remove and return the jobs that run next; forget those nobody waits for."""
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            self._unpin(job.pinned)
        chosen = next_batch([job.prompt_tokens for job in self._waiting], max_rows=self._max_batch)
        jobs = [self._waiting[position] for position in chosen]
        self._waiting = [job for job in self._waiting if job not in jobs]
        if not self._waiting:
            self._arrived.clear()
        return jobs

    async def _answer(self, jobs: list[Job]) -> None:
        started = self._clock()
        try:
            await self._attempt(jobs)
        finally:
            for job in jobs:
                self._unpin(job.pinned)
            self._batch_seconds = self._clock() - started

    async def _attempt(self, jobs: list[Job]) -> None:
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._thread, self._generate, loop, jobs)
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            for job in jobs:
                job.cancel()
            await asyncio.wait([running])
            raise
        except Exception:  # the top of this process's worker: one failed batch must not end the tier
            log.exception("a batch of %d requests failed", len(jobs))
            for job in jobs:
                if len(jobs) > 1 and not job.told:
                    await self._attempt([job])
                elif not job.answered:
                    self._fail(job, TutelageError("the tier failed to generate; the cause is in its log"))

    def _generate(self, loop: asyncio.AbstractEventLoop, jobs: list[Job]) -> None:
        """In the worker thread: run one batch, handing each event to the loop as it happens."""

        def tell(index: int, event: Token | Completion) -> None:
            jobs[index].told, jobs[index].answered = True, isinstance(event, Completion)
            loop.call_soon_threadsafe(jobs[index].events.put_nowait, event)

        def on_token(index: int, token: Token) -> None:
            if jobs[index].streamed:
                tell(index, token)

        self._engine.generate(
            [job.request for job in jobs],
            on_token=on_token,
            on_finish=tell,
            cancelled=lambda index: jobs[index].cancelled,
        )

    def _refuse_when_full(self) -> None:
        if len(self._waiting) >= self._max_waiting:
            batches = len(self._waiting) / self._max_batch
            wait = max(1, min(60, math.ceil(batches * self._batch_seconds)))
            raise Overloaded(f"{len(self._waiting)} requests wait already; try again in {wait} s", retry_after=wait)

    def _fail(self, job: Job, error: TutelageError) -> None:
        job.events.put_nowait(error)

    def _unpin(self, pinned: Attached | None) -> None:
        if pinned:
            self._engine.unpin(pinned)
