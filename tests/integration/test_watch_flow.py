"""The watch on a real PostgreSQL: outcomes become evidence once, challengers move on, champions that got worse go, nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.watch import Rules, look
from tutelage.evolution.evidence import Tally
from tutelage.evolution.promotion import PromotionSettings
from tutelage.evolution.rollout import RolloutSettings
from tutelage.evolution.watch import WatchSettings
from tutelage.gateway import snapshot
from tutelage.records import Attempt, Feedback, Interaction, Outcome, Tenant
from tutelage.routing.confidence import Calibrator
from tutelage.settings import RoutingSettings
from tutelage.stores import evidence, interactions, outcomes, registry, tenants
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.registry import Decision, Pointer

TENANT = Tenant("ten_a", "acme", "pro")
OLD, NEW = ("acme-sums", 1), ("acme-sums", 2)
PAST = datetime.now(UTC) - timedelta(minutes=5)
RULES = Rules(PromotionSettings(), RolloutSettings(), WatchSettings(baseline_outcomes=50))


@pytest.fixture
async def pool(database_url: str, tmp_path: Path) -> AsyncIterator[Pool]:
    """Version 1 answers sums, version 2 is in shadow. Both were taught what request r1000 asked."""
    pool = await open_pool(database_url, size=2)
    await tenants.create_tenant(pool, TENANT)
    await registry.open_cycle(pool, "c1", TENANT.id)
    for number in (1, 2):
        await registry.spawn(
            pool, tenant_id=TENANT.id, domain="sums", student="acme-sums", cycle_id="c1", folder=str(tmp_path / "v{version}")
        )
        (tmp_path / f"v{number}").mkdir()
        (tmp_path / f"v{number}" / "interactions.jsonl").write_text('{"metadata": {"request_id": "r1000"}}\n')
        facts = {"digest": f"d{number}", "calibrator": Calibrator("platt", 200, a=1.0).to_dict(), "evidence": {"confidence": 0.9}}
        await registry.complete_version(pool, "acme-sums", number, status=("ta", "challenger")[number - 1], **facts)
    decision = Decision(TENANT.id, "sums", "promote", *OLD, Pointer(1, *OLD, "ta"), "clears the floors", {})
    await registry.decide(pool, decision, expected=0)
    yield pool
    await pool.close()


class Traffic:
    """Requests with what each version said and whether the user found it right."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self._number = pool, 0

    async def send(self, *right: tuple[int, bool], times: int = 1, served: bool = True) -> None:
        recorder = interactions.Recorder(self._pool, flush_seconds=0, batch_rows=100, deadline_seconds=20)
        recorder.start()
        for _ in range(times):
            self._number += 1
            said = tuple(
                Attempt("acme-sums", "ta", f"d{version}", "4" if good else "5", 1.0, 0.9, served and place == 0, "", 10)
                for place, (version, good) in enumerate(right)
            )
            await recorder.record(_interaction(f"r{self._number}", said))
            await interactions.add_feedback(self._pool, Feedback(f"r{self._number}", TENANT.id, float(right[0][1]), "4", None))
        await recorder.stop()
        await self._pool.execute("update feedback set created_at = $1", PAST)

    async def compare(self, *good: tuple[int, bool], times: int = 1, served: bool = True, observed: float = 0.1, prompt: str = "") -> None:
        """Requests that nobody judged, where the answers of these versions were held against the teacher's."""
        recorder = interactions.Recorder(self._pool, flush_seconds=0, batch_rows=100, deadline_seconds=20)
        recorder.start()
        for _ in range(times):
            self._number += 1
            name = f"r{self._number}"
            said = tuple(
                Attempt("acme-sums", "ta", f"d{version}", "4", 1.0, 0.9, served and place == 0, "", 10)
                for place, (version, _) in enumerate(good)
            )
            await recorder.record(_interaction(name, said)._replace(prompt_hash=(prompt or name).encode()))
            for place, (version, right) in enumerate(good):
                facts = (TENANT.id, name, "acme-sums", f"d{version}", "sums", 1.0, 0.9, float(right), served and place == 0)
                await outcomes.add(self._pool, [Outcome(*facts, "teacher", observed)])
        await recorder.stop()
        await self._pool.execute("update outcomes set created_at = $1", PAST)

    async def judge(self, number: int, *, label: str) -> None:
        await interactions.add_feedback(self._pool, Feedback(f"r{number}", TENANT.id, 0.0, label, None))
        await self._pool.execute("update feedback set created_at = $1", PAST)
        await self._pool.execute("update outcomes set created_at = $1", PAST)

    async def fail(self, *, times: int, at: datetime = PAST) -> None:
        """Requests at which version 1 failed, so the teacher answered."""
        recorder = interactions.Recorder(self._pool, flush_seconds=0, batch_rows=100, deadline_seconds=20)
        recorder.start()
        for _ in range(times):
            self._number += 1
            failed = Attempt("acme-sums", "ta", "d1", "", None, None, False, "failed: model acme-sums.v1 failed: HTTP 500", 0)
            await recorder.record(_interaction(f"r{self._number}", (failed,))._replace(created_at=at))
        await recorder.stop()

    async def look(self) -> list[str]:
        return await look(self._pool, RULES)


def _interaction(request_id: str, attempts: tuple[Attempt, ...]) -> Interaction:
    facts: dict[str, Any] = {
        "request_id": request_id, "tenant_id": TENANT.id, "key_id": "k", "created_at": PAST,
        "messages": [{"role": "user", "content": "2 + 2"}], "prompt_hash": request_id.encode(), "answer": attempts[0].answer,
        "model": "acme-sums", "tier": "ta", "route": "cascade", "reason": "", "cache": "miss", "domain": "sums", "given_domain": None,
        "confidence": 0.9, "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 1, "tokens_estimated": False,
        "cost_microusd": 10, "latency_ms": 12, "attempts": attempts,
    }  # fmt: skip
    return Interaction(**facts)


async def challenge(pool: Pool) -> None:
    await evidence.begin_rollout(pool, evidence.Rollout(TENANT.id, "sums", *NEW, 0, "ta"))


async def test_each_verdict_counts_once_for_every_version_that_answered(pool: Pool) -> None:
    await challenge(pool)
    traffic = Traffic(pool)
    await traffic.send((1, True), (2, True), times=3)
    await traffic.send((1, False), (2, True))
    await traffic.look()
    await traffic.look()

    assert (await evidence.read(pool, OLD))["live"] == Tally(3, 0, 1)
    assert (await evidence.read(pool, NEW))["live"] == Tally(4)
    assert (await evidence.read(pool, NEW))["pairs"] == Tally(1, 3, 0)


async def test_a_challenger_goes_from_shadow_to_champion_step_by_step_and_gateways_see_each_share(pool: Pool) -> None:
    await challenge(pool)
    traffic = Traffic(pool)
    await traffic.send((1, True), (2, True), times=12)
    await traffic.send((1, False), (2, True), times=24)
    shares = []
    for _ in range(5):
        await traffic.look()
        view = (await snapshot.read(pool, routing=RoutingSettings(), teachers=[])).view(TENANT.id)
        shares.append(view.challengers["sums"].percent if view.challengers else None)
        await traffic.send((1, False), times=20)
        await traffic.send((2, True), times=20)

    assert shares == [1, 10, 50, None, None]
    assert (await registry.pointer(pool, TENANT.id, "sums")).version == 2
    steps = [row["action"] for row in await registry.list_promotions(pool) if row["version"] == 2]
    assert steps[:4] == ["advance", "advance", "advance", "promote"]


async def test_a_challenger_that_is_worse_is_stopped_and_the_champion_stays(pool: Pool) -> None:
    await challenge(pool)
    traffic = Traffic(pool)
    await traffic.send((1, True), (2, False), times=20)
    (told,) = await traffic.look()

    assert "stop" in told
    assert await evidence.rollouts(pool) == []
    assert (await registry.pointer(pool, TENANT.id, "sums")).version == 1


async def test_a_student_that_knew_its_held_out_items_and_nothing_else_trips_the_alarm(pool: Pool) -> None:
    await challenge(pool)
    await evidence.add(pool, NEW, "held-out", Tally(110))
    traffic = Traffic(pool)
    await traffic.send((1, True), (2, True), times=20)
    await traffic.send((1, False), (2, False), times=12)
    (told,) = await traffic.look()

    assert "contaminated: 110 of 110" in told
    assert await evidence.rollouts(pool) == []


async def test_a_champion_that_gets_worse_is_rolled_back_to_the_one_before_it_within_two_seconds(pool: Pool) -> None:
    await registry.complete_version(pool, *NEW, status="ta")
    now = Decision(TENANT.id, "sums", "promote", *NEW, Pointer(2, *NEW, "ta"), "better", {})
    await registry.decide(pool, now, expected=1)
    assert [(name, digest) for name, _, digest in await registry.standby(pool)] == [("acme-sums.v1", "d1")], "the one before is kept warm"
    traffic = Traffic(pool)
    await traffic.send((2, True), times=50)
    await traffic.look()
    await traffic.send((2, False), times=12)
    started = time.perf_counter()
    (told,) = await traffic.look()
    view = (await snapshot.read(pool, routing=RoutingSettings(), teachers=[])).view(TENANT.id)

    assert time.perf_counter() - started < 2
    assert "rolled back to acme-sums" in told
    assert [(s.version, s.digest) for s in view.students] == [(1, "d1")]
    assert view.lineages == {"student:acme-sums:d1"}, "answers of the version that left are no answers any more"
    assert await traffic.look() == []


async def test_a_first_version_that_gets_worse_leaves_its_domain_to_the_teachers(pool: Pool) -> None:
    traffic = Traffic(pool)
    await traffic.send((1, True), times=50)
    await traffic.send((1, False), times=12)
    (told,) = await traffic.look()

    assert "rolled back to the teachers" in told
    assert await registry.champions(pool) == []


async def test_a_ta_that_shows_enough_becomes_a_teacher_and_one_that_shows_too_little_a_student(pool: Pool) -> None:
    traffic = Traffic(pool)
    await traffic.send((1, True), times=49)
    assert await traffic.look() == []
    await traffic.send((1, True), times=1)
    assert "promote to teacher" in (await traffic.look())[0]
    assert (await registry.pointer(pool, TENANT.id, "sums")).tier == "teacher"
    assert "live" not in await evidence.read(pool, OLD), "what it shows as a teacher is counted anew"
    await evidence.add(pool, OLD, "live", Tally(0, 0, 60))

    assert "demote to ta" in (await traffic.look())[0]


async def test_a_ta_that_shows_enough_waits_where_a_person_confirms_teachers_and_is_asked_once(pool: Pool) -> None:
    traffic = Traffic(pool)
    await traffic.send((1, True), times=60)
    rules = replace(RULES, promotion=PromotionSettings(approval=("teacher",)))
    (told,) = await look(pool, rules)

    assert "waits for approval as teacher" in told
    assert (await registry.pointer(pool, TENANT.id, "sums")).tier == "ta"
    assert [row["awaits"] for row in await registry.list_versions(pool)] == ["teacher", None]
    assert await look(pool, rules) == []


async def test_tests_of_a_year_are_numbered_once_and_passed_ones_are_counted(pool: Pool) -> None:
    assert await evidence.enrol(pool, *OLD, "ta", year=2026) == (1, 0)
    await evidence.mark_passed(pool, *OLD, "ta")
    assert await evidence.enrol(pool, *NEW, "champion", year=2026) == (2, 1)
    assert await evidence.enrol(pool, *OLD, "ta", year=2027) == (1, 0), "a question keeps its number"
    assert await evidence.enrol(pool, *NEW, "ta", year=2027) == (1, 0)


async def test_a_crash_between_the_ledger_and_what_follows_is_finished_by_the_next_look(pool: Pool) -> None:
    await challenge(pool)
    await registry.decide(pool, Decision(TENANT.id, "sums", "promote", *NEW, Pointer(2, *NEW, "ta"), "better", {}), expected=1)
    await Traffic(pool).look()

    assert await evidence.rollouts(pool) == []
    assert {row["version"]: row["status"] for row in await registry.list_versions(pool)}[2] == "ta"


async def test_a_challenger_answers_its_share_of_the_requests_and_in_shadow_none(pool: Pool) -> None:
    await challenge(pool)
    prompts = [f"{number} + 1" for number in range(400)]

    async def by_challenger() -> int:
        view = (await snapshot.read(pool, routing=RoutingSettings(), teachers=[])).view(TENANT.id)
        served = [view.serving(view.students[0], prompt) for prompt in prompts]
        assert {(student.version, adapter) for student, adapter in served} <= {(1, "acme-sums.v1"), (2, "acme-sums.v2")}
        assert ("student:acme-sums:d2" in view.lineages) == bool(view.challengers["sums"].percent)
        return sum(student.version == 2 for student, _ in served)

    assert await by_challenger() == 0
    (rollout,) = await evidence.rollouts(pool)
    await evidence.move_rollout(pool, rollout, percent=50)
    assert 150 < await by_challenger() < 250


# --- where nobody judges -------------------------------------------------------------------------------------------------


async def test_comparisons_with_the_teacher_count_once_and_apart_from_verdicts_and_held_out_items(pool: Pool) -> None:
    traffic = Traffic(pool)
    await evidence.add(pool, OLD, "held-out", Tally(10))
    await traffic.send((1, True), times=2)
    await traffic.compare((1, True), times=3)
    await traffic.compare((1, False))
    await traffic.look()
    await traffic.look()

    assert await evidence.read(pool, OLD) == {"held-out": Tally(10), "live": Tally(2), "shadow": Tally(3, 0, 1)}


async def test_an_installation_that_nobody_gives_feedback_promotes_by_comparisons(pool: Pool) -> None:
    traffic = Traffic(pool)
    await evidence.add(pool, OLD, "held-out", Tally(500))
    await traffic.compare((1, True), times=49)
    assert await traffic.look() == []
    await traffic.compare((1, True))

    assert "promote to teacher" in (await traffic.look())[0]
    assert set(await evidence.read(pool, OLD)) == {"held-out"}, "what it shows as a teacher is counted anew"


async def test_tries_that_were_not_given_are_compared_always_and_counted_as_often_as_those_that_were(pool: Pool) -> None:
    traffic = Traffic(pool)
    for right in (True, False):
        await traffic.compare((1, right), times=200, served=False, observed=1.0)
    await traffic.look()

    assert 20 < (await evidence.read(pool, OLD))["shadow"].n < 65


async def test_a_prompt_that_a_version_was_taught_is_no_evidence_of_it_whenever_it_is_asked(pool: Pool) -> None:
    traffic = Traffic(pool)
    traffic._number = 999
    await traffic.send((1, True))
    for prompt in ("r1000", "new"):
        await traffic.compare((1, True), prompt=prompt)
    await traffic.look()

    assert (await evidence.read(pool, OLD))["shadow"] == Tally(1)


async def test_where_nobody_knows_what_a_version_was_taught_nothing_is_new_to_it(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "v1" / "interactions.jsonl").unlink()
    traffic = Traffic(pool)
    await traffic.compare((1, True), times=3)
    await traffic.look()

    assert await evidence.read(pool, OLD) == {}


async def test_a_verdict_overrules_a_comparison_of_the_same_answer_whichever_came_first(pool: Pool) -> None:
    traffic = Traffic(pool)
    await traffic.compare((1, True), times=3)
    await traffic.judge(1, label="5")
    await traffic.look()
    assert await evidence.read(pool, OLD) == {"live": Tally(0, 0, 1), "shadow": Tally(2)}
    await traffic.judge(2, label="5")
    await traffic.look()
    await traffic.look()

    assert await evidence.read(pool, OLD) == {"live": Tally(0, 0, 2), "shadow": Tally(1)}


async def test_a_comparison_from_before_a_count_began_anew_is_not_taken_back_from_it(pool: Pool) -> None:
    traffic = Traffic(pool)
    await traffic.compare((1, True), times=2)
    await traffic.look()
    await evidence.forget(pool, OLD, "shadow")
    await traffic.compare((1, True))
    await traffic.judge(1, label="5")
    await traffic.look()

    assert (await evidence.read(pool, OLD))["shadow"] == Tally(1)


async def test_a_request_is_one_pair_whether_it_was_compared_or_judged_or_both(pool: Pool) -> None:
    await challenge(pool)
    traffic = Traffic(pool)
    await traffic.compare((1, False), (2, True), times=2)
    await traffic.judge(1, label="4")
    await traffic.look()
    await traffic.judge(2, label="4")
    await traffic.look()
    found = await evidence.read(pool, NEW)

    assert (found["pairs"], found["shadow-pairs"], found["stage"]) == (Tally(0, 1, 0), Tally(1), Tally(1, 1, 0))


async def test_a_challenger_takes_over_by_comparisons_alone(pool: Pool) -> None:
    await challenge(pool)
    traffic = Traffic(pool)
    await traffic.compare((1, True), (2, True), times=12)
    await traffic.compare((1, False), (2, True), times=24)
    for _ in range(4):
        await traffic.look()
        await traffic.compare((1, False), times=20)
        await traffic.compare((2, True), times=20)

    assert (await registry.pointer(pool, TENANT.id, "sums")).version == 2
    assert "pairs" not in await evidence.read(pool, NEW)


async def test_a_champion_that_agrees_less_with_the_teacher_than_it_did_is_rolled_back(pool: Pool) -> None:
    traffic = Traffic(pool)
    await traffic.compare((1, True), times=45)
    await traffic.compare((1, False), times=5)
    await traffic.look()
    await traffic.compare((1, False), times=14)
    (told,) = await traffic.look()

    assert "rolled back to the teachers: agreement: " in told


async def test_a_champion_that_fails_is_rolled_back_and_what_failed_counts_in_no_other_signal(pool: Pool) -> None:
    traffic = Traffic(pool)
    await traffic.send((1, True), times=20)
    await traffic.fail(times=3)
    assert await traffic.look() == []
    watches = {signal: (watched.seen, watched.bad) for signal, (watched, _) in (await evidence.watches(pool, OLD)).items()}
    assert (watches["error"], watches["truncation"], watches["latency"]) == ((23, 3), (20, 0), (20, 0))
    await traffic.fail(times=12, at=PAST + timedelta(seconds=1))
    (told,) = await traffic.look()

    assert "rolled back to the teachers: error: " in told
    assert await registry.champions(pool) == []
