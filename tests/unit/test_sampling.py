"""Sampling: even shares of domains and difficulties, and nobody over theirs."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from training.sampling import balanced, divide, within_share


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.floats(0, 1)), max_size=80), st.integers(1, 60))
def test_as_many_rows_are_kept_as_are_wanted_and_there(rows: list[tuple[str, float | None]], most: int) -> None:
    kept = balanced([d for d, _ in rows], [x for _, x in rows], most)
    assert len(kept) == min(len(rows), most)
    assert kept == sorted(set(kept))


def test_a_large_domain_does_not_crowd_out_a_small_one() -> None:
    domains = ["large"] * 90 + ["small"] * 10
    kept = Counter(domains[row] for row in balanced(domains, [None] * 100, 20))
    assert kept == {"large": 10, "small": 10}


def test_hard_rows_are_kept_as_often_as_easy_ones() -> None:
    difficulty: list[float | None] = [i / 100 for i in range(100)]
    kept = balanced(["d"] * 100, difficulty, 20)
    assert Counter(row // 20 for row in kept) == dict.fromkeys(range(5), 4)


@given(st.dictionaries(st.text(min_size=1, max_size=2), st.integers(0, 50), min_size=1), st.integers(0, 100))
def test_what_small_groups_leave_goes_to_the_others(sizes: dict[str, int], total: int) -> None:
    shares = divide(total, sizes)
    assert sum(shares.values()) == min(total, sum(sizes.values()))
    assert all(shares[name] <= sizes[name] for name in sizes)


@given(st.lists(st.sampled_from(["capped", "free", "other"]), max_size=100), st.floats(0.05, 0.95))
def test_a_capped_group_stays_within_its_share(groups: list[str], share: float) -> None:
    kept = within_share(groups, ["capped"], share)
    taken = sum(groups[row] == "capped" for row in kept)
    assert sum(groups[row] != "capped" for row in kept) == sum(group != "capped" for group in groups)
    assert taken <= share * len(kept) or taken == len(kept)


def test_a_group_that_is_alone_is_not_cut() -> None:
    assert within_share(["only"] * 5, ["only"], 0.2) == [0, 1, 2, 3, 4]
