"""Hosted: a student trained by OpenAI's fine-tuning API, or any server that speaks it, in place of a local adapter.

Upload, job, poll; each step is written down before the next, so that a run that was cut off goes on with the same job and pays once. It
refuses to know how its rows were chosen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from training import export, settings
from tutelage.errors import ConfigInvalid, EngineFailed, TrafficUnreadable
from tutelage.settings import Strict

if TYPE_CHECKING:
    from openai import OpenAI

CHARACTERS_A_TOKEN = 4.0  # of English; the bill counts the provider's own tokens
ENDED = ("succeeded", "failed", "cancelled")
STATE = "job.json"


class HostedSettings(Strict):
    """`usd_per_mtok`: the provider's price of a million training tokens, counted each epoch; a job over `max_usd` is refused."""

    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    model: str = "gpt-4o-mini-2024-07-18"
    method: Literal["supervised", "preference"] = "supervised"
    suffix: str = Field(default="tutelage", pattern=r"^[a-z0-9-]{1,40}$")
    epochs: int = Field(default=3, ge=1, le=50)
    seed: int = 0
    usd_per_mtok: float = Field(default=3.0, ge=0)
    max_usd: float = Field(default=20.0, ge=0)
    poll_seconds: float = Field(default=10.0, gt=0)
    most_seconds: float = Field(default=6 * 3600.0, gt=0)


@dataclass(frozen=True)
class Estimate:
    """What a job is expected to cost; tokens are characters over four."""

    rows: int
    tokens: int
    epochs: int
    usd: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.hosted", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="distilled train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for the file that is sent, and job.json")
    parser.add_argument("--config", type=Path, help="YAML with HostedSettings")
    parser.add_argument("--dry-run", action="store_true", help="write and check the file and say what it would cost; send nothing")
    arguments = parser.parse_args()
    config = settings.read(HostedSettings, arguments.config)
    state = tune(arguments.data, arguments.out, config=config, dry_run=arguments.dry_run)
    print(json.dumps(state, indent=2))


def tune(
    data: Path,
    out: Path,
    *,
    config: HostedSettings,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Train and return the state that is also in `out/job.json`; with `models_entry`, the lines for models.yaml, once it succeeded.

    Raises:
        TrafficUnreadable: the provider would refuse the rows.
        ConfigInvalid: there is no key, or the job would cost more than allowed.
        EngineFailed: the provider refused or failed the job, or it takes longer than `most_seconds`; run again to go on waiting.
    """
    file, estimate = prepare(data, out, config)
    say(f"hosted: {estimate.rows} rows, about {estimate.tokens} tokens, {estimate.epochs} epochs: about {estimate.usd:.2f} USD")
    if estimate.usd > config.max_usd:
        raise ConfigInvalid(f"the job may cost {estimate.usd:.2f} USD, more than max_usd={config.max_usd:g}; raise it or send fewer rows")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    wanted = {"digest": digest, "model": config.model, "method": config.method, "epochs": config.epochs}
    if dry_run:
        return {**wanted, "estimate": asdict(estimate), "status": "dry-run"}
    from openai import OpenAIError

    state = _resumed(out / STATE, wanted) | {"estimate": asdict(estimate)}
    try:
        return _run(_client(config), file, out / STATE, state, config, say, sleep, clock)
    except OpenAIError as broken:
        where = config.base_url or "the OpenAI API"
        raise EngineFailed(f"{where}: {broken}; what was done is in {out / STATE}, run again to go on") from broken


def prepare(data: Path, out: Path, config: HostedSettings) -> tuple[Path, Estimate]:
    """Write the file as the provider wants it, and what it would cost. Raises TrafficUnreadable."""
    rows, _ = export.read(data)
    lines = export.chat_rows(rows) if config.method == "supervised" else export.preference_rows(rows)
    if len(lines) < export.LEAST_ROWS:
        raise TrafficUnreadable(f"{data}: {len(lines)} rows for {config.method} training, at least {export.LEAST_ROWS} are needed")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{config.method}.jsonl"
    file.write_text(text, encoding="utf-8")
    tokens = round(sum(_characters(line) for line in lines) / CHARACTERS_A_TOKEN)
    return file, Estimate(len(lines), tokens, config.epochs, round(tokens * config.epochs * config.usd_per_mtok / 1e6, 4))


def models_entry(state: Mapping[str, Any], config: HostedSettings) -> dict[str, Any]:
    """The trained model as an entry of configs/models.yaml."""
    url = config.base_url or "https://api.openai.com/v1"
    name = str(state["fine_tuned_model"])
    return {"name": name, "tier": "student", "kind": "openai", "base_url": url, "model": name, "api_key_env": config.api_key_env}


def _run(
    client: OpenAI,
    file: Path,
    note: Path,
    state: dict[str, Any],
    config: HostedSettings,
    say: Callable[[str], None],
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> dict[str, Any]:
    if "file_id" not in state:
        with file.open("rb") as content:
            state["file_id"] = client.files.create(file=content, purpose="fine-tune").id
        _write(note, state)
    if "job_id" not in state:
        state["job_id"] = _made_before(client, state["file_id"]) or _create(client, state, config)
        _write(note, state)
    until = clock() + config.most_seconds
    while state.get("status") not in ENDED:
        job = client.fine_tuning.jobs.retrieve(state["job_id"])
        if job.status != state.get("status"):
            say(f"hosted: {job.id} {job.status}")
        state |= {"status": job.status, "fine_tuned_model": job.fine_tuned_model, "trained_tokens": job.trained_tokens}
        state["error"] = job.error.message if job.error else None
        _write(note, state)
        if job.status not in ENDED:
            if clock() > until:
                raise EngineFailed(f"job {job.id} is still {job.status} after {config.most_seconds:g} s; run again to go on waiting")
            sleep(config.poll_seconds)
    if state["status"] != "succeeded":
        why = state.get("error") or "no reason given"
        raise EngineFailed(f"job {state['job_id']} {state['status']}: {why}; delete {note} to start another")
    state["models_entry"] = models_entry(state, config)
    _write(note, state)
    return state


def _create(client: OpenAI, state: Mapping[str, Any], config: HostedSettings) -> str:
    kind = "supervised" if config.method == "supervised" else "dpo"
    method: Any = {"type": kind, kind: {"hyperparameters": {"n_epochs": config.epochs}}}
    job = client.fine_tuning.jobs.create(
        model=config.model, training_file=state["file_id"], method=method, suffix=config.suffix, seed=config.seed
    )
    return job.id


def _made_before(client: OpenAI, file_id: str) -> str | None:
    """A job of this file that an earlier run made and could not write down any more."""
    return next((job.id for job in client.fine_tuning.jobs.list(limit=100) if job.training_file == file_id), None)


def _client(config: HostedSettings) -> OpenAI:
    from openai import OpenAI

    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigInvalid(f"no key: set the environment variable {config.api_key_env}, or name another in api_key_env")
    return OpenAI(api_key=key, base_url=config.base_url, timeout=60.0)


def _resumed(note: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same job wrote down; a fresh start for other data or settings."""
    try:
        state: dict[str, Any] = json.loads(note.read_text())
    except (OSError, ValueError):
        return dict(wanted)
    same = all(state.get(name) == value for name, value in wanted.items())
    return state if same else dict(wanted)


def _write(note: Path, state: Mapping[str, Any]) -> None:
    """All or nothing: a half-written note would forget a job that is paid for."""
    fresh = note.with_suffix(".new")
    fresh.write_text(json.dumps(state, indent=2) + "\n")
    fresh.replace(note)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    parts: Sequence[Any] = list(value.values()) if isinstance(value, Mapping) else value
    return sum(_characters(part) for part in parts)


if __name__ == "__main__":
    main()
