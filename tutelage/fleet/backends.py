"""Clients of the models behind the gateway: one protocol, an HTTP client of anything that speaks OpenAI chat, and a recorded one.

It refuses to know who should answer; it says what an answer cost and whether another try elsewhere can help.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orjson
from pydantic import BaseModel, ConfigDict, Field

from tutelage.errors import BackendErred, BackendFailed, BackendRefused, ConfigInvalid, NotFound
from tutelage.fleet.endpoint import Deadlines, Endpoint, ReplicaHealth
from tutelage.settings import ModelEntry, Price


class Likely(BaseModel):
    model_config = ConfigDict(extra="allow")
    logprob: float


class Token(Likely):
    top_logprobs: list[Likely] | None = None


class Logprobs(BaseModel):
    model_config = ConfigDict(extra="allow")
    content: list[Token] | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Choice(BaseModel):
    model_config = ConfigDict(extra="allow")
    index: int = 0
    message: Message
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Usage(BaseModel):
    model_config = ConfigDict(extra="allow")
    prompt_tokens: int | None = Field(default=None, ge=0)
    completion_tokens: int | None = Field(default=None, ge=0)
    core_seconds: float | None = Field(default=None, ge=0)


class Completion(BaseModel):
    """What we rely on in a model's reply; the rest is passed on as it is."""

    model_config = ConfigDict(extra="allow")
    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None
    system_fingerprint: str | None = None


class Delta(BaseModel):
    model_config = ConfigDict(extra="allow")
    index: int = 0
    delta: Message | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Chunk(BaseModel):
    """What we rely on in one event of a model's stream."""

    model_config = ConfigDict(extra="allow")
    choices: list[Delta] = Field(default_factory=list)
    usage: Usage | None = None
    system_fingerprint: str | None = None


class Answer(NamedTuple):
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
    def logprobs(self) -> list[dict[str, Any]]:
        """Every token of the first choice with its log-probability, the stop token included; empty when the model gave none."""
        return (self.body["choices"][0].get("logprobs") or {}).get("content") or []


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

    def health(self) -> list[ReplicaHealth]:
        """How its replicas are; empty for a model that is not called over a network."""
        ...

    async def close(self) -> None: ...


class OpenAIBackend:
    """A model behind an OpenAI-compatible endpoint: a provider's, vLLM's, Ollama's, or a tier of ours (whose cost is core-seconds)."""

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        *,
        model: str,
        price: Price | None,
        count_tokens: Callable[[str], int],
        core_hour_usd: float = 0.0,
    ) -> None:
        self.name = name
        self._endpoint = endpoint
        self._model = model
        self._price = price
        self._count = count_tokens
        self._core_hour = core_hour_usd

    async def complete(self, payload: dict[str, Any]) -> Answer:
        body = {**payload, "model": self._model, "stream": False}
        body.pop("stream_options", None)
        content = await self._endpoint.post(orjson.dumps(body))
        try:
            answer = orjson.loads(content)
            Completion.model_validate(answer)
        except ValueError as broken:
            raise BackendErred(f"model {self.name} sent a reply that is not a chat completion") from broken
        for index, choice in enumerate(answer["choices"]):
            choice.setdefault("index", index)
            choice.setdefault("finish_reason", None)
        text = str(answer["choices"][0]["message"].get("content") or "")
        prompt_tokens, completion_tokens, estimated = self.count(answer.get("usage"), payload, text)
        return Answer(answer, prompt_tokens, completion_tokens, estimated, self.price(answer, prompt_tokens, completion_tokens))

    async def stream(self, payload: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        body = {**payload, "model": self._model, "stream": True, "stream_options": {"include_usage": True}}
        async with aclosing(self._endpoint.events(orjson.dumps(body))) as events:
            async for data in events:
                try:
                    chunk = orjson.loads(data)
                    if isinstance(chunk, dict) and "error" in chunk:
                        raise BackendFailed(f"model {self.name} failed while answering")
                    Chunk.model_validate(chunk)
                except ValueError as broken:
                    raise BackendFailed(f"model {self.name} sent an event that is not a chat completion chunk") from broken
                for choice in chunk.get("choices") or ():
                    choice.setdefault("index", 0)
                yield chunk

    def health(self) -> list[ReplicaHealth]:
        return self._endpoint.health()

    async def close(self) -> None:
        await self._endpoint.close()

    def count(self, usage: dict[str, Any] | None, payload: dict[str, Any], text: str) -> tuple[int, int, bool]:
        """Prompt and completion tokens, and whether they are our estimate because the model sent none."""
        if usage and usage.get("prompt_tokens") is not None:
            return int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0), False
        return count_prompt(self._count, payload), self._count(text), True

    def price(self, body: dict[str, Any], prompt_tokens: int, completion_tokens: int) -> float:
        core_seconds = float((body.get("usage") or {}).get("core_seconds") or 0.0)
        listed = list_price(self._price, prompt_tokens, completion_tokens)
        return listed + core_seconds / 3600 * self._core_hour


class RecordedBackend:
    """Answers from a file of recorded prompts, after `delay_seconds`. For demos and backtests; its name and every report say so."""

    def __init__(
        self, name: str, path: Path, *, price: Price | None, count_tokens: Callable[[str], int], delay_seconds: float = 0.0
    ) -> None:
        self.name = name
        self._delay = delay_seconds
        self._answers = read_recording(path)
        self._price = price
        self._count = count_tokens

    async def complete(self, payload: dict[str, Any]) -> Answer:
        text = self._answers.get(_conversation(payload["messages"]))
        if text is None:
            raise NotFound(f"{self.name} is a recording and holds no answer to this prompt; configure a real teacher in models.yaml")
        await asyncio.sleep(self._delay)
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

    def health(self) -> list[ReplicaHealth]:
        return []

    async def close(self) -> None:
        """Nothing is open."""


def build(entry: ModelEntry, *, count_tokens: Callable[[str], int]) -> OpenAIBackend | RecordedBackend:
    """The backend of one line of models.yaml. The key is read from the environment by the name given there.

    Raises:
        ConfigInvalid: a recording that cannot be read.
    """
    if entry.kind == "recorded":
        path = Path(os.path.expandvars(entry.path or ""))
        return RecordedBackend(entry.name, path, price=entry.price, count_tokens=count_tokens, delay_seconds=entry.delay_seconds)
    key = os.environ.get(entry.api_key_env) if entry.api_key_env else None
    endpoint = Endpoint(
        entry.name,
        entry.urls,
        headers={"authorization": f"Bearer {key}"} if key else {},
        deadlines=Deadlines(entry.connect_seconds, entry.first_token_seconds, entry.idle_seconds, entry.timeout_seconds),
        connections=entry.max_connections,
        refusal=partial(refused, entry.name),
    )
    return OpenAIBackend(entry.name, endpoint, model=entry.model or entry.name, price=entry.price, count_tokens=count_tokens)


def refused(name: str, status: int, content: bytes) -> BackendRefused:
    """What the client is told when model `name` answers with a 4xx that is the request's fault."""
    return BackendRefused(f"model {name} refused the request: {_message(content)}", status=status)


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
