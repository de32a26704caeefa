"""The curve of a training: a row for each step in a file, and a line now and then for whoever watches.

Knows figures and files. It refuses to know what they are of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

from training.checkpoints import Progress
from training.measure import Measure


def continued(curve: Path, step: int) -> TextIO:
    """The curve, open for the rows after `step`; rows that a killed run wrote beyond its checkpoint are written again."""
    rows = curve.read_text().splitlines(keepends=True) if step and curve.is_file() else []
    curve.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    return curve.open("a")


def note(log: TextIO | None, progress: Progress, loss: float, rate: float, measured: Measure | None) -> None:
    if log is None:
        return
    row: dict[str, float | int] = {"step": progress.step, "loss": loss, "lr": rate, "tokens": progress.tokens}
    row["seconds"] = round(progress.seconds, 2)
    if measured:
        row |= {"val_loss": measured.loss, "val_accuracy": measured.accuracy}
    log.write(json.dumps(row) + "\n")
    log.flush()


def line(progress: Progress, steps: int, loss: float, measured: Measure | None) -> str:
    seen = f", validation {measured.right}/{measured.n} right" if measured else ""
    speed = progress.tokens / max(progress.seconds, 1e-9)
    return f"finetune: step {progress.step}/{steps}, loss {loss:.3f}{seen}, {speed:.0f} tokens/s, {progress.seconds:.0f} s"
