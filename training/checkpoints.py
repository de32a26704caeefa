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

FILE = "state.safetensors"


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
        from safetensors.torch import save_file

        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{FILE}.partial"
        moments = optimizer.state_dict()
        tensors = {f"weights.{place}": weight.detach() for place, weight in enumerate(weights)}
        tensors |= {f"best.{place}": weight for place, weight in enumerate(best_weights or ())}
        tensors |= {f"optimizer.{place}.{name}": value for place, held in moments["state"].items() for name, value in held.items()}
        told = {
            "identity": self._identity,
            "progress": asdict(progress),
            "groups": moments["param_groups"],
            "schedule": {name: value for name, value in schedule.state_dict().items() if name != "lr_lambdas"},  # made anew at a start
        }
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"state": json.dumps(told)})
        partial.replace(self._folder / FILE)

    def restore(self, weights: list[Any], optimizer: Any, schedule: Any) -> tuple[Progress, list[Any] | None]:
        """Put everything back and return the progress and the best weights; a fresh start when there is nothing of this training."""
        import torch
        from safetensors import safe_open

        file = self._folder / FILE
        if not file.is_file():
            return Progress(), None
        with safe_open(file, framework="pt") as opened:
            told = json.loads((opened.metadata() or {}).get("state", "{}"))
            if told.get("identity") != self._identity:
                return Progress(), None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        with torch.no_grad():
            for place, weight in enumerate(weights):
                weight.copy_(tensors[f"weights.{place}"])
        moments: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            kind, place, *rest = name.split(".", 2)
            if kind == "optimizer":
                moments.setdefault(int(place), {})[rest[0]] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": told["groups"]})
        schedule.load_state_dict({**schedule.state_dict(), **told["schedule"]})
        known = told["progress"]
        measures = {name: Measure(**known[name]) if known[name] else None for name in ("untrained", "final", "best")}
        best = [tensors[f"best.{place}"] for place in range(len(weights))] if "best.0" in tensors else None
        return Progress(**known | measures), best

    def remove(self) -> None:
        """The training is done and saved."""
        shutil.rmtree(self._folder, ignore_errors=True)
