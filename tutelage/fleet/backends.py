"""Clients of the models behind the gateway: one protocol, an HTTP client of anything that speaks OpenAI chat, and a recorded one.

It refuses to know who should answer; it says what an answer cost and whether another try elsewhere can help.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from tutelage.errors import BackendFailed, BackendRefused, ConfigInvalid, NotFound
from tutelage.settings import ModelEntry, Price

RETRY_STATUS = {408, 409, 429, 500, 502, 503, 504}
RETRY_WAIT_SECONDS = 0.25


@dataclass(frozen=True)
class Answer:
    """A model's reply: the OpenAI body, token counts, whether they are our estimate, and its cost in US dollars."""

    body: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    estimated: bool
    cost_usd: float

    @property
    def text(self) -> str:
        return str(self.body["choices"][0]["message"].get("content") or "")

    @property
    def finish_reason(self) -> str | None:
        reason = self.body["choices"][0].get("finish_reason")
        return str(reason) if reason else None

    @property
    def logprobs(self) -> list[float]:
        """Log-probability of every token of the first choice, the stop token included; empty when the model gave none."""
        content = (self.body["choices"][0].get("logprobs") or {}).get("content") or []
        return [float(token["logprob"]) for token in content]


class Backend(Protocol):
    """One model that can answer."""

    name: str

    async def complete(self, payload: dict[str, Any]) -> Answer:
        """Raises BackendFailed (another may do better) or BackendRefused (nobody will)."""
        ...

    def stream(self, payload: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """OpenAI chunks, without the closing [DONE]; the last ones carry finish reasons and usage. Raises as `complete`."""
        ...

    def count(self, usage: dict[str, Any] | None, payload: dict[str, Any], text: str) -> tuple[int, int, bool]:
        """Prompt and completion tokens, and whether they are our estimate because the model sent none."""
        ...

    def price(self, body: dict[str, Any], prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars for one reply."""
        ...


class OpenAIBackend:
    """An OpenAI-compatible endpoint: a provider, vLLM, Ollama, or a tier of ours (whose cost is core-seconds)."""

    def __init__(
        self,
        name: str,
        client: httpx.AsyncClient,
        *,
        base_url: str,
        model: str,
        api_key: str | None,
        price: Price | None,
        timeout_seconds: float,
        count_tokens: Callable[[str], int],
        core_hour_usd: float = 0.0,
    ) -> None:
        self.name = name
        self._client = client
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model = model
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._price = price
        self._timeout = httpx.Timeout(timeout_seconds, connect=min(5.0, timeout_seconds))
        self._count = count_tokens
        self._core_hour = core_hour_usd

    async def complete(self, payload: dict[str, Any]) -> Answer:
        body = {**payload, "model": self._model, "stream": False}
        body.pop("stream_options", None)
        for last in (False, True):
            try:
                response = await self._client.post(self._url, json=body, headers=self._headers, timeout=self._timeout)
            except httpx.HTTPError as failed:
                if last:
                    raise BackendFailed(f"model {self.name} did not answer: {type(failed).__name__}") from failed
            else:
                if response.status_code == 200:
                    return self._answer(response, payload)
                if last or response.status_code not in RETRY_STATUS:
                    raise self._failure(response.status_code, response.content)
            await asyncio.sleep(RETRY_WAIT_SECONDS)
        raise AssertionError("unreachable: the second try returns or raises")

    def _answer(self, response: httpx.Response, payload: dict[str, Any]) -> Answer:
        try:
            body = response.json()
            text = str(body["choices"][0]["message"].get("content") or "")
        except (ValueError, LookupError, TypeError, AttributeError) as broken:
            raise BackendFailed(f"model {self.name} sent a reply that is not a chat completion") from broken
        prompt_tokens, completion_tokens, estimated = self.count(body.get("usage"), payload, text)
        return Answer(body, prompt_tokens, completion_tokens, estimated, self.price(body, prompt_tokens, completion_tokens))

    async def stream(self, payload: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        body = {**payload, "model": self._model, "stream": True, "stream_options": {"include_usage": True}}
        try:
            request = self._client.build_request("POST", self._url, json=body, headers=self._headers, timeout=self._timeout)
            response = await self._client.send(request, stream=True)
            try:
                if response.status_code != 200:
                    raise self._failure(response.status_code, await response.aread())
                finished = False
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        finished = True
                        break
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise BackendFailed(f"model {self.name} failed while answering")
                    yield chunk
                if not finished:
                    raise BackendFailed(f"model {self.name} broke off its stream")
            finally:
                await response.aclose()
        except (httpx.HTTPError, ValueError) as failed:
            if isinstance(failed, BackendRefused | BackendFailed):
                raise
            raise BackendFailed(f"model {self.name} broke off: {type(failed).__name__}") from failed

    def count(self, usage: dict[str, Any] | None, payload: dict[str, Any], text: str) -> tuple[int, int, bool]:
        """Prompt and completion tokens, and whether they are our estimate because the model sent none."""
        if usage and usage.get("prompt_tokens") is not None:
            return int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0), False
        return count_prompt(self._count, payload), self._count(text), True

    def price(self, body: dict[str, Any], prompt_tokens: int, completion_tokens: int) -> float:
        core_seconds = float((body.get("usage") or {}).get("core_seconds") or 0.0)
        listed = list_price(self._price, prompt_tokens, completion_tokens)
        return listed + core_seconds / 3600 * self._core_hour

    def _failure(self, status: int, content: bytes) -> BackendFailed | BackendRefused:
        detail = _message(content)
        if status in RETRY_STATUS or status >= 500 or status in (401, 403):
            # our own credentials are not the client's fault, and what the provider says of them is not the client's business
            said = "" if status in (401, 403) else f": {detail}"
            return BackendFailed(f"model {self.name} answered HTTP {status}{said}")
        return BackendRefused(f"model {self.name} refused the request: {detail}", status=status if 400 <= status < 500 else 400)


class RecordedBackend:
    """Answers from a file of recorded prompts. For demos and backtests; it says so in its name and in every report."""

    def __init__(self, name: str, path: Path, *, price: Price | None, count_tokens: Callable[[str], int]) -> None:
        self.name = name
        self._answers = read_recording(path)
        self._price = price
        self._count = count_tokens

    async def complete(self, payload: dict[str, Any]) -> Answer:
        text = self._answers.get(_conversation(payload["messages"]))
        if text is None:
            raise NotFound(f"{self.name} is a recording and holds no answer to this prompt; configure a real teacher in models.yaml")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": None}
        prompt_tokens, completion_tokens = count_prompt(self._count, payload), self._count(text)
        return Answer(
            {"choices": [choice]}, prompt_tokens, completion_tokens, True, list_price(self._price, prompt_tokens, completion_tokens)
        )

    async def stream(self, payload: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        answer = await self.complete(payload)
        yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": answer.text}, "finish_reason": None}]}
        usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage}

    def count(self, usage: dict[str, Any] | None, payload: dict[str, Any], text: str) -> tuple[int, int, bool]:
        return count_prompt(self._count, payload), self._count(text), True

    def price(self, body: dict[str, Any], prompt_tokens: int, completion_tokens: int) -> float:
        return list_price(self._price, prompt_tokens, completion_tokens)


def build(entry: ModelEntry, client: httpx.AsyncClient, *, count_tokens: Callable[[str], int]) -> OpenAIBackend | RecordedBackend:
    """The backend of one line of models.yaml. The key is read from the environment by the name given there.

    Raises:
        ConfigInvalid: a recording that cannot be read.
    """
    if entry.kind == "recorded":
        return RecordedBackend(entry.name, Path(os.path.expandvars(entry.path or "")), price=entry.price, count_tokens=count_tokens)
    return OpenAIBackend(
        entry.name,
        client,
        base_url=entry.base_url or "",
        model=entry.model or entry.name,
        api_key=os.environ.get(entry.api_key_env) if entry.api_key_env else None,
        price=entry.price,
        timeout_seconds=entry.timeout_seconds,
        count_tokens=count_tokens,
    )


def read_recording(path: Path) -> dict[str, str]:
    """Answers by conversation from a JSONL of {"prompt" or "messages", "answer" (or "label")}.

    Raises:
        ConfigInvalid: the file is missing, or names the line that is not such an object.
    """
    answers: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    asked = row["messages"] if "messages" in row else [{"role": "user", "content": str(row["prompt"])}]
                    answers[_conversation(asked)] = str(row["answer"] if "answer" in row else row["label"])
                except (ValueError, KeyError, TypeError) as broken:
                    raise ConfigInvalid(
                        f'{path}:{number}: expected a JSON object {{"prompt": …, "answer": …}}, found {line[:60]!r}'
                    ) from broken
    except OSError as missing:
        raise ConfigInvalid(f"the recording {path} cannot be read: {missing.strerror}; give `path` in models.yaml") from missing
    return answers


def _conversation(messages: Sequence[dict[str, Any]]) -> str:
    """Roles and contents, so that the same question after another conversation is another one."""
    return json.dumps([[m["role"], m.get("content")] for m in messages], ensure_ascii=False)


def count_prompt(count: Callable[[str], int], payload: dict[str, Any]) -> int:
    """Estimated prompt tokens: the text of every message and four tokens of framing each, as OpenAI counts them."""
    total = 0
    for message in payload["messages"]:
        content = message.get("content")
        parts = [content] if isinstance(content, str) else [p.get("text") or "" for p in content or []]
        total += 4 + sum(count(part) for part in parts)
    return total + 3


def list_price(price: Price | None, prompt_tokens: int, completion_tokens: int) -> float:
    if price is None:
        return 0.0
    return (prompt_tokens * price.input_per_mtok + completion_tokens * price.output_per_mtok) / 1_000_000


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])[:300]
    except (ValueError, LookupError, TypeError):
        return content[:200].decode("utf-8", "replace")
