"""The curve of a training: a row for each step in a CSV file, which DVC plots, and a line now and then for whoever watches.

Knows figures and how they are written (`tutelage/stores/datasets.py` reads them). It refuses to know what they are of.
"""

from __future__ import annotations

import csv
from pathlib import Path

from training.checkpoints import Progress
from training.measure import Measure

COLUMNS = ("step", "loss", "lr", "tokens", "seconds", "val_loss", "val_accuracy")  # the last two only where it was measured


def rewind(file: Path, step: int) -> None:
    """Keep the rows up to `step`, for what a killed run wrote beyond its checkpoint is written again; at 0 the file is begun anew."""
    rows = file.read_text().splitlines(keepends=True)[1:] if step and file.is_file() else []
    kept = [row for row in rows if row.endswith("\n") and int(row.partition(",")[0]) <= step]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join([",".join(COLUMNS) + "\n", *kept]))


def note(file: Path, progress: Progress, loss: float, rate: float, measured: Measure | None) -> None:
    """Add the row of a step."""
    row: dict[str, float | int] = {"step": progress.step, "loss": loss, "lr": rate, "tokens": progress.tokens}
    row["seconds"] = round(progress.seconds, 2)
    if measured:
        row |= {"val_loss": measured.loss, "val_accuracy": measured.accuracy}
    with file.open("a", newline="") as curve:
        csv.DictWriter(curve, COLUMNS, lineterminator="\n").writerow(row)


def line(progress: Progress, steps: int, loss: float, measured: Measure | None) -> str:
    """What is said of a step while it runs."""
    seen = f", validation {measured.right}/{measured.n} right" if measured else ""
    speed = progress.tokens / max(progress.seconds, 1e-9)
    return f"finetune: step {progress.step}/{steps}, loss {loss:.3f}{seen}, {speed:.0f} tokens/s, {progress.seconds:.0f} s"
