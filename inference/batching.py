"""Which waiting prompts share one forward pass. A pure rule over their lengths."""

from __future__ import annotations

from collections.abc import Sequence

ALWAYS_TOGETHER = 256  # padded tokens up to which waste costs less than another pass over the weights


def next_batch(lengths: Sequence[int], *, max_rows: int, max_waste: float = 0.25) -> list[int]:
    """Return the positions of the prompts to run now, oldest first; the first one always runs.

    `lengths` are prompt lengths in tokens, oldest first. Prompts are padded to the longest among them, so one that
    would make padding exceed `max_waste` times the real tokens waits for a batch of its own kind.
    """
    taken: list[int] = []
    real = longest = 0
    for position, length in enumerate(lengths):
        padded = max(longest, length) * (len(taken) + 1)
        if taken and padded > max(ALWAYS_TOGETHER, (1 + max_waste) * (real + length)):
            continue
        taken.append(position)
        real, longest = real + length, max(longest, length)
        if len(taken) == max_rows:
            break
    return taken
