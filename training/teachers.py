"""Ask a teacher for what its recorded answers do not hold: log-probabilities of their tokens, and reasons for them.

From an OpenAI-compatible endpoint, or from a file where they were stored. Nothing is ever made up: where the teacher's tokens are not the
student's, or it now answers otherwise, there is a reason in place of targets. It refuses to know losses and strategies.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import Field, model_validator

from training import examples
from training.examples import Example
from training.targets import tokenizer_hash
from tutelage.errors import ConfigInvalid, EngineFailed
from tutelage.scoring import matches
from tutelage.settings import Strict

LEAST_TAIL = 1e-9  # probability; what is rounded away on the wire is not nothing
REASONS_REQUEST = "\n\nExplain the reasoning step by step, then write the final answer alone on a last line that begins with `Answer:`."
ANSWER_MARK = "Answer:"
TRIES = 3


class TeacherSettings(Strict):
    """`source`: `endpoint` (`base_url` ends in /v1), `file` (JSONL of prompt, `targets` and `rationale`, with its manifest) or `none`.

    `tokenizer`: folder of the teacher's tokenizer; log-probabilities are of use only where it is the student's. `token_ids`: the endpoint
    returns tokens as ids when asked (vLLM's `return_tokens_as_token_ids`). Replies are kept, so that a second run asks only what is new.
    """

    source: Literal["none", "file", "endpoint"] = "none"
    file: str | None = None
    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    tokenizer: str | None = None
    token_ids: bool = False
    top_k: int = Field(default=20, ge=1, le=128)
    max_tokens: int = Field(default=1024, ge=1)
    concurrency: int = Field(default=4, ge=1)
    timeout_seconds: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _where(self) -> TeacherSettings:
        if self.source == "file" and not self.file:
            raise ValueError("source `file` needs `file`: a JSONL of prompt, targets and rationale")
        if self.source == "endpoint" and not (self.base_url and self.model):
            raise ValueError("source `endpoint` needs `base_url`, such as http://127.0.0.1:8000/v1, and `model`")
        return self


@dataclass(frozen=True)
class Told:
    """What a teacher says of one example; `why_not` where it gave no targets, `why_no_rationale` where it gave no rationale."""

    targets: dict[str, Any] | None = None
    rationale: str | None = None
    why_not: str | None = None
    why_no_rationale: str | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The student's tokens: ids of a text, the id of a token's text where it is the only one, and what tells two tokenizers apart."""

    ids: Mapping[str, int]
    tokenizer: Any
    hash: str
    template_hash: str

    @classmethod
    def of(cls, tokenizer: Any, template_hash: str) -> Vocabulary:
        spelled: dict[str, int] = {}
        twice = set()
        for at in range(len(tokenizer)):
            text = tokenizer.decode([at])
            twice |= {text} if text in spelled else set()
            spelled[text] = at
        return cls({text: at for text, at in spelled.items() if text not in twice}, tokenizer, tokenizer_hash(tokenizer), template_hash)

    def encode(self, text: str) -> list[int]:
        """An answer's ids without its stop token."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def id_of(self, token: str) -> int | None:
        if token.startswith("token_id:"):
            return int(token.removeprefix("token_id:"))
        return self.ids.get(token)


def stored(rows: Sequence[Example], file: Path, vocabulary: Vocabulary | None) -> list[Told]:
    """What `file` holds for these prompts; `vocabulary` None: no targets are wanted.

    Raises ConfigInvalid when the file cannot be read, or holds targets of another tokenizer or template than the student's.
    """
    told: dict[str, Told] = {}
    try:
        for number, line in examples.lines(file):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ConfigInvalid(f"{file} line {number} is no JSON object; write a prompt, its targets and its rationale")
            key = examples.prompt_key(examples.parse(json.dumps({"label": "-", **row})).prompt)
            told[key] = Told(row.get("targets"), row.get("rationale"))
    except ValueError as broken:
        raise ConfigInvalid(f"{file} is not JSONL ({broken}); write an object a line") from broken
    if vocabulary is not None and any(t.targets for t in told.values()):
        _check_origin(file, vocabulary)
    unknown = Told(why_not="not_in_file", why_no_rationale="not_in_file")
    found = [told.get(examples.prompt_key(row.prompt), unknown) for row in rows]
    return [t if t.targets or t is unknown else Told(None, t.rationale, "no_logprobs") for t in found]


def ask(rows: Sequence[Example], settings: TeacherSettings, *, vocabulary: Vocabulary | None, rationales: bool, kept: Path) -> list[Told]:
    """Ask the endpoint about every row: its log-probabilities where `vocabulary` is given, its reasons where `rationales`.

    Replies are appended to `kept` and found there again. Raises EngineFailed when it answered nothing at all.
    """
    return asyncio.run(_ask_all(rows, settings, vocabulary, rationales, _Replies(kept)))


def align(content: Sequence[Mapping[str, Any]], answer: str, vocabulary: Vocabulary) -> Told:
    """An OpenAI `logprobs.content` as targets for `answer`: only where its tokens are exactly those the student would write.

    The k of all positions is the least any of them has; what is beyond it, or no token of the student's, is in the tail.
    """
    wanted = vocabulary.encode(answer)
    ids = [vocabulary.id_of(str(token.get("token"))) for token in content]
    stop = vocabulary.tokenizer.eos_token_id
    if ids and ids[-1] == stop:
        ids, content = ids[:-1], content[:-1]
    if ids != wanted:
        return Told(why_not="other_answer_or_tokens")
    tops = [_top(token, at, vocabulary) for token, at in zip(content, wanted, strict=True)]
    k = min((len(top) for top in tops), default=0)
    if k == 0:
        return Told(why_not="no_logprobs")
    cut = [top[:k] for top in tops]
    tail = [math.log(max(1 - sum(math.exp(p) for _, p in top), LEAST_TAIL)) for top in cut]
    top_ids, top_logprobs = [[at for at, _ in top] for top in cut], [[p for _, p in top] for top in cut]
    return Told({"top_ids": top_ids, "top_logprobs": top_logprobs, "tail_logprob": tail})


def _top(token: Mapping[str, Any], chosen: int, vocabulary: Vocabulary) -> list[tuple[int, float]]:
    """The known candidates of one position, the chosen one first (it must never be lost to the tail), then by probability."""
    found = {chosen: float(token["logprob"])}
    for candidate in token.get("top_logprobs") or ():
        at = vocabulary.id_of(str(candidate.get("token")))
        if at is not None:
            found.setdefault(at, float(candidate["logprob"]))
    return sorted(found.items(), key=lambda item: (item[0] != chosen, -item[1]))


async def _ask_all(
    rows: Sequence[Example], settings: TeacherSettings, vocabulary: Vocabulary | None, rationales: bool, kept: _Replies
) -> list[Told]:
    from rich.console import Console
    from rich.progress import Progress

    key = os.environ.get(settings.api_key_env or "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    free = asyncio.Semaphore(settings.concurrency)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("asking the teacher", total=len(rows))
        url = str(settings.base_url).rstrip("/")
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=settings.timeout_seconds) as client:

            async def one(row: Example) -> Told:
                async with free:
                    told = await _ask(client, row, settings, vocabulary, rationales, kept)
                progress.advance(bar)
                return told

            told = await asyncio.gather(*(one(row) for row in rows))
    if rows and all(t.why_not == "teacher_failed" or t.why_no_rationale == "teacher_failed" for t in told):
        raise EngineFailed(f"the teacher {settings.model} at {settings.base_url} answered none of {len(rows)} requests; check its key")
    return told


async def _ask(
    client: httpx.AsyncClient, row: Example, settings: TeacherSettings, vocabulary: Vocabulary | None, rationales: bool, kept: _Replies
) -> Told:
    told = Told(why_not="not_asked", why_no_rationale="not_asked")
    if vocabulary is not None:
        body = {"messages": list(row.prompt), "logprobs": True, "top_logprobs": settings.top_k}
        choice = await _reply(client, body, settings, kept)
        content = ((choice or {}).get("logprobs") or {}).get("content")
        if choice is None:
            told = Told(why_not="teacher_failed")
        else:
            told = align(content, row.answer, vocabulary) if content else Told(why_not="no_logprobs")
    if not rationales:
        return told
    asked = [*row.prompt[:-1], {**row.prompt[-1], "content": row.prompt[-1]["content"] + REASONS_REQUEST}]
    choice = await _reply(client, {"messages": asked}, settings, kept)
    reasons, why = ("", "teacher_failed") if choice is None else reasons_of(choice["message"], row.label)
    return Told(told.targets, reasons or None, told.why_not, why)


def reasons_of(message: Mapping[str, Any], label: str) -> tuple[str, str | None]:
    """The reasons a teacher gave, if they led it to the label; else nothing and why."""
    text = str(message.get("content") or "")
    reasons, mark, answer = text.rpartition(ANSWER_MARK)
    reasons = str(message.get("reasoning_content") or "") or reasons
    if not mark or not reasons.strip():
        return "", "no_rationale"
    if not matches(answer.strip(), label):
        return "", "rationale_of_another_answer"
    return reasons.strip(), None


async def _reply(client: httpx.AsyncClient, body: dict[str, Any], settings: TeacherSettings, kept: _Replies) -> dict[str, Any] | None:
    """The first choice; None when the teacher failed to answer a few times."""
    body = {"model": settings.model, "temperature": 0, "max_tokens": settings.max_tokens, **body}
    if settings.token_ids:
        body["return_tokens_as_token_ids"] = True
    known = kept.find(body)
    if known is not None:
        return known
    for tried in range(TRIES):
        try:
            reply = await client.post("/chat/completions", json=body)
            reply.raise_for_status()
            choice: dict[str, Any] = reply.json()["choices"][0]
        except (httpx.HTTPError, ValueError, KeyError, IndexError):
            await asyncio.sleep(0.2 * 2**tried)
        else:
            kept.add(body, choice)
            return choice
    return None


class _Replies:
    """What a teacher was asked and said, in a file that grows: a run that was cut off pays for nothing twice."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, dict[str, Any]] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the run was cut off
            self._known[row["asked"]] = row["choice"]

    def find(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        return self._known.get(self._name(body))

    def add(self, body: Mapping[str, Any], choice: dict[str, Any]) -> None:
        self._known[self._name(body)] = choice
        with self._file.open("a") as file:
            file.write(json.dumps({"asked": self._name(body), "choice": choice}) + "\n")

    def _name(self, body: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_origin(file: Path, vocabulary: Vocabulary) -> None:
    manifest = file.with_name(file.name + ".manifest.json")
    try:
        told = json.loads(manifest.read_text())
    except (OSError, ValueError) as broken:
        raise ConfigInvalid(
            f"{file} holds targets, but {manifest} cannot be read ({broken}); write tokenizer_hash, template_hash"
        ) from broken
    for name, ours in (("tokenizer_hash", vocabulary.hash), ("template_hash", vocabulary.template_hash)):
        if told.get(name) != ours:
            raise ConfigInvalid(
                f"{manifest}: {name} is {told.get(name)!r}, the student's is {ours!r}: its token ids would mean other tokens; "
                "make the targets with the student's tokenizer and template, or use the strategy response"
            )
