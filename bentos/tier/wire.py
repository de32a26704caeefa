"""OpenAI's chat format as this tier speaks it: bodies in, replies and stream chunks out.

Pure. It refuses to know who generates. Two things go beyond OpenAI's format: `usage.core_seconds`, the CPU time a reply
cost, and one more entry at the end of `logprobs.content` when the model ended its turn itself: the stop token, with its
text. All entries together are the log probability of the whole answer, which is what confidence is computed from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inference.generation import Completion, Request, Token
from tutelage.errors import InvalidRequest

BASE = "base"  # the model name of the bare base
MAX_STOPS = 4

StopString = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields this tier acts on. Unknown ones are ignored; known ones it cannot honour are refused."""

    model_config = ConfigDict(strict=True)

    model: str = Field(min_length=1, max_length=256)
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    # Greedy unless asked: that is how students are evaluated, and what their calibration holds for.
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def generation(self, *, default_max_tokens: int) -> Request:
        """Return what the engine is asked to do."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Request(
            messages=self.messages,
            adapter=None if self.model == BASE else self.model,
            max_tokens=self.max_completion_tokens or self.max_tokens or default_max_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=stop,
            seed=self.seed,
            top_logprobs=self.top_logprobs or 0,
        )


@dataclass(frozen=True)
class Reply:
    """What every piece of one reply repeats. `created` is Unix time in seconds."""

    id: str
    created: int
    model: str
    digest: str
    logprobs: bool

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.digest,
        }


def parse(body: bytes) -> ChatRequest:
    """Read a request body. Raises InvalidRequest that names the field at fault."""
    try:
        chat = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("constrained", "list[")))
        raise InvalidRequest(f"{where or 'body'}: {first['msg']}", param=where or None) from error
    _refuse_what_cannot_be_honoured(chat)
    return chat


def completion(reply: Reply, answer: Completion) -> dict[str, Any]:
    """Return the body of a reply that is not streamed."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "finish_reason": answer.finish_reason,
        "logprobs": _logprobs(_with_stop(answer)) if reply.logprobs else None,
    }
    return {**reply.head("chat.completion"), "choices": [choice], "usage": usage(answer)}


def chunk(reply: Reply, delta: dict[str, Any], tokens: list[Token]) -> dict[str, Any]:
    """Return a stream chunk that adds `delta` to the message; `tokens` are those it carries."""
    return _chunk(reply, delta, None, tokens)


def last_chunk(reply: Reply, answer: Completion) -> dict[str, Any]:
    """Return the chunk that ends the choice. The stop token's log probability, if there is one, comes with it."""
    return _chunk(reply, {}, answer.finish_reason, [answer.stop_token] if answer.stop_token else [])


def usage_chunk(reply: Reply, answer: Completion) -> dict[str, Any]:
    """Return the chunk that `stream_options.include_usage` asks for."""
    return {**reply.head("chat.completion.chunk"), "choices": [], "usage": usage(answer)}


def usage(answer: Completion) -> dict[str, Any]:
    """Return token counts (the stop token counts as completion) and the CPU time spent, in core-seconds."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "core_seconds": round(answer.core_seconds, 6),
    }


def _chunk(reply: Reply, delta: dict[str, Any], finish_reason: str | None, tokens: list[Token]) -> dict[str, Any]:
    logprobs = _logprobs(tokens) if reply.logprobs and tokens else None
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
    return {**reply.head("chat.completion.chunk"), "choices": [choice]}


def _with_stop(answer: Completion) -> list[Token]:
    return [*answer.tokens, *([answer.stop_token] if answer.stop_token else [])]


def _logprobs(tokens: list[Token]) -> dict[str, Any]:
    content = [
        {**_entry(token.text, token.logprob), "top_logprobs": [_entry(text, value) for text, value in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _refuse_what_cannot_be_honoured(chat: ChatRequest) -> None:
    refused = {
        "n": chat.n not in (None, 1),
        "tools": bool(chat.tools),
        "functions": bool(chat.functions),
        "response_format": (chat.response_format or {}).get("type", "text") != "text",
        "logit_bias": bool(chat.logit_bias),
        "presence_penalty": bool(chat.presence_penalty),
        "frequency_penalty": bool(chat.frequency_penalty),
    }
    for field, asked in refused.items():
        if asked:
            raise InvalidRequest(f"{field} is not supported by this model; leave it out or ask a teacher", param=field)
    if chat.top_logprobs and not chat.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
