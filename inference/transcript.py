"""The text of one answer while it grows token by token, and where a stop string ends it.

Pure. It refuses to know models and tokenizers: it is given each token's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Token:
    """One generated token: its text as it extends the answer, and its natural log probability.

    `text` is empty while a character is incomplete; the token that completes the character carries it. `top` holds the
    most likely alternatives at this position as (text, logprob), best first.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class Transcript:
    """Collects tokens and releases each one once it can no longer turn out to be part of a stop string.

    The released tokens' texts, joined, are the answer at any moment. `stopped` turns true when a stop string appeared;
    the token it begins in is cut before it and everything after is dropped.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.tokens: list[Token] = []
        self.stopped = False
        self._stop = tuple(stop)
        self._held: list[Token] = []

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    def add(self, token: Token) -> list[Token]:
        """Take the next token; return those that became certain."""
        self._held.append(token)
        held = "".join(token.text for token in self._held)
        found = [at for at in (held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found), cut=True)
        return self._release(len(held) - _could_become(held, self._stop), cut=False)

    def close(self) -> list[Token]:
        """Release what was held back: no more tokens will come."""
        released, self._held = self._held, []
        self.tokens.extend(released)
        return released

    def _release(self, until: int, *, cut: bool) -> list[Token]:
        released, start = [], 0
        for token in self._held:
            end = start + len(token.text)
            if end <= until and not (cut and start == until):
                released.append(token)
            elif cut and start < until:
                released.append(replace(token, text=token.text[: until - start]))
            start = end
        self._held = [] if cut else self._held[len(released) :]
        self.tokens.extend(released)
        return released


def _could_become(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins some stop string."""
    longest = min(len(text), max((len(s) - 1 for s in stop), default=0))
    for length in range(longest, 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0
