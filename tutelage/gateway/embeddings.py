"""Embeddings by the local encoder, admitted, recorded and billed like any other request; the price is its CPU time.

It refuses to know HTTP and what embeddings are used for.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tutelage.errors import InvalidRequest, ModelNotFound
from tutelage.gateway import openai
from tutelage.gateway.admission import Admission, Estimate
from tutelage.gateway.callers import Caller
from tutelage.records import Interaction, new_id
from tutelage.routing.encoder import Encoder
from tutelage.stores.interactions import Recorder
from tutelage.stores.replies import Held, StoredReply
from tutelage.telemetry import Metrics

if TYPE_CHECKING:
    import numpy as np

MODEL = "all-minilm-l6-v2"
PIECE = 64  # texts encoded in one go: other requests' threads get their turn in between


class Embeddings:
    """The encoder as a model of the gateway."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        admission: Admission,
        recorder: Recorder,
        metrics: Metrics,
        core_hour_usd: float,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._encoder = encoder
        self._admission = admission
        self._recorder = recorder
        self._metrics = metrics
        self._core_hour = core_hour_usd
        self._clock = clock

    async def answer(self, request: openai.EmbeddingRequest, caller: Caller, held: Held | None) -> StoredReply:
        """The reply, as it goes out; its interaction is durable when this returns, and so is the reply if an idempotency key is held.

        Raises:
            ModelNotFound, Forbidden, LimitReached: it may not or cannot run.
            InvalidRequest: another number of dimensions than the encoder has.
        """
        caller.check_model(request.model)
        if request.model != MODEL:
            raise ModelNotFound(f"model {request.model!r} makes no embeddings here; available: {MODEL}", param="model")
        if request.dimensions not in (None, self._encoder.dimension):
            raise InvalidRequest(f"{MODEL} has {self._encoder.dimension} dimensions, no others", param="dimensions")
        texts, started, request_id = request.texts(), time.monotonic(), new_id("embd", self._clock())
        reserved = Estimate(sum(map(len, texts)) // 3 + 1, 0)
        async with self._admission.granted(request_id, (caller.tenant, caller.key), reserved) as meter:
            vectors, tokens, seconds = await self._encode(texts)
            cost = seconds / 3600 * self._core_hour
            data = [{"object": "embedding", "index": i, "embedding": _written(v, request.encoding_format)} for i, v in enumerate(vectors)]
            body = {"object": "list", "data": data, "model": MODEL, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
            headers = {"x-request-id": request_id, "x-tutelage-model": MODEL, "x-tutelage-cost-usd": f"{cost:.9f}"}
            reply = StoredReply(headers, openai.JSON, json.dumps(body).encode())
            interaction = self._interaction(request_id, caller, texts, tokens, cost, started)
            await self._recorder.record(interaction, (held, reply) if held else None)
            meter.settle(tokens=tokens, cost_microusd=round(cost * 1e6))
        self._metrics.answered("encoder", "direct", "bypass", time.monotonic() - started, cost)
        return reply

    async def _encode(self, texts: list[str]) -> tuple[list[np.ndarray], int, float]:
        """Vectors in the order of `texts`, their tokens, and the CPU seconds they took."""
        vectors: list[np.ndarray] = []
        tokens, seconds = 0, 0.0
        for start in range(0, len(texts), PIECE):
            piece = texts[start : start + PIECE]
            found, counted, took = await asyncio.to_thread(self._work, piece)
            vectors += found
            tokens += counted
            seconds += took
        return vectors, tokens, seconds

    def _work(self, texts: list[str]) -> tuple[list[np.ndarray], int, float]:
        started = time.thread_time()  # the encoder computes in the thread that calls it
        return list(self._encoder.encode(texts)), sum(map(self._encoder.count_tokens, texts)), time.thread_time() - started

    def _interaction(self, request_id: str, caller: Caller, texts: list[str], tokens: int, cost: float, started: float) -> Interaction:
        return Interaction(
            request_id=request_id,
            tenant_id=caller.tenant_id,
            key_id=caller.key_id,
            created_at=self._clock(),
            messages=None,  # texts to embed are data, often whole documents: none of them is kept
            prompt_hash=hashlib.sha256("\n".join(texts).encode()).digest(),
            answer="",
            model=MODEL,
            tier="encoder",
            route="direct",
            reason="the client named the model",
            cache="bypass",
            domain=None,
            given_domain=None,
            confidence=None,
            finish_reason="stop",
            prompt_tokens=tokens,
            completion_tokens=0,
            tokens_estimated=False,
            cost_microusd=round(cost * 1e6),
            latency_ms=round((time.monotonic() - started) * 1000),
            endpoint="embeddings",
        )


def _written(vector: np.ndarray, encoding: str) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(x) for x in vector]
