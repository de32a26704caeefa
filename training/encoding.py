"""Rows as token ids: what a student is shown, what it must say, and the checks that the mask between them cannot be wrong.

By the one render that serving uses. Knows the tokenizer; it refuses to know models and budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from inference import prompts
from training import examples, targets
from training.examples import Example
from training.packing import Sample
from training.recipe import FinetuneSettings, TrainingFailed

# Asked of the student in training only, beside the question itself: it learns the reasons without having to write them when it serves
# (Hsieh et al. 2023, "Distilling step-by-step", arXiv 2305.02301).
RATIONALE_REQUEST = "\n\nExplain the reasoning."


def encode(rows: Sequence[Example], tokenizer: Any, config: FinetuneSettings) -> list[Sample]:
    """Rows as samples, with what the strategy takes from them; what is too long for the settings is left out.

    Raises TrainingFailed when nothing is left, the masks cannot be right or soft targets do not fit their answer.
    """
    samples = [sample for row in rows for sample in _samples(row, tokenizer, config)]
    kept = [s for s in samples if max(len(s), len(s.prompt) + len(s.rejected or ()) - 1) <= config.max_example_tokens]
    if not kept:
        raise TrainingFailed(
            f"none of {len(samples)} examples fits max_example_tokens={config.max_example_tokens}; raise it or send shorter traffic"
        )
    check_masks(kept, stop_id=prompts.stop_id(tokenizer))
    return kept


def encode_answers(rows: Sequence[Example], tokenizer: Any, config: FinetuneSettings) -> list[Sample]:
    """Rows as prompt and answer alone, as they are measured."""
    return encode(rows, tokenizer, config.model_copy(update={"strategy": "response"}))


def unused(rows: Sequence[Example], config: FinetuneSettings) -> dict[str, int]:
    """How many rows carry something the strategy leaves aside, by name: it is said, so that nobody believes it was learnt."""
    carried = {name: sum(getattr(row, name) not in (None, 1.0) for row in rows) for name in sorted(examples.ASPECTS["multi-aspect"])}
    return {name: count for name, count in carried.items() if count and name not in examples.ASPECTS[config.strategy]}


def check_masks(samples: Sequence[Sample], *, stop_id: int) -> None:
    """Refuse data whose supervised part is empty, everything, or does not end with the stop token: it would train silently wrong."""
    for index, sample in enumerate(samples):
        if not sample.completion:
            raise TrainingFailed(f"example {index} has no supervised token; its answer renders to nothing, drop the row")
        if not sample.prompt:
            raise TrainingFailed(f"example {index} has only supervised tokens; its prompt renders to nothing, check the chat template")
        if sample.completion[-1] != stop_id or stop_id in sample.completion[:-1]:
            raise TrainingFailed(
                f"example {index} does not end with the one stop token {stop_id}, so the student would not learn to stop; "
                "check inference.prompts.completion_ids against the base's tokenizer"
            )


def _samples(row: Example, tokenizer: Any, config: FinetuneSettings) -> list[Sample]:
    """The row's question and answer, and beside it the question why, if reasons are to be learnt."""
    taken = examples.ASPECTS[config.strategy]
    completion = tuple(prompts.completion_ids(tokenizer, row.answer))
    sample = Sample(tuple(prompts.render(tokenizer, row.prompt)), completion)
    if "weight" in taken:
        sample = replace(sample, weight=row.weight)
    if "targets" in taken and row.targets is not None:
        sample = replace(sample, soft=targets.parse(row.targets, completion, vocabulary=len(tokenizer)))
    if "rejected" in taken and row.rejected is not None:
        sample = replace(sample, rejected=tuple(prompts.completion_ids(tokenizer, row.rejected)))
    if "rationale" not in taken or row.rationale is None or not config.rationale_weight:
        return [sample]
    asked = (*row.prompt[:-1], {**row.prompt[-1], "content": row.prompt[-1]["content"] + RATIONALE_REQUEST})
    reasons = tuple(prompts.completion_ids(tokenizer, row.rationale))
    return [sample, Sample(tuple(prompts.render(tokenizer, asked)), reasons, weight=sample.weight * config.rationale_weight)]
