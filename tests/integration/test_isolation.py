"""Two tenants do the same things at once at random, and no byte of one reaches the other (benchmarks/isolation.py, in small)."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.isolation import KINDS, Owners, Side, run
from benchmarks.replicas import Party, Replica, Site

pytestmark = pytest.mark.slow


def test_no_byte_of_a_tenant_reaches_another(standing: tuple[Site, Replica]) -> None:
    report = asyncio.run(run(standing[0], [standing[1]], operations=2000, clients=16, seed=7, told=lambda: None))
    assert (report["crossed"], report["wrong"], report["public"], report["stored"]) == ([], {}, [], [])
    assert report["cache"]["hit-exact"] > 200, "there was too little to cross"
    assert report["things_owned"] > 1000
    assert len({answer.split(":")[0] for answer in report["answers"]} & set(KINDS)) == len(KINDS)


def test_what_crosses_is_seen() -> None:
    red, blue = (Side(name, Party(f"ten_{name}", "k", "a", "o")) for name in ("red", "blue"))
    owners = Owners()
    owners.look(red, "an answer", b'{"content": "call-17 canary-red-3"}')
    assert owners.crossed == []
    owners.look(blue, "an answer", b"call-17")
    owners.look(blue, "an error", b"no model 'canary-red-9'")
    assert owners.crossed == ["call-17 of red in an answer of blue", "canary-red-9 of red in an error of blue"]
