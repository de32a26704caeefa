"""How a cycle reads its traffic: domains carried on, versions that count when gaps are measured, and what is encoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_domains import bundle

from flows import traffic
from flows.traffic import READ_UNTIL, Carried, carry_on
from flows.workshop import Cycle
from tutelage.routing.domains import DiscoverySettings
from tutelage.stores.gaps import newest


def test_a_version_that_a_cut_off_cycle_left_in_training_hides_no_gap() -> None:
    def version(domain: str, number: int, status: str, tenant: str = "a") -> dict[str, object]:
        return {"tenant_id": tenant, "domain": domain, "version": number, "status": status}

    known = newest(
        [
            version("sums", 1, "training"),
            version("gold", 1, "refused"),
            version("gold", 2, "training"),
            version("oil", 1, "student"),
            version("oil", 2, "ta"),
            version("tin", 1, "ta", tenant="b"),
        ],
        "a",
    )
    assert {domain: v["version"] for domain, v in known.items()} == {"gold": 1, "oil": 2}


def test_only_what_has_no_embedding_yet_is_encoded_and_equal_prompts_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def encode(_cycle: object, prompts: list[str]) -> np.ndarray:
        asked.extend(prompts)
        return np.array([[len(prompt), 0.0] for prompt in prompts], dtype="f4")

    monkeypatch.setattr(traffic, "_embed", encode)
    known = np.array([9.0, 9.0], dtype="f4")
    rows = [{"embedding": None}, {"embedding": known.tobytes()}, {"embedding": None}, {"embedding": None}]
    found = traffic._embeddings(Cycle("c", "t", "t", tmp_path, tmp_path, ""), rows, ["aa", "bb", "aa", "c"])

    assert asked == ["aa", "c"]
    assert found.tolist() == [[2, 0], [9, 9], [2, 0], [1, 0]]


@dataclass
class Tenant:
    """Its requests so far, and the records of its domains as the last cycle saved them."""

    records: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)

    def ask(self, axis: int, count: int, *, label: str | None = None) -> None:
        self.vectors.extend(bundle(axis, count, seed=len(self.rows)))
        for _ in range(count):
            at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=len(self.rows))
            self.rows.append({"created_at": at, "given_domain": label, "domain": None})

    def cycle(self, *, window: int = 10_000, keep: set[str] = frozenset()) -> Carried:  # type: ignore[assignment]
        rows, vectors = self.rows[-window:], np.stack(self.vectors[-window:])
        prompts = [f"please do the {['apple', 'bridge', 'candle', 'dragon'][int(v[:4].argmax())]} task" for v in vectors]
        found = carry_on(self.records, rows, prompts, vectors, keep=keep, settings=DiscoverySettings())
        for row, domain in zip(rows, found.placed, strict=True):
            row["domain"] = domain
        until = rows[-1]["created_at"].isoformat()
        self.records = [domain.to_dict() | {READ_UNTIL: until} for domain in found.domains]
        return found


def test_a_request_is_read_into_its_domain_once() -> None:
    tenant = Tenant()
    tenant.ask(0, 60)
    tenant.cycle()
    tenant.ask(0, 40)
    assert [domain.size for domain in tenant.cycle().domains] == [100]
    assert [domain.size for domain in tenant.cycle().domains] == [100]


def test_requests_of_several_cycles_that_fit_nowhere_form_a_domain_together() -> None:
    tenant = Tenant()
    tenant.ask(0, 60)
    tenant.cycle()
    tenant.ask(2, 20)
    assert len(tenant.cycle().domains) == 1
    tenant.ask(2, 20)
    found = tenant.cycle()
    assert [(change.kind, change.name) for change in found.changes] == [("new", "candle-task")]
    assert found.placed[-40:].count("candle-task") >= 38


def test_labels_name_domains_and_recognise_what_has_none() -> None:
    tenant = Tenant()
    tenant.ask(0, 80, label="fruit")
    tenant.ask(1, 80, label="roads")
    tenant.ask(0, 40)
    found = tenant.cycle()
    assert {domain.name for domain in found.domains} == {"fruit", "roads"}
    assert found.placed[-40:].count("fruit") >= 36


def test_a_domain_that_nobody_asks_of_any_more_is_forgotten_unless_a_student_serves_it() -> None:
    tenant = Tenant()
    tenant.ask(0, 60)
    tenant.cycle()
    tenant.ask(1, 60)
    assert {domain.name for domain in tenant.cycle().domains} == {"apple-task", "bridge-task"}
    tenant.ask(1, 60)
    assert {domain.name for domain in tenant.cycle(window=60, keep={"apple-task"}).domains} == {"apple-task", "bridge-task"}
    assert {domain.name for domain in tenant.cycle(window=60).domains} == {"bridge-task"}
