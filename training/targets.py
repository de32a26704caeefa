"""Soft targets: a teacher's probabilities beside an answer, read from a row or asked of a local teacher.

They are ids of one tokenizer under one chat template, so a file that was made with another is refused. Nothing is ever made up: a
row without them is trained on its text. Refuses to know losses and the loop.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from inference import prompts
from training import packing
from training.packing import Sample, SoftTargets
from training.recipe import TrainingFailed
from training.students import Student

MOST_MASS = 1 + 1e-3  # log-probabilities are rounded on their way
HASHES = ("tokenizer_hash", "template_hash")


def parse(row: Mapping[str, Any], completion: Sequence[int], *, vocabulary: int) -> SoftTargets:
    """The `targets` object of a row, for the answer that renders to `completion`.

    Expects {"top_ids": [[int]], "top_logprobs": [[nats]], "tail_logprob": [nats]}, a list for each token of the answer, the stop token
    included or left out. Raises TrainingFailed when that is not what it is.
    """
    try:
        ids = np.array(row["top_ids"], dtype=np.int64)
        logprobs = np.array(row["top_logprobs"], dtype=np.float32)
        tail = np.array(row["tail_logprob"], dtype=np.float32)
    except (KeyError, TypeError, ValueError) as broken:
        raise TrainingFailed(f"targets need top_ids, top_logprobs [tokens][k] and tail_logprob [tokens]: {broken}") from broken
    if ids.ndim != 2 or ids.shape != logprobs.shape or tail.shape != ids.shape[:1]:
        raise TrainingFailed(f"targets have shapes {ids.shape}, {logprobs.shape}, {tail.shape}; expected [m][k], [m][k], [m]")
    if len(tail) not in (len(completion), len(completion) - 1):
        raise TrainingFailed(f"targets for {len(tail)} tokens beside an answer of {len(completion)} with its stop token; make them again")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise TrainingFailed(f"targets name token {ids.max()} of a vocabulary of {vocabulary}: they are another tokenizer's")
    mass = np.exp(logprobs).sum(-1) + np.exp(tail)
    if not np.isfinite(logprobs).all() or np.isnan(tail).any() or mass.max() > MOST_MASS:
        raise TrainingFailed(f"targets hold probabilities that sum to {mass.max():.3f}; expected at most 1, as log-probabilities in nats")
    return SoftTargets(ids, logprobs, tail)


def check_origin(data: Path, tokenizer: Any) -> None:
    """Refuse soft targets made under another tokenizer or template than `tokenizer`, or that do not say which.

    They are told by `<data>.manifest.json` with tokenizer_hash and template_hash. Raises TrainingFailed.
    """
    file = manifest_of(data)
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as broken:
        raise TrainingFailed(f"{data} carries soft targets, but {file} cannot be read ({broken}); make the targets again") from broken
    expected = {"tokenizer_hash": tokenizer_hash(tokenizer), "template_hash": prompts.template_hash(tokenizer)}
    for name in HASHES:
        if found.get(name) != expected[name]:
            raise TrainingFailed(
                f"{file}: {name} is {found.get(name)!r}, this base's is {expected[name]!r}: the ids would mean other tokens; "
                "make the targets with this base's tokenizer, or use the strategy response"
            )


def manifest_of(data: Path) -> Path:
    """Where the hashes of a data file are told."""
    return data.with_name(data.name + ".manifest.json")


def tokenizer_hash(tokenizer: Any) -> str:
    """Sha256 (hex) of every token with its id, in order of ids."""
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def of_teacher(teacher: Student, samples: Sequence[Sample], *, top: int, pass_tokens: int, temperature: float = 1.0) -> list[Sample]:
    """The samples with what a local teacher thinks of each completion token. It must share the tokenizer; it is left in eval mode.

    The tail is what weighs at `temperature` as much as the teacher's own when it is taken as equal tokens, as `losses.divergence` takes it:
    at 2 the words that nobody would say have 0.25 of a finetuned parent's softened probability, and equal ones of the same mass 0.55.
    """
    import torch

    teacher.model.eval()
    taught: dict[int, SoftTargets] = {}
    with torch.no_grad():
        for part in packing.split(samples, pass_tokens):
            logits = teacher.logits(packing.pack(part, teacher.model.device))
            logprobs = torch.log_softmax(logits, dim=-1)
            kept, ids = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
            others = logprobs.shape[-1] - ids.shape[-1]
            rest = temperature * (logprobs / temperature).scatter(-1, ids, -torch.inf).logsumexp(-1)
            rest -= (temperature - 1) * math.log(max(others, 1))
            start = 0
            for sample in part:
                end = start + len(sample.completion)
                taught[id(sample)] = SoftTargets(*(tensor[start:end].cpu().numpy() for tensor in (ids, kept, rest)))
                start = end
    return [replace(sample, soft=taught[id(sample)]) for sample in samples]
