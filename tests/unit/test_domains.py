from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.routing.domains import DiscoverySettings, Domain, DomainIndex, discover, match

WORDS = ["apple", "bridge", "candle", "dragon", "engine"]
DIMENSION = 64


def bundle(direction: int, count: int, *, seed: int = 0, spread: float = 0.08) -> np.ndarray:
    """Embeddings of length 1 around an axis of their own."""
    random = np.random.default_rng([direction, seed])
    rows = random.normal(0, spread, (count, DIMENSION))
    rows[:, direction] += 1.0
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def traffic(*sizes: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    embeddings = np.concatenate([bundle(i, size, seed=seed) for i, size in enumerate(sizes)])
    return embeddings, [f"please do the {WORDS[i]} task" for i, size in enumerate(sizes) for _ in range(size)]


def find(embeddings: np.ndarray, texts: list[str], labels: list[str | None] | None = None, *, seed: int = 0) -> list[Domain]:
    return discover(embeddings, texts, labels=labels or [None] * len(texts), seed=seed)


def test_each_kind_of_request_becomes_one_domain_named_by_its_own_words() -> None:
    found = find(*traffic(60, 90, 40))
    assert [(domain.name, domain.size) for domain in found] == [("bridge", 90), ("apple", 60), ("candle", 40)]


def test_requests_seldom_seen_are_no_domain() -> None:
    found = find(*traffic(100, 29))
    assert [domain.name for domain in found] == ["apple-task"]


def test_too_little_traffic_has_no_domain() -> None:
    assert find(*traffic(20)) == []
    assert find(np.zeros((0, DIMENSION), np.float32), []) == []


def test_the_same_traffic_and_seed_give_the_same_domains() -> None:
    embeddings, texts = traffic(200, 150)
    first, again = find(embeddings, texts), find(embeddings, texts)
    assert [d.to_dict() for d in first] == [d.to_dict() for d in again]


def test_traffic_larger_than_the_sample_keeps_its_small_domains() -> None:
    embeddings, texts = traffic(2000, 1500, 60)
    limits = DiscoverySettings(max_rows=300)
    found = discover(embeddings, texts, labels=[None] * len(texts), seed=1, settings=limits)
    assert [domain.name for domain in found] == ["apple", "bridge", "candle"]
    assert found[-1].size >= 45  # five of them were in the sample


def test_what_all_requests_share_does_not_make_them_one_domain_when_they_are_compared_about_their_mean() -> None:
    embeddings, texts = traffic(60, 60)
    shared = embeddings + 2.0 * bundle(7, 1)
    alike = (shared / np.linalg.norm(shared, axis=1, keepdims=True)).astype(np.float32)
    assert [domain.size for domain in find(alike, texts)] == [120]
    about_mean = discover(alike, texts, labels=[None] * 120, seed=0, settings=DiscoverySettings(directions=10))
    assert [(domain.name, domain.size) for domain in about_mean] == [("apple", 60), ("bridge", 60)]


def test_fewer_requests_than_directions_and_none_at_all_are_found_in_too() -> None:
    about_mean = DiscoverySettings(directions=50)
    assert discover(bundle(0, 40), ["sort"] * 40, labels=[None] * 40, seed=0, settings=about_mean) == []  # they differ by chance only
    assert discover(np.zeros((0, DIMENSION), np.float32), [], labels=[], seed=0, settings=about_mean) == []


def test_a_label_makes_a_domain_of_its_name_and_draws_in_its_like() -> None:
    embeddings, texts = traffic(80, 80)
    labels: list[str | None] = ["My Apples!"] * 40 + [None] * 120
    found = find(embeddings, texts, labels)
    assert {(domain.name, domain.given) for domain in found} == {("My Apples!", True), ("bridge", False)}
    assert next(domain.size for domain in found if domain.given) >= 75


def test_one_label_is_one_domain_even_where_its_requests_differ() -> None:
    embeddings, texts = traffic(60, 60)
    found = find(embeddings, texts, ["both"] * 120)
    assert [domain.name for domain in found] == ["both"]
    index = DomainIndex(found)
    assert {index.assign(row).domain for row in np.concatenate([bundle(0, 5, seed=9), bundle(1, 5, seed=9)])} == {"both"}


def test_a_label_on_a_few_requests_takes_no_domain_over() -> None:
    embeddings, texts = traffic(80)
    found = find(embeddings, texts, ["slip", "slip", *[None] * 78])
    assert [(domain.name, domain.size) for domain in found] == [("apple-task", 80)]


@pytest.mark.parametrize(
    ("text", "name"),
    [("8, 5, 2, ?", "numbers"), ("???", "domain-1"), ("привет дорогой друг", "domain-1"), ("../../Shadow", "shadow")],
)
def test_texts_without_telling_words_still_have_a_safe_name(text: str, name: str) -> None:
    assert [domain.name for domain in find(bundle(0, 50), [text] * 50)] == [name]


def test_a_word_of_few_requests_never_names_the_domain() -> None:
    texts = ["Margaret Thatcher"] * 4 + [f"order {i}" for i in range(46)]
    assert [domain.name for domain in find(bundle(0, 50), texts)] == ["order"]


def test_domains_with_the_same_words_have_different_names() -> None:
    embeddings, _ = traffic(50, 50)
    names = [domain.name for domain in find(embeddings, ["sort the list"] * 100)]
    assert names == ["list-sort", "list-sort-2"]


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="50 embeddings, 49 texts"):
        discover(bundle(0, 50), ["x"] * 49, labels=[None] * 50, seed=0)


def test_an_unseen_request_joins_its_domain_and_a_strange_one_is_novel() -> None:
    index = DomainIndex(find(*traffic(100, 100)))
    placed = index.assign_all(bundle(0, 200, seed=5))
    assert np.mean([assignment.domain == "apple" for assignment in placed]) > 0.97
    strange = index.assign(bundle(7, 1)[0])
    assert strange.domain is None
    assert strange.reason.startswith("novel: nearest is")


def test_without_domains_everything_is_novel() -> None:
    assert DomainIndex([]).assign(bundle(0, 1)[0]).domain is None


def test_a_domain_survives_json() -> None:
    (domain,) = find(*traffic(120))
    again = Domain.from_dict(json.loads(json.dumps(domain.to_dict())))
    assert (again.name, again.size, again.threshold, again.given) == (domain.name, domain.size, domain.threshold, domain.given)
    assert np.array_equal(again.centroids, domain.centroids)


def test_a_domain_keeps_its_name_when_its_words_change() -> None:
    old = find(*traffic(80, 80))
    embeddings, _ = traffic(70, 90, seed=3)
    new = find(embeddings, ["wholly other words"] * 70 + ["fresh vocabulary"] * 90)
    assert [domain.name for domain in match(old, new)] == ["bridge", "apple"]


def test_a_new_domain_takes_no_name_of_an_unrelated_old_one() -> None:
    old = [Domain("apple", bundle(0, 1), 50, 0.5)]
    new = [Domain("apple", bundle(3, 1), 50, 0.5)]
    assert [domain.name for domain in match(old, new)] == ["apple-2"]


def test_a_domain_that_is_gone_stays_only_when_asked_to() -> None:
    old = find(*traffic(80, 60))
    new = find(*traffic(80))
    assert [domain.name for domain in new] == ["apple-task"]
    assert [domain.name for domain in match(old, new)] == ["apple"]
    assert [domain.name for domain in match(old, new, keep={"bridge"})] == ["apple", "bridge"]


def test_a_name_that_clients_gave_is_never_changed() -> None:
    old = [Domain("apple", bundle(0, 1), 50, 0.5)]
    new = [Domain("fruit", bundle(0, 1), 50, 0.5, given=True)]
    assert [domain.name for domain in match(old, new)] == ["fruit"]


def test_a_found_domain_continues_one_that_clients_named_before() -> None:
    old = [Domain("fruit", bundle(0, 1), 50, 0.5, given=True)]
    new = [Domain("apple", bundle(0, 1, seed=2, spread=0.01), 50, 0.5)]
    assert [(domain.name, domain.given) for domain in match(old, new)] == [("fruit", True)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), max_size=6), st.lists(st.integers(0, 5), max_size=6))
def test_names_stay_unique_and_in_the_order_of_the_new_domains(old_axes: list[int], new_axes: list[int]) -> None:
    old = [Domain(f"old-{i}", bundle(axis, 1), 1, 0.5) for i, axis in enumerate(old_axes)]
    new = [Domain(f"old-{i}", bundle(axis, 1), 1, 0.5) for i, axis in enumerate(new_axes)]
    found = match(old, new, keep={"old-0"})
    names = [domain.name for domain in found]
    assert len(set(names)) == len(names)
    assert all(found[i].centroids is domain.centroids for i, domain in enumerate(new))
