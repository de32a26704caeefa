"""Clean one example: one spelling of the text, nothing personal in it, no control tokens, no secrets.

Pure rules on one row. It refuses to know splits, duplicates and files.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Literal

from training.examples import Example
from tutelage.redaction import CANDIDATES, redact

CONTROL_TOKEN = re.compile(r"<\|[\w ]{1,40}\|>")
# Bytes that no reader sees and that split a word in two for a tokenizer: zero-width marks, soft hyphens, the byte order mark.
INVISIBLE = re.compile("[\u200b\u2060\u00ad\ufeff\x00-\x08\x0b\x0c\x0e-\x1f]")

Personal = Literal["redact", "drop", "keep"]


@dataclass(frozen=True)
class Cleaned:
    """The example as it may be kept, or the `reason` why it may not; `redacted`: something personal was taken out of its prompt."""

    example: Example
    reason: str | None = None
    redacted: bool = False


def normalise(example: Example) -> Example:
    """Composed Unicode (NFC), line feeds, nothing invisible; answers and labels without outer space. Meaning is left alone."""
    prompt = tuple({**message, "content": _one_spelling(message["content"])} for message in example.prompt)
    answer, label = _one_spelling(example.answer).strip(), _one_spelling(example.label).strip()
    return replace(example, prompt=prompt, answer=answer or example.answer, label=label or example.label)


def scrub(example: Example, *, personal: Personal) -> Cleaned:
    """Personal data out of the prompt; a row that holds a secret, or whose answer is personal, is not for learning.

    A secret is never worth the risk of ending up in weights; an answer that is personal cannot be learned with a placeholder in it.
    """
    texts = [*(message["content"] for message in example.prompt), example.answer, example.label]
    kinds = {found.lastgroup for text in texts for found in CANDIDATES.finditer(text) if redact(found[0]) != found[0]}
    if "secret" in kinds:
        return Cleaned(example, "secret")
    if personal == "keep" or not kinds:
        return Cleaned(example)
    if personal == "drop":
        return Cleaned(example, "personal")
    if redact(example.answer) != example.answer or redact(example.label) != example.label:
        return Cleaned(example, "personal_answer")
    prompt = tuple({**message, "content": redact(message["content"])} for message in example.prompt)
    return Cleaned(replace(example, prompt=prompt), redacted=True)


def has_control_tokens(example: Example) -> bool:
    """They would teach the student to open turns."""
    return any(CONTROL_TOKEN.search(text) for text in (*(m["content"] for m in example.prompt), example.answer, example.label))


def _one_spelling(text: str) -> str:
    return INVISIBLE.sub("", unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n"))
