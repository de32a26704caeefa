"""What is learnt when: the examples of every optimiser step, and the learning rate at each.

Pure: budgets in, steps out, the same for the same seed on any machine. It refuses to know models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from training import packing
from training.packing import Sample
from training.recipe import FinetuneSettings

MOST_EXTRA = 1.8  # of the token budget, for tasks whose examples are long or many


def plan(samples: Sequence[Sample], config: FinetuneSettings) -> list[list[Sample]]:
    """The examples of every optimiser step: shuffled epochs until the token budget or the epochs are used up.

    A step takes examples until it has both `step_examples` of them and `step_tokens` tokens, so short tasks learn from more
    examples a step and long ones from more steps, at about the same cost. A task of longer or of more examples may go over
    the budget, up to MOST_EXTRA times, until it has seen each of them once and `least_examples` in all.
    """
    budget = config.budget_tokens or math.inf
    steps: list[list[Sample]] = []
    batch: list[Sample] = []
    spent, seen = 0, 0
    for sample in _shuffled_epochs(samples, config):
        batch.append(sample)
        if len(batch) < config.step_examples or (tokens := packing.cost(batch)) < config.step_tokens:
            continue
        spent += tokens
        seen += len(batch)
        enough = seen > max(config.least_examples, len(samples)) or spent > MOST_EXTRA * budget
        if spent > budget and enough and steps:
            return steps
        steps.append(batch)
        batch = []
    return steps or [batch]


def rate_at(step: int, steps: int, warmup_share: float) -> float:
    """Share of the learning rate at a step (from 0): linear up, then half a cosine down to nearly nothing."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


def probe_step(steps: Sequence[Sequence[Sample]], config: FinetuneSettings) -> int:
    """The first step after which `probe_tokens` have been computed; 0 (never) when the whole training is no longer than that."""
    spent = 0
    for number, batch in enumerate(steps[:-1], start=1):
        spent += packing.cost(batch)
        if spent >= config.probe_tokens > 0:
            return number
    return 0


def measure_steps(steps: int, validations: int) -> frozenset[int]:
    """The steps after which the validation items are measured: `validations` times, evenly, the last step among them."""
    return frozenset(math.ceil(steps * (i + 1) / validations) for i in range(validations))


def _shuffled_epochs(samples: Sequence[Sample], config: FinetuneSettings) -> Iterator[Sample]:
    import datasets

    order = datasets.Dataset.from_dict({"index": range(len(samples))})
    for epoch in range(config.max_epochs):
        for row in order.shuffle(seed=config.seed + epoch):
            yield samples[row["index"]]
