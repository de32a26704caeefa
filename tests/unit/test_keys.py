"""Keys: what is minted opens, and nothing else does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import Unauthenticated
from tutelage.gateway import keys
from tutelage.records import Key

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MINTED = keys.mint("pepper")


def stored(**changes: object) -> Key:
    facts = {"id": MINTED.id, "tenant_id": "ten_a", "role": None, "hash": MINTED.hash, "expires_at": None, "revoked_at": None}
    return Key(**(facts | changes))  # type: ignore[arg-type]


def test_a_minted_key_opens_and_its_secret_is_not_in_what_is_stored() -> None:
    presented = keys.parse(f"Bearer {MINTED.text}")

    assert keys.check(presented, stored(), pepper="pepper", now=NOW).tenant_id == "ten_a"
    assert presented.secret.encode() not in MINTED.hash


@given(position=st.integers(7, len(MINTED.text) - 1), character=st.sampled_from("0123456789abcdef"))
def test_any_changed_character_is_refused_before_a_lookup(position: int, character: str) -> None:
    changed = MINTED.text[:position] + character + MINTED.text[position + 1 :]
    if changed == MINTED.text:
        assert keys.parse(f"Bearer {changed}").id == MINTED.id
        return
    with pytest.raises(Unauthenticated):
        keys.parse(f"Bearer {changed}")


@given(st.text())
def test_no_text_makes_the_parser_fail_otherwise_than_by_refusing(header: str) -> None:
    with pytest.raises(Unauthenticated):
        keys.parse(header)


def test_revoked_expired_unknown_and_wrongly_peppered_keys_do_not_open() -> None:
    presented = keys.parse(f"Bearer {MINTED.text}")
    for wrong in (
        stored(revoked_at=NOW),
        stored(revoked_at=NOW + timedelta(minutes=5)),
        stored(expires_at=NOW),
        stored(hash=b"\0" * 32),
        None,
    ):
        with pytest.raises(Unauthenticated):
            keys.check(presented, wrong, pepper="pepper", now=NOW)
    with pytest.raises(Unauthenticated):
        keys.check(presented, stored(), pepper="salt", now=NOW)


def test_a_rotated_key_opens_until_its_overlap_ends() -> None:
    presented = keys.parse(f"Bearer {MINTED.text}")
    ending = stored(expires_at=NOW + timedelta(hours=1))

    assert keys.check(presented, ending, pepper="pepper", now=NOW)
    with pytest.raises(Unauthenticated, match="expired"):
        keys.check(presented, ending, pepper="pepper", now=NOW + timedelta(hours=1))
