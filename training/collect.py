"""Collect: reference interactions for the pipeline at the root, made from one reasoning-gym task.

It stands in for recorded traffic when there is none: the task's own answers play a teacher who is always right, and the rows
say so. Students of real traffic start at `curate` with interactions exported from the database.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from training import settings
from tutelage.settings import Strict


class CollectSettings(Strict):
    """Which reasoning-gym task, with which of its own `parameters`, and how many of its questions."""

    task: str = "chain_sum"
    parameters: Mapping[str, int | float | str | bool] = Field(default_factory=dict)
    size: int = Field(default=1500, ge=1)
    seed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.collect", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="interactions.jsonl to write; an empty frozen.jsonl beside it")
    parser.add_argument("--config", type=Path, help="YAML with CollectSettings")
    arguments = parser.parse_args()
    config = settings.read(CollectSettings, arguments.config)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in interactions(config))
    # nothing else was held out before there was any traffic
    arguments.out.with_name("frozen.jsonl").write_text("")
    print(f"collect: {config.size} interactions of {config.task} in {arguments.out}")


def interactions(config: CollectSettings) -> Iterator[dict[str, Any]]:
    """Rows as the database exports them, in the order of the task's seed."""
    # one task of the package wants a solver that needs a C compiler to install; no task used here does
    sys.modules.setdefault("pycosat", types.ModuleType("pycosat"))
    import reasoning_gym

    for index, item in enumerate(reasoning_gym.create_dataset(config.task, size=config.size, seed=config.seed, **config.parameters)):
        turns = [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item["answer"]}]
        metadata = {"request_id": f"reference-{index}", "tenant": "reference", "domain": config.task, "teacher": "reasoning-gym"}
        yield {
            "messages": turns,
            "metadata": metadata | {"confidence": 1.0, "verdict": 1.0, "label": item["answer"], "provenance": "teacher"},
        }


if __name__ == "__main__":
    main()
