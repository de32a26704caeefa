"""A request on one page: authenticate → admit → cache → join → wait for a turn → place → ask → record → reply.

It refuses to know HTTP (`endpoints.py`) and how any of the steps is done.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

from tutelage.errors import BackendFailed, Draining, TutelageError
from tutelage.fleet.backends import Answer, list_price
from tutelage.gateway import openai
from tutelage.gateway.admission import Admission, Estimate
from tutelage.gateway.cache import Cache, CacheKey, Entry, Looking, cache_key
from tutelage.gateway.callers import Caller
from tutelage.gateway.dispatch import Alone, Dispatch, payload, spoken
from tutelage.gateway.exchange import Asked, Options, Outcome, Placed, Reply
from tutelage.gateway.freshness import freshness
from tutelage.gateway.recording import Recording, reply_headers
from tutelage.gateway.semantic import Near, Semantic
from tutelage.gateway.shadows import Shadows
from tutelage.gateway.snapshot import TenantView, Watcher
from tutelage.gateway.streams import Heard, Relay
from tutelage.gateway.turns import Turns
from tutelage.records import CacheState, new_id
from tutelage.routing.encoder import Encoder
from tutelage.routing.equivalence import Question
from tutelage.settings import GatewaySettings
from tutelage.stores.replies import Held

log = logging.getLogger(__name__)

Found = tuple[Placed, Outcome]


class Admitted(NamedTuple):
    """A request that may run, where answers to it are kept, and the look there that began meanwhile."""

    asked: Asked
    view: TenantView
    place: CacheKey
    looking: Looking | None


class Looked(NamedTuple):
    """What the cache says to a request: the outcome of a hit, or what is to be kept of the answer that must be asked for. `near` was not
    good enough to be served and is compared with it."""

    state: CacheState
    outcome: Outcome | None = None
    question: Question | None = None
    near: Near | None = None


class Led:
    """The call that a stream makes for all identical requests that come while it runs: they wait for its end and get the whole. If it
    ends otherwise, the next of them asks."""

    def __init__(self, running: dict[CacheKey, asyncio.Future[Found]], place: CacheKey) -> None:
        self._running, self.place = running, place
        self._future = running[place] = asyncio.get_running_loop().create_future()

    def found(self, found: Found) -> None:
        self._future.set_result(found)

    def leave(self) -> None:
        """Works once; whoever waits for what was not found goes on by itself."""
        if self._running.get(self.place) is self._future:
            del self._running[self.place]
        self._future.cancel()


class Pipeline:
    """Holds what a request needs; one a worker."""

    def __init__(
        self,
        *,
        watcher: Watcher,
        cache: Cache,
        semantic: Semantic,
        admission: Admission,
        turns: Turns,
        dispatch: Dispatch,
        recording: Recording,
        shadows: Shadows,
        encoder: Encoder,
        settings: Callable[[], GatewaySettings],
        secret: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watcher = watcher
        self._cache = cache
        self._semantic = semantic
        self._admission = admission
        self._turns = turns
        self._dispatch = dispatch
        self._recording = recording
        self._shadows = shadows
        self._encoder = encoder
        self._settings = settings
        self._secret = secret.encode()
        self._clock = clock
        self._monotonic = monotonic
        self._running: dict[CacheKey, asyncio.Future[Found]] = {}
        self._relays: set[Relay] = set()  # streams that are passed through just now
        self._cut: set[asyncio.Task[None]] = set()  # streams that were cut off, while they are being settled

    async def close(self) -> None:
        """Wait until streams that were cut off are recorded."""
        await asyncio.gather(*self._cut, return_exceptions=True)
        await self._shadows.close()

    def cut_streams(self) -> None:
        """End every stream that is still passed through with an error that says to try again: this worker is about to stop."""
        for relay in self._relays:
            relay.break_off(Draining("the gateway restarts and cannot finish this stream; send the request again", retry_after=1))

    async def admit(self, chat: openai.Chat, caller: Caller, options: Options, held: Held | None) -> Admitted:
        """The request with its right to run, until `end`. Raises Forbidden, LimitReached. Valkey is asked for both at once: may it run,
        and was it answered before?"""
        caller.check_model(chat.model)
        meter = self._admission.meter(new_id("chatcmpl", self._clock()), (caller.tenant, caller.key), self._estimate(chat))
        asked = Asked(chat, caller, options, held, meter, self._monotonic())
        view = self._watcher.current.view(caller.tenant_id)
        place = self._cache_key(asked, view)
        looking = self._cache.begin(place) if _cacheable(asked) else None
        await self._admission.grant(meter)
        return Admitted(asked, view, place, looking)

    def end(self, admitted: Admitted) -> None:
        """Its reply has ended: what it did not take is given back."""
        self._admission.end(admitted.asked.meter)

    def _estimate(self, chat: openai.Chat) -> Estimate:
        """The most that a request is likely to take: every third character a token, the longest answer it may get, the dearest
        model that may answer."""
        prompt = chat.characters // 3 + 1
        answers = (chat.longest or self._settings().reserve_tokens) * chat.n
        return Estimate(prompt + answers, math.ceil(list_price(self._dispatch.models.dearest, prompt, answers) * 1e6))

    async def answer(self, admitted: Admitted) -> Reply:
        """One request from start to end; its interaction is durable when this returns."""
        return await self._answered(admitted, await self._look_up(admitted))

    async def _answered(self, admitted: Admitted, looked: Looked) -> Reply:
        asked, view, place, _ = admitted
        if looked.outcome is not None:
            placed = Placed(looked.outcome.domain, None, "served from cache")
            return await self._recording.finish(asked, looked.outcome, placed, looked.state)
        if looked.state == "bypass":
            placed, outcome = await self._place_and_ask(asked, view)
            reply = await self._recording.finish(asked, outcome, placed, looked.state)
            self._shadows.consider(asked, view, placed, outcome)
            return reply
        joined = place in self._running
        placed, outcome = await self._together(place, asked, view)
        if joined:
            return await self._recording.finish(asked, _shared(outcome), placed, "hit-exact")
        reply = await self._recording.finish(asked, outcome, placed, looked.state)
        self._remember(place, asked, outcome, placed, looked)
        self._shadows.consider(asked, view, placed, outcome)
        return reply

    async def stream(self, admitted: Admitted) -> tuple[dict[str, str], AsyncGenerator[dict[str, Any], None]]:
        """As `answer`, in chunks. A model that answers alone is passed through as it speaks; a cascade must see the whole answer
        before it can judge it. The last chunk is held back until the interaction is durable."""
        asked, view, place, _ = admitted
        looked = await self._look_up(admitted)
        if looked.state == "bypass" or (looked.state == "miss" and place not in self._running):
            led = Led(self._running, place) if looked.state == "miss" else None
            try:
                placed = await self._dispatch.place(asked, view)
                alone = self._dispatch.alone(asked, view, placed)
                if alone is not None:
                    return await self._pass_through(asked, placed, alone, led, looked)
            except BaseException:
                if led is not None:
                    led.leave()
                raise
            if led is not None:
                led.leave()
        reply = await self._answered(admitted, looked)
        return reply.headers, _each(reply.chunks)

    async def _together(self, place: CacheKey, asked: Asked, view: TenantView) -> Found:
        """Identical requests of a tenant that are under way at once share one call. If the one that makes it goes away, the next does."""
        while (running := self._running.get(place)) is not None:
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                if not running.cancelled():
                    raise
        running = self._running[place] = asyncio.get_running_loop().create_future()
        try:
            found = await self._place_and_ask(asked, view)
        except BaseException as failed:
            if isinstance(failed, Exception):
                running.set_exception(failed)
                running.exception()  # those who wait have it; if nobody does, asyncio must not complain
            else:
                running.cancel()
            raise
        else:
            running.set_result(found)
            return found
        finally:
            del self._running[place]

    async def _place_and_ask(self, asked: Asked, view: TenantView) -> Found:
        tenant_id = asked.caller.tenant_id
        began = await self._turns.take(tenant_id, asked.options.priority)
        try:
            placed = await self._dispatch.place(asked, view)
            return placed, await self._dispatch.ask(asked, view, placed)
        finally:
            self._turns.end(tenant_id, began)

    # --- cache -----------------------------------------------------------------------------------------------------

    def _policy(self, asked: Asked, view: TenantView) -> str:
        return f"{asked.caller.erasures}:{self._dispatch.policy(asked, view)}"

    def _cache_key(self, asked: Asked, view: TenantView) -> CacheKey:
        return cache_key(asked.caller.tenant_id, asked.request.shape, secret=self._secret, policy=self._policy(asked, view))

    async def _look_up(self, admitted: Admitted) -> Looked:
        asked, view, place, looking = admitted
        if not _cacheable(asked):
            return Looked("bypass")
        servable = self._dispatch.servable(view)
        found = await self._cache.find(place, servable=servable, looking=looking)
        if found is not None:
            return Looked("hit-exact", _kept(found, "the same request was answered before"))
        question = self._semantic.question(asked, self._policy(asked, view))
        near = await self._semantic.find(asked, question, servable=servable) if question is not None else None
        if near is not None and near.served:
            return Looked("hit-semantic", _kept(near.entry, near.reason))
        return Looked("miss", None, question, near)

    def _remember(self, place: CacheKey, asked: Asked, outcome: Outcome, placed: Placed, looked: Looked) -> None:
        """Keep a whole answer for as long as it is likely to be true; what was kept of a like question is compared with it."""
        answer, question = outcome.answer, looked.question
        if looked.near is not None:
            self._semantic.compare(asked, looked.near, answer)
        if answer.finish_reason != "stop" or outcome.route.endswith("degraded"):
            return
        agreed = asked.caller.cache_seconds
        fresh = freshness(asked.request.prompt, default_seconds=self._settings().cache_ttl_seconds if agreed is None else agreed)
        if not fresh.seconds:
            return
        text, context = (question.text, question.context) if question is not None else (None, "")
        entry = Entry(
            answer.body, answer.prompt_tokens, answer.completion_tokens, outcome.model, outcome.tier, outcome.confidence, placed.domain,
            outcome.lineage, self._clock().timestamp() + fresh.seconds, text, context, outcome.standard,
        )  # fmt: skip
        self._cache.keep(place, entry)
        if question is not None:
            self._semantic.keep(question, place, entry)

    # --- streams -----------------------------------------------------------------------------------------------------

    async def _pass_through(
        self, asked: Asked, placed: Placed, alone: Alone, led: Led | None, looked: Looked
    ) -> tuple[dict[str, str], AsyncGenerator[dict[str, Any], None]]:
        tenant_id = asked.caller.tenant_id
        began = await self._turns.take(tenant_id, asked.options.priority)
        try:
            backend, chunks, first = await self._dispatch.begin(asked.request, placed, alone)
        except BaseException:
            self._turns.end(tenant_id, began)
            raise
        state = looked.state
        relay, body = Relay(chunks), payload(asked.request)
        self._relays.add(relay)
        heard = Heard(asked.id, int(self._clock().timestamp()), backend.name)

        def outcome(ended: str | None = None) -> Outcome:
            answer = heard.answer(backend, body, self._encoder.count_tokens, ended=ended)
            name = backend.name
            return spoken(alone, answer, name, self._dispatch.tier_of(name, alone), self._dispatch.lineage(name, alone))

        async def speak() -> AsyncGenerator[dict[str, Any], None]:
            spoken: list[dict[str, Any]] = []
            ended = "cancelled"  # how the stream ends for the client, unless something else becomes of it
            try:
                yield {}  # nobody hears this: a generator that was never begun would settle nothing when it is closed
                spoken.append(heard.listen(first))
                yield spoken[-1]
                async for chunk in relay:
                    # finish reasons are withheld: they are the acknowledgement, and nothing is acknowledged before it is recorded
                    visible = heard.listen(chunk)
                    if visible["choices"]:
                        spoken.append(visible)
                        yield visible
                ended = "whole"
                whole = outcome()
                if led is not None:
                    led.found((placed, whole))
                reply = await self._recording.finish(asked, whole, placed, state, spoken=spoken)
                if led is not None:
                    self._remember(led.place, asked, whole, placed, looked)
                for chunk in reply.chunks:
                    yield chunk
            except BackendFailed:
                ended = "error"
                raise
            finally:
                self._relays.discard(relay)
                if led is not None:
                    led.leave()
                self._turns.end(tenant_id, began)
                if ended in ("cancelled", "error"):
                    self._settle(asked, partial(_rest, asked, relay, heard, outcome, ended), placed, state)

        nothing = Answer({"choices": [{"message": {}}]}, 0, 0, True, 0.0)
        spoken_by = spoken(alone, nothing, backend.name, self._dispatch.tier_of(backend.name, alone), "")
        speech = speak()
        await anext(speech)
        return reply_headers(spoken_by, placed, state, asked.id, cost=False), speech

    def _settle(self, asked: Asked, rest: Callable[[], Awaitable[Outcome]], placed: Placed, state: CacheState) -> None:
        """Bill what was produced of a stream that was cut off. It outlives the request; until it is known, the request counts as
        what it had reserved."""
        asked.meter.settle(tokens=asked.meter.reserved.tokens, cost_microusd=asked.meter.reserved.cost_microusd)

        async def record() -> None:
            try:
                await self._recording.finish(asked._replace(held=None), await rest(), placed, state)
            except TutelageError as failed:
                log.error("a cut stream could not be recorded: request %s: %s", asked.id, failed.message)

        task = asyncio.create_task(record())
        self._cut.add(task)
        task.add_done_callback(self._cut.discard)


async def _rest(asked: Asked, relay: Relay, heard: Heard, outcome: Callable[[str | None], Outcome], ended: str) -> Outcome:
    """What the model said to a client that left: up to now, or to its end where the tenant wants the answer on record."""
    drained = ended == "cancelled" and asked.caller.on_disconnect == "drain"
    if ended == "cancelled" and not drained:
        await relay.stop()
    try:
        async for chunk in relay:
            heard.listen(chunk)
        return outcome(None if drained else ended)
    except BackendFailed:
        return outcome("error")


def _cacheable(asked: Asked) -> bool:
    return not asked.options.cache and not asked.request.sampled


def _kept(entry: Entry, reason: str) -> Outcome:
    """A kept answer as the outcome of another request: it costs nothing."""
    answer = Answer(entry.body, entry.prompt_tokens, entry.completion_tokens, True, 0.0)
    return Outcome(answer, entry.model, entry.tier, "cache", reason, entry.confidence, (), entry.domain, entry.lineage)


def _shared(outcome: Outcome) -> Outcome:
    """An outcome as a later one of identical requests gets it: the first has paid for it."""
    free = outcome.answer._replace(cost_usd=0.0)
    nobody = outcome.chosen._replace(propensity=None)  # what was drawn was drawn for the first
    return outcome._replace(answer=free, route="coalesced", reason="the same request was being answered", attempts=(), chosen=nobody)


async def _each(chunks: Sequence[dict[str, Any]]) -> AsyncGenerator[dict[str, Any], None]:
    for chunk in chunks:
        yield chunk
