"""The OpenAI wire format: what a client may send, and how replies, chunks and errors look.

It refuses to know who answers. Fields it does not use are kept and passed on to the model that answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from tutelage.errors import InvalidRequest

SHAPELESS = {"stream", "stream_options", "metadata"}  # of a chat request: what does not change the answer
MOST_INPUTS = 2048  # OpenAI's limit on the texts of one embeddings request


class Part(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class Message(BaseModel):
    """One message of a conversation; unknown fields (names, tool calls) are passed on."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """`POST /v1/chat/completions`. Lengths and ranges are OpenAI's."""

    model_config = ConfigDict(extra="allow")
    model: str = Field(min_length=1, max_length=256)
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    metadata: dict[str, str] | None = None
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)  # as the client sent it

    @field_validator("messages")
    @classmethod
    def _somebody_asks(cls, messages: list[Message]) -> list[Message]:
        if all(m.content in (None, "", []) for m in messages):
            raise ValueError("at least one message must have content")
        return messages

    def conversation(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = self._sent["messages"]
        return messages

    def prompt(self) -> str:
        """The text of the last user message (of all messages when there is none): what routing looks at."""
        for message in reversed(self.messages):
            if message.role == "user":
                return text_of(message)
        return "\n".join(text_of(m) for m in self.messages)

    def shape(self) -> dict[str, Any]:
        """Everything that shapes the answer, in one comparable value: the exact cache's key material."""
        return {name: value for name, value in self._sent.items() if value is not None and name not in SHAPELESS}


class EmbeddingRequest(BaseModel):
    """`POST /v1/embeddings`, of text: this gateway's encoder takes no token ids."""

    model_config = ConfigDict(extra="allow")
    model: str = Field(min_length=1, max_length=256)
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)

    @field_validator("input")
    @classmethod
    def _something(cls, given: str | list[str]) -> str | list[str]:
        texts = given if isinstance(given, list) else [given]
        if not 0 < len(texts) <= MOST_INPUTS or "" in texts:
            raise ValueError(f"1 to {MOST_INPUTS} texts are expected, none of them empty")
        return given

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class FeedbackRequest(BaseModel):
    """`POST /v1/feedback`."""

    model_config = ConfigDict(extra="forbid")
    request_id: str = Field(min_length=1, max_length=128)
    score: float = Field(ge=0, le=1)
    label: str | None = Field(default=None, max_length=100_000)
    comment: str | None = Field(default=None, max_length=10_000)


class Error(BaseModel):
    """Every refusal and failure, OpenAI's shape."""

    class Told(BaseModel):
        message: str
        type: str
        code: str | None
        param: str | None

    error: Told


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    model_config = ConfigDict(extra="allow")
    index: int
    message: dict[str, Any]
    finish_reason: str | None


class Completion(BaseModel):
    """`chat.completion`; with `stream` the same in `chat.completion.chunk` events, ended by [DONE]."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class EmbeddingList(BaseModel):
    class Embedding(BaseModel):
        object: Literal["embedding"]
        index: int
        embedding: list[float] | str

    class Tokens(BaseModel):
        prompt_tokens: int
        total_tokens: int

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Tokens


class ModelList(BaseModel):
    class Model(BaseModel):
        id: str
        object: Literal["model"]
        created: int
        owned_by: str

    object: Literal["list"]
    data: list[Model]


class FeedbackReply(BaseModel):
    object: Literal["feedback"]
    request_id: str
    status: Literal["recorded"]


class Health(BaseModel):
    """`configuration`: the version of the settings in use, the same on all workers that agree."""

    status: Literal["live", "ready", "starting", "draining"]
    configuration: str | None = None


def text_of(message: Message) -> str:
    if isinstance(message.content, list):
        return "\n".join(part.text or "" for part in message.content)
    return message.content or ""


def parse_chat(body: bytes) -> ChatRequest:
    """As `parse_body`; the request keeps what was sent, so that fields unknown here reach the model unchanged."""
    request: ChatRequest = parse_body(ChatRequest, body)
    request._sent = orjson.loads(body)
    return request


def parse_body(kind: type[BaseModel], body: bytes) -> Any:
    """Raises InvalidRequest naming the first wrong field, what was found there and what is expected."""
    try:
        return kind.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as broken:
        raise InvalidRequest(f"the body is not valid JSON: {broken}", param="body") from broken
    except ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        more = f"; and {invalid.error_count() - 1} more" if invalid.error_count() > 1 else ""
        raise InvalidRequest(f"{where}: {first['msg']} (got {repr(first['input'])[:80]}){more}", param=where) from invalid


def completion(request_id: str, *, created: int, model: str, answer: dict[str, Any], tokens: tuple[int, int]) -> dict[str, Any]:
    """A `chat.completion` object around a model's own `choices`."""
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": answer["choices"],
        "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
        "system_fingerprint": answer.get("system_fingerprint"),
    }


def chunks_of(whole: dict[str, Any], *, spoken: bool, usage: bool) -> Iterator[dict[str, Any]]:
    """A finished completion as the chunks of a stream: its words unless they were `spoken` already, each choice's finish reason,
    and the usage if it was asked for."""
    frame = {k: whole[k] for k in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    for choice in [] if spoken else whole["choices"]:
        message = {k: v for k, v in choice["message"].items() if v is not None}
        logprobs = {"logprobs": choice["logprobs"]} if choice.get("logprobs") else {}
        yield frame | {"choices": [{"index": choice["index"], "delta": message, "finish_reason": None, **logprobs}]}
    for choice in whole["choices"]:
        yield frame | {"choices": [{"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}]}
    if usage:
        yield frame | {"choices": [], "usage": whole["usage"]}


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
JSON = "application/json"
EVENTS = "text/event-stream"
