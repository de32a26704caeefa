"""A reviewer's moves and marks as orders."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tutelage.evolution.promotion import Verdict, confirmed
from tutelage.evolution.review import NAMES, UNKNOWN, Mark, Standing, moved, orders

STANDING = Standing(champion=2, tier="ta", challenger=3, able={1: "student", 2: "ta", 3: "ta"}, waiting={2: "teacher"})
names = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 4))


def told(standing: Standing, elsewhere: dict[str, int | None], **marks: str) -> list[tuple[str, int, str | None]]:
    found = orders(standing, elsewhere, {int(version[1:]): Mark(word) for version, word in marks.items()})
    return [(order.action, order.version, order.tier) for order in found]


def test_the_projection_names_the_champion_by_its_tier_too() -> None:
    assert STANDING.names() == {"champion": 2, "ta": 2, "challenger": 3}
    assert Standing().names() == {}


@given(names)
def test_names_that_stand_as_they_were_shown_were_moved_by_nobody(shown: dict[str, int]) -> None:
    assert moved(shown, {}, shown, STANDING) == {}


@given(names, names)
def test_a_projection_that_was_broken_off_anywhere_was_moved_by_nobody(shown: dict[str, int], meant: dict[str, int]) -> None:
    for done in range(len(NAMES) + 1):
        half = {**{n: v for n, v in shown.items() if n not in NAMES[:done]}, **{n: v for n, v in meant.items() if n in NAMES[:done]}}
        assert moved(shown, meant, half, STANDING) == {}


def test_a_name_that_stands_elsewhere_was_moved_and_one_that_is_gone_was_taken_away() -> None:
    shown = STANDING.names()
    assert moved(shown, shown, {"champion": 1, "ta": 2}, STANDING) == {"champion": 1, "challenger": None}


def test_a_reviewer_who_moves_a_name_to_where_the_ledger_has_it_anyway_has_ordered_nothing() -> None:
    assert moved({"champion": 1}, {"champion": 1}, {"champion": 2, "ta": 2, "challenger": 3}, STANDING) == {}


def test_each_move_is_an_order() -> None:
    assert told(STANDING, {"champion": 1}) == [("serve", 1, "student")]
    assert told(STANDING, {"champion": None}) == [("withdraw", 2, None)]
    assert told(STANDING, {"champion": 1, "ta": 1}) == [("serve", 1, "student"), ("serve", 1, "ta")]
    assert told(STANDING, {"challenger": 1}) == [("challenge", 1, "student")]
    assert told(STANDING, {"challenger": None}) == [("stop", 3, None)]
    assert told(STANDING, {"teacher": 2}) == [("approve", 2, "teacher")]
    assert told(STANDING, {"student": 2}) == [("serve", 2, "student")]


def test_moves_that_mean_nothing_are_answered_and_not_obeyed() -> None:
    for elsewhere in ({"champion": UNKNOWN}, {"champion": 4}, {"ta": 1}, {"ta": None}, {"challenger": 2}):
        ((action, _, _),) = told(STANDING, elsewhere)
        assert action == "nothing", elsewhere


def test_a_word_is_an_order_once() -> None:
    assert told(STANDING, {}, v2="veto") == [("veto", 2, None)]
    assert told(Standing(able=STANDING.able, out=frozenset({2})), {}, v2="veto") == []
    broken_off = Standing(champion=2, tier="ta", challenger=3, able=STANDING.able, out=frozenset({3}))
    assert told(broken_off, {}, v3="veto") == [("veto", 3, None)], "it is refused, but still on its way"
    assert told(STANDING, {}, v2="approve") == [("approve", 2, "teacher")]
    assert [action for action, _, _ in told(STANDING, {}, v1="approve", v3="perhaps")] == ["nothing", "nothing"]


@given(st.dictionaries(st.sampled_from(NAMES), st.one_of(st.none(), st.integers(0, 4))), st.sets(st.integers(1, 3)))
def test_a_vetoed_version_is_never_put_anywhere(elsewhere: dict[str, int | None], vetoed: set[int]) -> None:
    found = orders(STANDING, elsewhere, {version: Mark("veto") for version in vetoed})
    assert {o.version for o in found if o.action in ("serve", "challenge", "approve")} & vetoed == set()


def test_a_verdict_takes_effect_as_the_next_lower_tier_that_needs_nobody() -> None:
    verdict = Verdict("challenge", "ta", "better")
    assert confirmed(verdict, []) == verdict
    assert confirmed(verdict, ["teacher"]) == verdict
    held = confirmed(verdict, ["ta"])
    assert (held.action, held.tier, held.awaits) == ("challenge", "student", "ta")
    nothing = confirmed(verdict, ["ta", "student"])
    assert (nothing.action, nothing.tier, nothing.awaits) == ("wait", None, "ta")
    assert confirmed(Verdict("refuse", None, "worse"), ["ta", "student"]).action == "refuse"
