"""What a tier serves when it starts: a base folder, and the adapters that are there from the beginning.

A tier built as a Bento carries its own base and student in the model store, and serves exactly those whatever the
environment says. A tier run from a checkout reads its base from the settings and starts without adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bentos.tier.settings import ServiceSettings
from tutelage.errors import EngineFailed

ROLE = "tutelage_role"  # "base" or "adapter", in a stored model's metadata
NAME = "tutelage_name"
DIGEST = "tutelage_digest"  # a base's fingerprint or an adapter's digest


@dataclass(frozen=True)
class Packed:
    """One adapter that is served from the start."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Contents:
    base_dir: Path
    adapters: tuple[Packed, ...]


def of_bento(models: Sequence[tuple[Path, Mapping[str, Any]]]) -> Contents:
    """Return what a Bento carries, from its models' (folder, metadata). Raises EngineFailed when the base is missing."""
    bases = [path for path, metadata in models if metadata.get(ROLE) == "base"]
    if len(bases) != 1:
        raise EngineFailed(
            f"this Bento carries {len(bases)} base models and needs exactly one; build it with `python -m bentos.tier.package`"
        )
    packed = [Packed(str(metadata[NAME]), path, str(metadata[DIGEST])) for path, metadata in models if metadata.get(ROLE) == "adapter"]
    return Contents(bases[0], tuple(packed))


def of_settings(settings: ServiceSettings, *, models_dir: Path) -> Contents:
    """Return what a checkout serves: the named base, or the packaged one, written to `models_dir` when missing."""
    from inference.base import materialise

    return Contents(settings.base_dir or materialise(models_dir), ())
