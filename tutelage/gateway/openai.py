"""The OpenAI wire format: what a client may send, and how replies, chunks and errors look.

It refuses to know who answers. Fields it does not use are kept and passed on to the model that answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from tutelage.errors import InvalidRequest
from tutelage.settings import whole

Checked = TypeVar("Checked", bound=BaseModel)
SHAPELESS = {"stream", "stream_options", "metadata"}  # of a chat request: what does not change the answer
MOST_INPUTS = 2048  # OpenAI's limit on the texts of one embeddings request
MOST_CHARACTERS = 100_000  # of a text to embed: OpenAI takes 8,192 tokens, this encoder reads 256
MOST_MESSAGES = 2048  # OpenAI's
MOST_TOKENS = 10_000_000  # of an answer: with 128 of them still a number that every counter holds
MOST_DEEP = 200  # arrays and objects within one another: what is passed on and kept is wrapped in a few more, and no writer takes 255


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
    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool = False


Whole = Annotated[int, Field(strict=False), BeforeValidator(whole)]
Positive = Annotated[int, Field(strict=False, ge=1), BeforeValidator(whole)]
Tokens = Annotated[int, Field(strict=False, ge=1, le=MOST_TOKENS), BeforeValidator(whole)]
Choices = Annotated[int, Field(strict=False, ge=1, le=128), BeforeValidator(whole)]
Likeliest = Annotated[int, Field(strict=False, ge=0, le=20), BeforeValidator(whole)]
SAID: dict[str, Any] = {
    "contains": {"required": ["content"], "properties": {"content": {"type": ["string", "array"], "minLength": 1, "minItems": 1}}}
}


class ChatRequest(BaseModel):
    """`POST /v1/chat/completions`. Lengths and ranges are OpenAI's."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str = Field(min_length=1, max_length=256)
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, json_schema_extra=SAID)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    n: Choices | None = None
    stop: str | list[str] | None = None
    seed: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Likeliest | None = None
    metadata: dict[str, str] | None = None

    @field_validator("messages")
    @classmethod
    def _somebody_asks(cls, messages: list[Message]) -> list[Message]:
        if all(m.content in (None, "", []) for m in messages):
            raise ValueError("at least one message must have content")
        return messages


class Chat:
    """A checked chat request. `shape` is everything in it that shapes the answer, as the client sent it: what a model is asked and what
    the cache compares; fields unknown here are in it too. `prompt` is the text of the last user message (of all messages when there is
    none): what routing looks at. `longest` is the bound on the answer's tokens, if the client set one; `alternatives`
    are the likeliest tokens it wants to see at every place. `metadata` no model is sent."""

    __slots__ = (
        "alternatives", "characters", "domain", "logprobs", "longest", "messages", "metadata", "model", "n", "prompt", "sampled", "shape",
        "stream", "usage",
    )  # fmt: skip

    def __init__(self, checked: ChatRequest, sent: dict[str, Any]) -> None:
        self.shape = {name: value for name, value in sent.items() if value is not None and name not in SHAPELESS}
        self.messages: list[dict[str, Any]] = sent["messages"]
        self.model, self.stream, self.n = checked.model, checked.stream, checked.n or 1
        self.usage = checked.stream_options is not None and checked.stream_options.include_usage
        self.longest = checked.max_completion_tokens or checked.max_tokens
        self.sampled = (checked.temperature or 0) > 0 or self.n > 1
        self.logprobs, self.alternatives = bool(checked.logprobs), checked.top_logprobs or 0
        self.metadata = checked.metadata or {}
        self.domain = self.metadata.get("domain")
        texts = [text_of(message) for message in checked.messages]
        asked = [text for text, message in zip(texts, checked.messages, strict=True) if message.role == "user"]
        self.prompt = asked[-1] if asked else "\n".join(texts)
        self.characters = sum(map(len, texts)) + 12 * len(texts)


TEXT = {"type": "string", "minLength": 1, "maxLength": MOST_CHARACTERS}
MANY = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MOST_INPUTS}
TEXTS: dict[str, Any] = {"anyOf": [TEXT, MANY]}


class EmbeddingRequest(BaseModel):
    """`POST /v1/embeddings`, of text: this gateway's encoder takes no token ids."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str = Field(min_length=1, max_length=256)
    input: str | list[str] = Field(json_schema_extra=TEXTS)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Positive | None = None

    @field_validator("input")
    @classmethod
    def _something(cls, given: str | list[str]) -> str | list[str]:
        texts = given if isinstance(given, list) else [given]
        if not 0 < len(texts) <= MOST_INPUTS or not all(0 < len(text) <= MOST_CHARACTERS for text in texts):
            raise ValueError(f"1 to {MOST_INPUTS} texts of 1 to {MOST_CHARACTERS} characters are expected")
        return given

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class FeedbackRequest(BaseModel):
    """`POST /v1/feedback`."""

    model_config = ConfigDict(extra="forbid", strict=True)
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


def parse_chat(body: bytes) -> Chat:
    """Raises as `parse_body`."""
    sent = read_json(body)
    return Chat(check(ChatRequest, sent), sent)


def parse_body(kind: type[Checked], body: bytes) -> Checked:
    """Raises InvalidRequest naming the first wrong field, what was found there and what is expected."""
    return check(kind, read_json(body))


def read_json(body: bytes) -> Any:
    """Raises InvalidRequest."""
    try:
        sent = orjson.loads(body)
    except orjson.JSONDecodeError as broken:
        raise InvalidRequest(f"the body is not valid JSON: {broken}", param="body") from broken
    # counting bytes is free, looking at every value is not
    if body.count(b"[") + body.count(b"{") > MOST_DEEP and deeper_than(MOST_DEEP, sent):
        raise InvalidRequest(f"the body has more than {MOST_DEEP} arrays and objects within one another", param="body")
    return sent


def deeper_than(most: int, value: Any) -> bool:
    """Whether more than `most` arrays and objects lie within one another."""
    level = [value]
    for _ in range(most + 1):
        held = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [inner for each in held for inner in each if isinstance(inner, dict | list)]
        if not held:
            return False
    return True


def check(kind: type[Checked], value: Any) -> Checked:
    """Raises InvalidRequest."""
    try:
        return kind.model_validate(value)
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
EVENTS = "text/event-stream; charset=utf-8"
