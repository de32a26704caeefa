"""Where a training stands, in one file that appears whole or not at all, so that a killed run goes on from it to the same result.

Knows tensors and files. It refuses to know what is trained: a file of another data set, recipe or base is simply not its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.measure import Measure

FILE = "state.pt"


@dataclass
class Progress:
    """What the loop knows beside the weights. `best` is kept while early stopping watches; `behind` counts measures since."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    quiet: int = 0
    behind: int = 0
    untrained: Measure | None = None
    final: Measure | None = None
    best: Measure | None = None
    verdict: dict[str, Any] | None = None


def identity(**what: Any) -> str:
    """Sha256 (hex) of all that decides the result; values must be JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class Checkpoint:
    """The one checkpoint of a training, in a folder of its own beside the output."""

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder = folder
        self._identity = identity

    def write(self, progress: Progress, weights: list[Any], best_weights: list[Any] | None, optimizer: Any, schedule: Any) -> None:
        """Replace what was there before."""
        import torch

        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{FILE}.partial"
        state = {
            "identity": self._identity,
            "progress": asdict(progress),
            "weights": [weight.detach() for weight in weights],
            "best_weights": best_weights,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        torch.save(state, partial)
        partial.replace(self._folder / FILE)

    def restore(self, weights: list[Any], optimizer: Any, schedule: Any) -> tuple[Progress, list[Any] | None]:
        """Put everything back and return the progress and the best weights; a fresh start when there is nothing of this training."""
        import torch

        file = self._folder / FILE
        state = torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else {}
        if state.get("identity") != self._identity:
            return Progress(), None
        with torch.no_grad():
            for weight, saved in zip(weights, state["weights"], strict=True):
                weight.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        known = state["progress"]
        measures = {name: Measure(**known[name]) if known[name] else None for name in ("untrained", "final", "best")}
        return Progress(**known | measures), state["best_weights"]

    def remove(self) -> None:
        """The training is done and saved."""
        shutil.rmtree(self._folder, ignore_errors=True)
