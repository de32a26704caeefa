"""The files a student version learned from: which samples, from whose requests; and taking one tenant's out of them.

It knows the folders that a cycle writes (`students/NAME/vN`) and DVC's cache of them. It refuses to decide what an erasure entails.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

SHAPING = ("train", "validation")  # the splits that shape the weights; the others only judge
SPLITS = (*SHAPING, "calibration", "test")


class Sample(NamedTuple):
    """One example and where it came from; `key` is the SHA-256 of its line."""

    key: str
    split: str
    request_id: str | None
    tenant_id: str | None
    teacher: str | None
    provenance: str | None


@dataclass(frozen=True)
class Dataset:
    """What a version was trained on. `whole`: the training file is the one its manifest names, and every sample names its request."""

    samples: tuple[Sample, ...]
    manifest: dict[str, Any]
    whole: bool
    reason: str


def read(folder: Path) -> Dataset:
    """The samples that shaped a version's weights, held against its manifest."""
    samples = tuple(sample for split in SHAPING for sample in _samples(folder, split))
    manifest = _manifest(folder)
    train = folder / "curated" / "train.jsonl"
    if not train.exists() or not manifest:
        return Dataset(samples, manifest, False, "its training rows or its manifest are gone")
    if hashlib.sha256(train.read_bytes()).hexdigest() != manifest.get("data_digest"):
        return Dataset(samples, manifest, False, "the training rows are not those its manifest names")
    nameless = sum(sample.request_id is None for sample in samples)
    if nameless:
        return Dataset(samples, manifest, False, f"{nameless} of {len(samples)} samples name no request")
    return Dataset(samples, manifest, True, f"{len(samples)} samples, the rows its manifest names")


def requests(folder: Path) -> frozenset[str] | None:
    """The requests that a version was taught and examined with; None where its data are gone."""
    file = folder / "interactions.jsonl"
    if not file.exists():
        return None
    told = (orjson.loads(line)["metadata"] for line in file.read_bytes().splitlines())
    return frozenset(one["request_id"] for one in told if one.get("request_id"))


def read_curve(file: Path) -> list[dict[str, float]]:
    """A training's curve, a row for each step, with the columns it has a value in; steps and tokens are whole."""
    with file.open(newline="") as rows:
        return [
            {name: int(cell) if name in ("step", "tokens") else float(cell) for name, cell in row.items() if cell}
            for row in csv.DictReader(rows)
        ]


def tenants_of(folder: Path) -> Counter[str]:
    """Samples by tenant in all splits: whose requests this version learned from or was judged on."""
    return Counter(sample.tenant_id for split in SPLITS for sample in _samples(folder, split) if sample.tenant_id is not None)


def take_out(folder: Path, tenant_id: str, *, cache: Path) -> int:
    """Remove a tenant's rows from every file of a version, and DVC's copies of those files; how many rows it was."""
    removed = 0
    for file in sorted(folder.rglob("*.jsonl")):
        content = file.read_bytes()
        lines = content.splitlines(keepends=True)
        # answers to held-out prompts do not name their tenant: where one of its rows was judged, all of them go
        kept = [] if file.name == "predictions.jsonl" else [line for line in lines if _tenant(line) != tenant_id]
        if len(kept) == len(lines):
            continue
        removed += len(lines) - len(kept)
        _forget(content, cache)
        file.unlink()  # never rewritten in place: DVC may have linked it to its cache
        if kept:
            file.write_bytes(b"".join(kept))
    return removed


def _samples(folder: Path, split: str) -> Iterator[Sample]:
    file = folder / "curated" / f"{split}.jsonl"
    for line in file.read_bytes().splitlines() if file.exists() else ():
        row = orjson.loads(line)
        told = row.get("metadata") or {}
        yield Sample(
            hashlib.sha256(line).hexdigest(), split, told.get("request_id"), told.get("tenant"), told.get("teacher"), told.get("provenance")
        )


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / "adapter" / "manifest.json"
    manifest: dict[str, Any] = orjson.loads(file.read_bytes()) if file.exists() else {}
    return manifest


def _tenant(line: bytes) -> str | None:
    told = (orjson.loads(line).get("metadata") or {}).get("tenant") if line.strip() else None
    return None if told is None else str(told)


def _forget(content: bytes, cache: Path) -> None:
    """DVC keeps a copy of each output under the MD5 of its content."""
    name = hashlib.md5(content, usedforsecurity=False).hexdigest()
    (cache / "files" / "md5" / name[:2] / name[2:]).unlink(missing_ok=True)
