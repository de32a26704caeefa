"""What `tutelage replay` and `tutelage domain-eval` do: read, evaluate with a progress bar, write the report, say what is in it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.errors import InvalidRequest
from tutelage.settings import Home

if TYPE_CHECKING:
    from tutelage.evaluations.replay import Progress
    from tutelage.routing.encoder import Encoder


def replay(home: Home, arguments: argparse.Namespace) -> dict[str, Any]:
    """Replay the logs, write the report and its page beside it, and return it."""
    from tutelage.evaluations import page, replay, rows
    from tutelage.routing.promises import PromiseSettings

    log, fit_log = rows.read_log(arguments.log), rows.read_log([arguments.fit]) if arguments.fit else None
    promise = PromiseSettings(loss=arguments.promise)
    settings = replay.ReplaySettings(arguments.policy, promise, arguments.max_cost, arguments.seed)
    with _progress() as progress:
        report: dict[str, Any] = _plain(replay.replay(log, fit_log, _encoder(home), settings, progress))
    _write(arguments.report, report)
    arguments.report.with_suffix(".html").write_text(page.render(report), encoding="utf-8")
    return report


def domain_eval(home: Home, arguments: argparse.Namespace) -> dict[str, Any]:
    """Judge domains on labelled rows, write the report and return it."""
    from tutelage.evaluations import labelled

    fit, data = labelled.read_labelled(arguments.fit), labelled.read_labelled(arguments.data)
    oos = labelled.read_labelled(arguments.oos) if arguments.oos else None
    with _progress() as progress:
        report: dict[str, Any] = _plain(labelled.evaluate(fit, data, oos, _encoder(home), seed=arguments.seed, progress=progress))
    _write(arguments.report, report)
    return report


def table(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A replay's policies and baselines as rows to print."""
    return [
        {"name": name, "kind": kind, "quality": found["mean_quality"], "from": found["interval95"][0], "to": found["interval95"][1]}
        | {"cost_usd": found["mean_cost_usd"], "apgr": found.get("apgr"), "cpt50": found.get("cpt50"), "cpt80": found.get("cpt80")}
        for kind, group in (("policy", report["policies"]), ("baseline", report["baselines"]))
        for name, found in group.items()
    ]


def _encoder(home: Home) -> Encoder:
    from tutelage.fleet.local import prepare_encoder
    from tutelage.routing.encoder import Encoder

    folder = home.models / "encoder"
    if not (folder / "model.onnx").exists():
        prepare_encoder(folder, environment=home.environment())
    return Encoder(folder, threads=1, cache_size=100_000)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on stderr for each thing done, only where a person is looking."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    with Bars(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing, total=total)
            bars.update(tasks[doing], completed=done)

        yield show


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as failed:
        raise InvalidRequest(f"the report cannot be written to {path}: {failed.strerror}") from failed


def _plain(value: Any) -> Any:
    """The same with what is not a number as null: JSON knows no NaN."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
