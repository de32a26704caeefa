from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_estimates import asked, embed

from tutelage.errors import InvalidRequest
from tutelage.evaluations import curves, page, rows
from tutelage.evaluations.replay import Log, ReplaySettings, replay, route


class Embedder:
    def encode(self, texts: list[str]) -> np.ndarray:
        return embed(texts)


def silent(doing: str, done: int, total: int) -> None:
    assert done <= total


def two(n: int = 400, seed: int = 0) -> Log:
    prompts, domains, outcomes = asked(n, seed)
    return Log(prompts, domains, ("weak", "strong"), np.array([outcomes["weak"], outcomes["strong"]], dtype=float).T, None)


def priced(n: int = 400, seed: int = 0) -> Log:
    """Three models: a cheap one that knows half, a dear one that knows all, and one that is dear and poor."""
    log = two(n, seed)
    poor = np.full((n, 1), 0.2)
    return Log(log.prompts, log.domains, ("cheap", "dear", "poor"), np.hstack([log.scores, poor]), np.tile([0.001, 0.01, 0.02], (n, 1)))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return replay(two(300, 1), two(), Embedder(), ReplaySettings(), silent)


def test_two_models_without_prices_get_the_curve_and_its_figures(report: dict[str, Any]) -> None:
    assert report["default"] == "expected"
    ours = report["policies"]["expected"]
    assert ours["apgr"] > 0.75 > report["baselines"]["length"]["apgr"] + 0.1
    assert 0 < ours["cpt50"] < ours["cpt80"] < 60
    assert ours["curve"][0] == [0.0, pytest.approx(report["baselines"]["always-weak"]["mean_quality"])]
    assert ours["curve"][-1] == [1.0, pytest.approx(report["baselines"]["always-strong"]["mean_quality"])]


def test_the_oracle_and_the_baselines_never_stand_among_the_policies(report: dict[str, Any]) -> None:
    assert set(report["policies"]) == {"expected", "quality", "budget"}
    assert {"random", "oracle", "length", "always-weak", "always-strong"} <= set(report["baselines"])
    best = report["baselines"]["oracle"]["mean_quality"]
    assert all(found["mean_quality"] <= best for found in report["policies"].values())


def test_the_promise_is_reported_with_what_became_of_it(report: dict[str, Any]) -> None:
    promise = report["policies"]["quality"]["promise"]
    assert promise["share_above_promise"] <= 0.1
    assert promise["mean_reference_share"] < 0.9


def test_only_prompt_and_domain_of_a_replayed_row_influence_its_route() -> None:
    log, order = two(200, 1), np.random.default_rng(0).permutation(200)
    shuffled = Log(log.prompts, log.domains, log.models, log.scores[order], log.costs)
    ours, theirs = (route(each, two(), Embedder(), ReplaySettings(), silent) for each in (log, shuffled))
    for policy in ("expected", "quality", "budget", "best-per-domain", "length"):
        assert np.array_equal(ours.chosen[policy], theirs.chosen[policy])
    assert np.array_equal(ours.probabilities, theirs.probabilities)


def test_a_cross_fitted_row_is_routed_by_what_others_taught() -> None:
    """Outcomes of pure chance: a router that had seen a row's own outcome would beat chance."""
    log = two(300)
    coins = np.random.default_rng(5).integers(0, 2, (300, 2)).astype(float)
    found = replay(Log(log.prompts, log.domains, log.models, coins, None), None, Embedder(), ReplaySettings(), silent)
    assert abs(found["policies"]["expected"]["mean_quality"] - 0.5) < 0.1


def test_with_prices_quality_is_the_default_and_costs_less_than_the_best_model() -> None:
    found = replay(priced(300, 1), priced(), Embedder(), ReplaySettings(), silent)
    assert found["default"] == "quality"
    ours, dear = found["policies"]["quality"], found["baselines"]["always-dear"]
    assert ours["mean_cost_usd"] < 0.8 * dear["mean_cost_usd"]
    assert ours["mean_quality"] > 0.94 * dear["mean_quality"]
    assert ours["share"]["poor"] == 0.0


@pytest.mark.parametrize("most", [0.002, 0.005, 0.009])
def test_a_budget_is_kept(most: float) -> None:
    found = replay(priced(300, 1), priced(), Embedder(), ReplaySettings(policy="budget", max_cost=most), silent)
    assert found["policies"]["budget"]["mean_cost_usd"] <= most * 1.15


def test_an_unknown_policy_and_other_models_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="policies are expected, quality, budget"):
        replay(two(), None, Embedder(), ReplaySettings(policy="magic"), silent)
    with pytest.raises(InvalidRequest, match="must be the same"):
        replay(two(), priced(), Embedder(), ReplaySettings(), silent)


def test_too_few_rows_to_cross_fit_are_refused_with_the_way_out() -> None:
    with pytest.raises(InvalidRequest, match="--fit"):
        replay(two(30), None, Embedder(), ReplaySettings(), silent)


def test_the_page_shows_every_policy_and_baseline_and_needs_nothing_else(report: dict[str, Any]) -> None:
    html = page.render(report)
    assert "<svg" in html and "http-equiv" in html and "<script" not in html
    for name in (*report["policies"], *report["baselines"]):
        assert f"<td>{name}</td>" in html


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("[1]", "a list, not an object"),
        ('{"prompt": "x"}', "neither `scores` nor"),
        ('{"prompt": 5, "weak_correct": true, "strong_correct": true}', "`prompt` is 5; it must be a text"),
        ('{"prompt": "x", "weak_correct": true, "strong_correct": null}', "must be a number"),
        ('{"prompt": "x", "weak_correct": 2, "strong_correct": 1}', "scores are in 0..1"),
        ('{"prompt": "x", "scores": {"other": 1}}', "every row must be of weak, strong"),
        ('{"prompt": "x", "weak_correct": 1, "strong_correct": 1, "cost_usd": {"weak": 1, "strong": 2}}', "on some rows"),
    ],
)
def test_a_bad_row_is_refused_with_its_file_and_line(tmp_path: Path, line: str, told: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"prompt": "a\u2028b", "weak_correct": true, "strong_correct": false}\n' + line + "\n")
    with pytest.raises(InvalidRequest) as refused:
        rows.read_log([log])
    assert f"{log}:2" in refused.value.message
    assert told in refused.value.message


def test_both_row_forms_are_read(tmp_path: Path) -> None:
    first = {"id": "1", "prompt": "p", "domain": "d", "scores": {"b": 0.5, "a": 1}, "cost_usd": {"a": 0.1, "b": 0.2}}
    (tmp_path / "scores.jsonl").write_text(json.dumps(first) + "\n\n" + json.dumps(first | {"domain": None}) + "\n")
    log = rows.read_log([tmp_path / "scores.jsonl"])
    assert (log.models, log.domains, log.prompts) == (("a", "b"), ["d", None], ["p", "p"])
    assert log.scores.tolist() == [[1.0, 0.5]] * 2
    assert log.costs is not None and log.costs.tolist() == [[0.1, 0.2]] * 2


def test_figures_of_a_perfect_and_of_a_useless_ranking() -> None:
    weak, strong = np.array([0.0] * 20 + [1.0] * 80), np.ones(100)
    perfect = curves.figures(*curves.sweep(curves.rank(-weak, weak, strong, seed=0)))
    assert (perfect.cpt50, perfect.cpt80) == (10.0, 16.0)
    assert perfect.apgr == pytest.approx(0.9, abs=1e-9)
    useless = [curves.figures(*curves.sweep(curves.rank(np.zeros(100), weak, strong, seed=s))).apgr for s in range(200)]
    assert np.mean(useless) == pytest.approx(0.5, abs=0.02)


def test_two_equal_models_have_no_figures() -> None:
    same = np.array([1.0, 0.0, 1.0])
    assert np.isnan(curves.figures(*curves.sweep(curves.rank(same, same, same, seed=0))).apgr)
