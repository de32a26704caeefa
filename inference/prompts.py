"""Messages to token ids, one way for training, evaluation and serving.

Knows the chat template and nothing of models or HTTP. Two decisions are made here, once:

- When a conversation has no system message, an EMPTY one is put first. SmolLM2's template would otherwise write its own
  20-token default, which costs a fifth of the prefill of a short task and tells a specialist nothing.
- Control tokens inside a message are encoded as plain text, so text from users can never end a turn or open another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tutelage.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERING = "empty-system-1"  # part of the template hash: change it when `render` changes what it produces
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class PromptRejected(InvalidRequest):
    """The messages cannot be rendered; the text says which one and what is allowed."""

    code = "invalid_prompt"


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the prompt's token ids, ending with the header that opens the assistant's turn.

    Content may be a string or a list of OpenAI text parts. Raises PromptRejected for anything else.
    """
    ids = tokenizer.apply_chat_template(
        conversation(messages),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        sanitize_control_tokens=True,
    )
    return list(ids)


def conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the messages that the template is given. Raises PromptRejected."""
    asked = plain(messages)
    return asked if asked[0]["role"] == "system" else [{"role": "system", "content": ""}, *asked]


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids a model must produce after a rendered prompt: the answer as plain text, then the stop token."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return [*ids, stop_id(tokenizer)]


def stop_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token id that ends an assistant's turn."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise PromptRejected("the tokenizer names no end-of-turn (eos) token; an instruct base must have one")
    return tokenizer.eos_token_id


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 (hex) of the chat template and of this module's way of rendering it."""
    return hashlib.sha256(f"{RENDERING}\n{tokenizer.chat_template}".encode()).hexdigest()


def plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return messages as role and text only. Raises PromptRejected on empty lists, unknown roles and non-text content."""
    if not messages:
        raise PromptRejected("messages is empty; send at least one message with a role and content")
    return [_plain_message(index, message) for index, message in enumerate(messages)]


def _plain_message(index: int, message: Mapping[str, Any]) -> dict[str, str]:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise PromptRejected(f"messages[{index}].role is {role!r}; allowed are {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part_text(index, part) for part in content)
    if not isinstance(content, str):
        kind = type(content).__name__
        raise PromptRejected(f"messages[{index}].content is {kind}; allowed is a string or a list of text parts")
    return {"role": ROLES[role], "content": content}


def _part_text(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise PromptRejected(f'messages[{index}].content holds a part that is not {{"type": "text", "text": …}}')
