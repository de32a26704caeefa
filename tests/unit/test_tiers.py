"""Bringing a tier to what the ledger names."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tutelage.fleet.tiers import Wanted, changes

NAMES = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.sampled_from(["d1", "d2", "d3"]), max_size=6)


@given(wanted=NAMES, loaded=NAMES)
def test_doing_the_changes_leaves_exactly_what_is_wanted(wanted: dict[str, str], loaded: dict[str, str]) -> None:
    load, unload = changes([Wanted(name, f"/s/{name}", digest) for name, digest in wanted.items()], loaded)
    after = {name: digest for name, digest in loaded.items() if name not in unload} | {w.name: w.digest for w in load}

    assert after == wanted


@given(NAMES)
def test_nothing_is_loaded_again_that_is_there(wanted: dict[str, str]) -> None:
    assert changes([Wanted(name, "/s", digest) for name, digest in wanted.items()], wanted) == ([], [])
