"""How a cycle reads its traffic: which versions count when gaps are measured, and which prompts are encoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flows import traffic
from flows.workshop import Cycle
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
