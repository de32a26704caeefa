"""The tier's settings, read once from an environment mapping. It refuses to know where the values were exported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from inference.base import Quantization
from tutelage.errors import ConfigInvalid
from tutelage.settings import Strict

VARIABLES = {
    "base_dir": "TUTELAGE_BASE_DIR",
    "student_roots": "TUTELAGE_STUDENTS_DIR",
    "token": "TUTELAGE_TIER_TOKEN",
    "threads": "TUTELAGE_TIER_THREADS",
    "quantization": "TUTELAGE_TIER_QUANTIZATION",
    "max_batch": "TUTELAGE_TIER_MAX_BATCH",
    "max_waiting": "TUTELAGE_TIER_MAX_WAITING",
    "window_ms": "TUTELAGE_TIER_WINDOW_MS",
    "max_tokens": "TUTELAGE_TIER_MAX_TOKENS",
}


class ServiceSettings(Strict):
    """How one tier process runs.

    `student_roots` are the folders adapters may be loaded from (separated like PATH). `threads` 0 means all cores this
    process may use. `max_batch` counts rows of one forward pass, `max_waiting` requests beyond it. `window_ms` is how long
    an idle tier waits for company before it starts a batch. No `quantization`: what suits the base. `max_tokens` applies where a request
    names none. Without a `token` the control endpoints are off.
    """

    base_dir: Path | None = None
    student_roots: tuple[Path, ...] = ()
    token: str | None = Field(default=None, min_length=16)
    threads: int = Field(default=0, ge=0)
    quantization: Quantization | None = None
    max_batch: int = Field(default=16, ge=1, le=256)
    max_waiting: int = Field(default=256, ge=1)
    window_ms: float = Field(default=4.0, ge=0, le=1000)
    max_tokens: int = Field(default=256, ge=1)


def from_environment(environment: Mapping[str, str]) -> ServiceSettings:
    """Read the settings. Raises ConfigInvalid that lists every wrong variable at once."""
    given: dict[str, object] = {field: environment[name] for field, name in VARIABLES.items() if environment.get(name)}
    if "student_roots" in given:
        given["student_roots"] = tuple(part for part in str(given["student_roots"]).split(os.pathsep) if part)
    try:
        return ServiceSettings.model_validate(given)
    except ValidationError as error:
        faults = "; ".join(f"{VARIABLES[str(e['loc'][0])]}: {e['msg']}" for e in error.errors())
        raise ConfigInvalid(f"the tier's environment is wrong: {faults}") from error
