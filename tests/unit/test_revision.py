from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_domains import bundle, find, traffic

from tutelage.routing.domains import DiscoverySettings, Domain, DomainIndex
from tutelage.routing.revision import Revision, revise

WORDS = ["apple", "bridge", "candle", "dragon", "engine"]


def read(known: list[Domain], *parts: tuple[int, int], seed: int = 5) -> Revision:
    embeddings = np.concatenate([bundle(axis, size, seed=seed) for axis, size in parts])
    texts = [f"please do the {WORDS[axis]} task" for axis, size in parts for _ in range(size)]
    return revise(known, embeddings, texts, seed=0)


def two_in_one() -> Domain:
    """A domain that once was found around two directions."""
    centroids = np.concatenate([bundle(0, 1, spread=0.01), bundle(1, 1, spread=0.01)])
    return Domain("both", centroids, 100, 0.5)


def test_more_of_the_same_changes_nothing_but_sizes() -> None:
    known = find(*traffic(80, 60))
    revised = read(known, (0, 40), (1, 40))
    assert [d.name for d in revised.domains] == ["apple", "bridge"]
    assert sum(d.size for d in revised.domains) >= 140 + 80 - 4  # a few outliers of the new ones may belong to none
    assert revised.changes == ()
    assert revised.novel <= 4


def test_requests_that_fit_nowhere_form_a_domain_named_by_their_words() -> None:
    revised = read(find(*traffic(80)), (0, 40), (2, 50))
    assert [d.name for d in revised.domains] == ["apple-task", "candle"]
    (change,) = revised.changes
    assert (change.kind, change.name, change.of) == ("new", "candle", ())


def test_a_few_strange_requests_are_novel_and_form_nothing() -> None:
    revised = read(find(*traffic(80)), (0, 40), (2, 20))
    assert revised.changes == ()
    assert revised.novel >= 20


def test_a_domain_whose_requests_part_is_split_and_the_nearer_half_keeps_the_name() -> None:
    old = Domain("both", np.concatenate([bundle(0, 3, spread=0.01), bundle(1, 1, spread=0.01)]), 100, 0.4)
    revised = read([old], (0, 60), (1, 60))
    (change,) = revised.changes
    assert (change.kind, change.of) == ("split", ("both",))
    assert len(revised.domains) == 2
    index = DomainIndex(revised.domains)
    placed = {index.assign(bundle(axis, 1, seed=8, spread=0.01)[0]).domain for axis in (0, 1)}
    assert placed == {"both", change.name}


def test_a_domain_that_clients_named_is_never_split() -> None:
    from dataclasses import replace

    revised = read([replace(two_in_one(), given=True)], (0, 60), (1, 60))
    assert [d.name for d in revised.domains] == ["both"]
    assert revised.changes == ()


def test_domains_that_point_the_same_way_merge_under_the_larger_name() -> None:
    large, small = Domain("large", bundle(0, 1, spread=0.01), 200, 0.5), Domain("small", bundle(0, 1, seed=1, spread=0.01), 50, 0.5)
    revised = read([small, large], (0, 40))
    assert [(d.name, d.size) for d in revised.domains] == [("large", 290)]
    assert [(c.kind, c.name, set(c.of)) for c in revised.changes] == [("merged", "large", {"large", "small"})]


def test_domains_that_clients_named_never_merge() -> None:
    one = Domain("one", bundle(0, 1, spread=0.01), 200, 0.5, given=True)
    other = Domain("other", bundle(0, 1, seed=1, spread=0.01), 50, 0.5)
    assert {d.name for d in read([one, other], (0, 40)).domains} == {"one", "other"}


def test_a_domain_whose_student_serves_is_never_merged_away() -> None:
    large, small = Domain("large", bundle(0, 1, spread=0.01), 200, 0.5), Domain("small", bundle(0, 1, seed=1, spread=0.01), 50, 0.5)
    rows = bundle(0, 40, seed=5)
    kept = revise([small, large], rows, ["x"] * 40, keep={"small"}, seed=0)
    assert [(d.name, d.size) for d in kept.domains] == [("small", 290)]
    assert {d.name for d in revise([small, large], rows, ["x"] * 40, keep={"small", "large"}, seed=0).domains} == {"small", "large"}


def test_a_label_founds_a_domain_once_enough_requests_carry_it_and_stands_above_likeness() -> None:
    known = find(*traffic(80))
    rows, texts = np.concatenate([bundle(0, 40, seed=5), bundle(2, 30, seed=5)]), ["x"] * 70
    few = revise(known, rows, texts, labels=["fruit"] * 20 + [None] * 50, seed=0)
    assert "fruit" not in {d.name for d in few.domains}
    enough = revise(known, rows, texts, labels=["fruit"] * 40 + [None] * 30, seed=0)
    assert {d.name: (d.size, d.given) for d in enough.domains}["fruit"] == (40, True)
    assert [c.reason for c in enough.changes if c.name == "fruit"] == ["clients named 40 requests so"]


def test_a_found_domain_that_clients_begin_to_name_is_theirs_from_then_on() -> None:
    known = find(*traffic(80))
    revised = revise(known, bundle(0, 40, seed=5), ["x"] * 40, labels=[known[0].name] * 40, seed=0)
    assert [(d.name, d.given, d.size) for d in revised.domains] == [(known[0].name, True, 120)]
    assert revised.changes == ()


def test_without_new_requests_nothing_changes() -> None:
    known = find(*traffic(80, 60))
    revised = revise(known, np.zeros((0, 64), np.float32), [], seed=0)
    assert [d.to_dict() for d in revised.domains] == [d.to_dict() for d in known]
    assert (revised.changes, revised.novel) == ((), 0)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 embeddings, 1 texts, 1 labels"):
        revise([], bundle(0, 2), ["x"], labels=[None], seed=0)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 60), min_size=3, max_size=3), st.lists(st.integers(0, 60), min_size=3, max_size=3))
def test_names_stay_unique_and_no_domain_is_lost_without_a_word(first: list[int], second: list[int]) -> None:
    parts = [(axis, size) for axis, size in enumerate(second) if size]
    known = find(*traffic(*first))
    if not parts:
        return
    revised = read(known, *parts)
    names = [d.name for d in revised.domains]
    gone = {name for change in revised.changes if change.kind == "merged" for name in change.of} - set(names)
    assert len(set(names)) == len(names)
    assert {d.name for d in known} <= set(names) | gone
    assert all(len(d.centroids) <= DiscoverySettings().max_parts for d in revised.domains)
