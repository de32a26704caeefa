"""The report's figures, recomputed by hand or checked for what must hold of any run."""

from __future__ import annotations

import json
import math
from typing import get_args

import observations
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.demo.outcome import Answered, Phase, Prediction, Teacher, Trained, reliability, saving, summarise
from tutelage.records import Tier
from tutelage.scoring import wilson

DOMAIN_KEYS = {
    *("n_train", "n_test", "majority", "before", "after", "wilson95"),
    *("decision", "reason", "ece", "share_by_student", "student_precision"),
}
SLICE_KEYS = {"n", "cost_per_1k_usd", "accuracy", "share_by_tier", "share_cached"}

ANSWERED = st.builds(
    Answered,
    task=st.sampled_from(["a", "b", "c"]),
    phase=st.sampled_from(get_args(Phase)),
    correct=st.booleans(),
    cost_usd=st.floats(0, 1e-2),
    tier=st.sampled_from([*get_args(Tier), None]),
    cached=st.booleans(),
    confidence=st.none() | st.floats(0, 1),
    student=st.none() | st.just("s"),
    escalated=st.booleans(),
    student_correct=st.none() | st.booleans(),
)


def trained(task: str = "a", student: str | None = "s", **changes: object) -> Trained:
    values: dict[str, object] = {
        "decision": "promoted",
        "reason": "clears the floors",
        "n_train": 100,
        "n_test": 40,
        "majority_correct": 10,
        "before_correct": 2,
        "after_correct": 36,
    }
    return Trained(task, student, **{**values, **changes})  # type: ignore[arg-type]


def replayed(count: int, *, correct: bool, tier: Tier = "ta", confidence: float = 0.9, **changes: object) -> list[Answered]:
    values: dict[str, object] = {"cost_usd": 1e-6, "cached": False, "student": "s", **changes}
    return [Answered("a", "after", correct, tier=tier, confidence=confidence, **values)] * count  # type: ignore[arg-type]


def test_the_report_holds_every_key_of_the_contract_and_is_json() -> None:
    result = summarise(observations.answered(), observations.trained(), observations.run())
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))

    assert {"wall_seconds", "peak_rss_mb", "domains", "traffic", "prices", "versions"} <= report.keys()
    assert set(report["domains"]) == set(observations.STUDENTS)
    for domain in report["domains"].values():
        assert domain.keys() >= DOMAIN_KEYS
        assert domain["decision"] in ("promoted", "kept_student", "refused")
    assert set(report["traffic"]) == {"all", "learnable"}
    for phases in report["traffic"].values():
        assert set(phases) == {"before", "after"}
        assert all(part.keys() >= SLICE_KEYS for part in phases.values())


def test_held_out_figures_come_from_the_training_and_traffic_figures_from_the_replay() -> None:
    answers = [*replayed(27, correct=True), *replayed(3, correct=False)]
    answers += replayed(10, correct=True, tier="teacher", confidence=0.2, escalated=True, student_correct=False)

    domain = summarise(answers, [trained()], observations.run()).domains["a"]

    bounds = wilson(36, 40)
    assert (domain.n_train, domain.n_test, domain.majority, domain.before, domain.after) == (100, 40, 0.25, 0.05, 0.9)
    assert domain.wilson95 == (bounds.lo, bounds.hi)
    assert domain.share_by_student == 0.75
    assert domain.student_precision == 0.9
    assert domain.students[0].share_answered == 0.75
    # 40 answers make two bins of 20: 0.2 stated for 10 wrong ones, 0.9 for 30 of which 27 are right
    assert domain.ece == pytest.approx((10 * 0.2 + 30 * 0.0) / 40)


def test_a_base_measured_on_fewer_items_keeps_the_wider_interval_of_those() -> None:
    domain = summarise([], [trained(before_correct=1, before_n=10)], observations.run()).domains["a"]

    bounds = wilson(1, 10)
    assert domain.before == 0.1
    assert domain.before_wilson95 == (bounds.lo, bounds.hi)


def test_cost_accuracy_and_shares_of_a_slice_are_those_of_its_requests() -> None:
    answers = [
        Answered("a", "after", True, 0.001, "teacher"),
        Answered("a", "after", True, 0.0, "teacher", cached=True),
        Answered("a", "after", False, 0.002, "student", student="s"),
        Answered("b", "after", False, 0.0, None),
    ]

    traffic = summarise(answers, [], observations.run(learnable=frozenset({"a"}))).traffic

    everything, learnable = traffic["all"]["after"], traffic["learnable"]["after"]
    assert everything.n == 4
    assert everything.cost_per_1k_usd == pytest.approx(0.75)
    assert everything.accuracy == 0.5
    assert everything.share_by_tier == {"student": 0.25, "ta": 0.0, "teacher": 0.25}
    assert (everything.share_cached, everything.share_unanswered) == (0.25, 0.25)
    assert learnable.n == 3
    assert learnable.cost_per_1k_usd == pytest.approx(1.0)
    assert traffic["all"]["before"].n == 0
    assert traffic["all"]["before"].accuracy is None


@settings(max_examples=60, deadline=None)
@given(answers=st.lists(ANSWERED, max_size=60))
def test_for_any_traffic_the_parts_add_up_to_the_whole_and_the_report_is_json(answers: list[Answered]) -> None:
    result = summarise(answers, [], observations.run(learnable=frozenset({"a", "b"})))

    json.dumps(result.to_dict(), allow_nan=False)
    for phases in result.traffic.values():
        for part in phases.values():
            total = sum(part.share_by_tier.values()) + part.share_cached + part.share_unanswered
            assert total == pytest.approx(1.0 if part.n else 0.0)
    for phase in get_args(Phase):
        assert sum(domain.served[phase].n for domain in result.domains.values()) == result.traffic["all"][phase].n
    for domain in result.domains.values():
        assert 0.0 <= domain.share_by_student <= 1.0
        assert domain.ece is None or 0.0 <= domain.ece <= 1.0


def test_a_saving_is_found_with_an_interval_around_it_that_does_not_change_from_call_to_call() -> None:
    before = [Answered("a", "before", True, 0.001 * (1 + i % 3), "teacher") for i in range(90)]
    after = [Answered("a", "after", True, 0.0005 * (1 + i % 3), "student") for i in range(90)]

    found = saving([*before, *after], seed=1)

    assert found == saving([*before, *after], seed=1)
    assert found.share == pytest.approx(0.5)
    assert found.interval95 is not None
    low, high = found.interval95
    assert 0.3 < low < 0.5 < high < 0.65


def test_a_dearer_after_is_a_negative_saving() -> None:
    answers = [Answered("a", phase, True, cost, "teacher") for phase, cost in (("before", 1.0), ("after", 1.5)) for _ in range(5)]  # type: ignore[arg-type]

    assert saving(answers, seed=0).share == pytest.approx(-0.5)
    assert summarise(answers, [trained(core_seconds=60.0)], observations.run()).training.break_even_requests is None


@pytest.mark.parametrize("phases", [(), ("before", "before"), ("after", "after"), ("before", "after")])
def test_there_is_no_saving_without_two_requests_on_each_side(phases: tuple[Phase, ...]) -> None:
    found = saving([Answered("a", phase, True, 1.0, "teacher") for phase in phases], seed=0)

    assert (found.share, found.interval95) == (None, None)


@pytest.mark.parametrize("usd", [0.0, 5e-324, 1e-300])
def test_free_traffic_before_leaves_nothing_to_save(usd: float) -> None:
    before = [Answered("a", "before", True, paid, "student") for paid in (usd, 0.0, 0.0)]
    after = [Answered("a", "after", True, 1.0, "teacher") for _ in range(3)]

    assert saving([*before, *after], seed=0).share is None
    assert summarise([*after, *before], [trained(core_seconds=60.0)], observations.run()).training.break_even_requests is None


def test_training_is_earned_back_after_its_cost_divided_by_the_saving_of_a_request() -> None:
    answers = [Answered("a", "before", True, 0.002, "teacher")] * 5 + [Answered("a", "after", True, 0.001, "ta")] * 5

    training = summarise(answers, [trained(core_seconds=3600.0), trained("b", core_seconds=1800.0)], observations.run()).training

    assert training.core_seconds == 5400.0
    assert training.cost_usd == pytest.approx(0.06)
    assert training.break_even_requests == 60


def test_a_domain_with_several_students_pools_their_items_and_takes_the_best_decision() -> None:
    records = [trained(student="s", after_correct=40), trained(student="t", decision="kept_student", reason="too few", after_correct=10)]
    answers = [*replayed(4, correct=True), *replayed(6, correct=True, student="t", tier="student")]

    domain = summarise(answers, records, observations.run()).domains["a"]

    assert domain.decision == "promoted"
    assert domain.reason == "s (promoted): clears the floors; t (kept_student): too few"
    assert (domain.n_train, domain.n_test, domain.after) == (200, 80, 0.625)
    assert [(s.name, s.share_answered) for s in domain.students] == [("s", 0.4), ("t", 0.6)]
    assert domain.share_by_student == 1.0


def test_a_task_without_a_training_says_that_nothing_was_trained() -> None:
    domain = summarise([Answered("a", "after", True, 1.0, "teacher")], [], observations.run()).domains["a"]

    assert (domain.decision, domain.after, domain.wilson95, domain.n_test) == ("refused", None, None, 0)
    assert "nothing was trained" in domain.reason


def test_a_cached_answer_is_not_counted_as_a_students_work() -> None:
    domain = summarise(replayed(4, correct=True, cached=True), [trained()], observations.run()).domains["a"]

    assert domain.share_by_student == 0.0
    assert domain.student_precision is None


def test_without_tries_on_the_replay_calibration_is_that_of_the_held_out_items() -> None:
    predictions = tuple(Prediction(0.8, i % 5 != 0) for i in range(50))

    (student,) = summarise([], [trained(predictions=predictions)], observations.run()).domains["a"].students

    assert student.reliability.measured_on == "held-out items"
    assert student.reliability.ece == pytest.approx(0.0)
    assert student.ece_held_out == pytest.approx(0.0)


@given(st.lists(st.builds(Prediction, st.floats(0, 1), st.booleans()), min_size=1, max_size=300))
def test_reliability_bins_hold_every_prediction_once_in_rising_order(predictions: list[Prediction]) -> None:
    measured = reliability(predictions, "held-out items")

    assert sum(part.n for part in measured.bins) == len(predictions) == measured.n
    assert len(measured.bins) <= 10
    confidences = [part.confidence for part in measured.bins]
    assert confidences == sorted(confidences)
    right = sum(part.n * part.accuracy for part in measured.bins)
    assert math.isclose(right, sum(p.correct for p in predictions), abs_tol=1e-6)


def test_reliability_does_not_tear_equal_confidences_apart() -> None:
    mixed = [Prediction(0.7, i % 2 == 0) for i in range(200)]

    (only,) = reliability(mixed, "held-out items").bins

    assert (only.n, only.accuracy) == (200, 0.5)
    assert reliability(mixed, "held-out items").ece == pytest.approx(0.2)


def test_a_recorded_teacher_is_called_recorded_and_a_live_one_is_not() -> None:
    assert "no model was asked" in Teacher("t", "recorded").note
    assert "live model" in Teacher("t", "openai").note
