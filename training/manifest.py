"""The manifest beside a student: what it was made of, how, and how that went.

What serving, evaluation and lineage read of a training. Knows files and figures; it refuses to know the loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inference import adapters, base
from training.checkpoints import Progress
from training.packing import Sample
from training.recipe import Recipe

FILE = "manifest.json"
VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def identity(
    data: Path, validation: Path | None, base_dir: Path, config: Recipe, teacher: tuple[Path, Path | None] | None
) -> dict[str, Any]:
    """All that decides the result, but for the machine."""
    from importlib.metadata import version

    folder, adapter = teacher or (None, None)
    taught = {"teacher": base.fingerprint(folder) if folder else None, "teacher_adapter": adapters.digest(adapter) if adapter else None}
    return {
        "base_fingerprint": base.fingerprint(base_dir),
        "data_digest": hashlib.sha256(data.read_bytes()).hexdigest(),
        "validation_digest": hashlib.sha256(validation.read_bytes()).hexdigest() if validation else None,
        "seed": config.seed,
        "settings": config.model_dump(),
        "versions": {name: version(name) for name in VERSIONED},
        **(taught if teacher else {}),
    }


def origin(out: Path, base_dir: Path, config: Recipe) -> dict[str, Any]:
    """What was made of what: an adapter by its digest, a student trained in full by its fingerprint as a base of its own."""
    if config.method == "full":
        return {"base": base_dir.name, "student_fingerprint": base.fingerprint(out)}
    return {"base": base_dir.name, "adapter_digest": adapters.digest(out)}


def outcome(progress: Progress, planned: int, samples: Sequence[Sample]) -> dict[str, Any]:
    verdict = progress.verdict
    return {
        "learnable": verdict["learnable"] if verdict else None,
        "reason": verdict["reason"] if verdict else f"trained for {progress.step} steps without a probe",
        "metrics": _metrics(progress, planned, samples),
        "max_answer_tokens": max(len(sample.completion) for sample in samples),
    }


def _metrics(progress: Progress, planned: int, samples: Sequence[Sample]) -> dict[str, float | int]:
    metrics: dict[str, float | int] = {
        "examples": len(samples),
        "steps": progress.step,
        "planned_steps": planned,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "core_seconds": round(progress.core_seconds, 1),
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
    }
    for name, measured in (("untrained", progress.untrained), ("final", progress.final)):
        if measured:
            metrics |= {f"{name}_val_accuracy": measured.accuracy, f"{name}_val_loss": measured.loss}
    return metrics
