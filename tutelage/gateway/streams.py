"""A model's stream on its way through: read by a task of its own, and collected into the completion it amounts to.

It refuses to know who listens and what an answer is worth.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from tutelage.errors import BackendFailed
from tutelage.fleet.backends import Answer, Backend

log = logging.getLogger(__name__)


class Relay:
    """Chunks read as they come. A listener that is cancelled loses none: whoever listens next hears the rest."""

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        self._arrived: asyncio.Queue[dict[str, Any] | BackendFailed | None] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read(chunks))

    def __aiter__(self) -> Relay:
        return self

    async def __anext__(self) -> dict[str, Any]:
        """Raises BackendFailed where the model broke off."""
        chunk = await self._arrived.get()
        if isinstance(chunk, dict):
            return chunk
        self._arrived.put_nowait(chunk)  # whoever asks again hears of the same end
        raise chunk or StopAsyncIteration

    def break_off(self, why: BackendFailed) -> None:
        """End what the listener hears with `why`, after what has arrived."""
        self._reader.cancel()
        self._arrived.put_nowait(why)

    async def stop(self) -> None:
        """Hang up on the model; what has arrived can still be heard."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def _read(self, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        end: BackendFailed | None = None
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    self._arrived.put_nowait(chunk)
        except BackendFailed as failed:
            end = failed
        except Exception:
            log.exception("a stream could not be read")
            end = BackendFailed("the model's stream could not be read; the log has the details")
        finally:
            self._arrived.put_nowait(end)


class Heard:
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

    def answer(self, backend: Backend, payload: dict[str, Any], count: Callable[[str], int], *, ended: str | None = None) -> Answer:
        """What was heard as a whole answer; `ended` says how one ended that was cut off. Raises BackendFailed for no answer at all,
        and for one of which the model never said that it is whole."""
        choices: list[dict[str, Any]] = []
        for index, heard in sorted(self._choices.items()):
            message: dict[str, Any] = {"role": "assistant", "content": "".join(heard["content"])}
            if heard["tool_calls"]:
                message["tool_calls"] = [call for _, call in sorted(heard["tool_calls"].items())]
            logprobs = {"content": heard["logprobs"]} if heard["logprobs"] else None
            choices.append({"index": index, "message": message, "finish_reason": ended or heard["finish_reason"], "logprobs": logprobs})
        if ended and not choices:
            choices.append({"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": ended, "logprobs": None})
        if not choices:
            raise BackendFailed(f"model {backend.name} ended its stream without an answer")
        if any(choice["finish_reason"] is None for choice in choices):
            raise BackendFailed(f"model {backend.name} ended its stream without a finish reason: nobody knows whether it is whole")
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
