"""`tutelage demo --day` on a tiny random model: a short day over HTTP, cycles between its quarters, a report of what was measured."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml
from fakes import build_tiny_base

from tutelage.demo import day
from tutelage.settings import CHECKOUT, Home

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
PER_QUARTER = 130
LIGHTS = {"red": "stop", "green": "go", "amber": "wait"}
PLACES = ["harbour", "station", "bridge", "market", "school", "museum", "garden", "tower", "castle", "square", "river", "church"]
QUICK = {
    "finetune": {"budget_tokens": 60_000, "probe_tokens": 12_000, "learning_rate": 0.01, "max_epochs": 12},
    "evolve": {"min_requests": 60},
}


def light(rng: random.Random) -> dict[str, str]:
    colour = rng.choice(sorted(LIGHTS))
    prompt = f"The light at the {rng.choice(PLACES)} number {rng.randrange(10_000)} shows {colour}. What do you do?"
    return {"prompt": prompt, "label": LIGHTS[colour], "domain": "lights"}


def noise(rng: random.Random) -> dict[str, str]:
    return {"prompt": f"Guess the secret of ticket {rng.randrange(10**9)} please", "label": str(rng.randrange(10**6)), "domain": "tickets"}


def a_day(rng: random.Random) -> list[dict[str, str]]:
    """Lights all day, tickets in its second quarter only; three in ten rows repeat an earlier one of the day."""
    rows: list[dict[str, str]] = []
    for quarter in range(4):
        for _ in range(PER_QUARTER):
            again = bool(rows) and rng.random() < 0.3
            make = noise if quarter == 1 and rng.random() < 0.3 else light
            rows.append(rng.choice(rows) if again else make(rng))
    return rows


@pytest.fixture
def home(tmp_path: Path, encoder: Path) -> Home:
    made = Home(tmp_path / "day")
    build_tiny_base(made.models / "smollm2-135m-instruct")
    (made.models / "encoder").symlink_to(encoder)
    return made


def test_a_day_is_lived_and_reported_against_the_teacher_alone(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(day, "TEACHER_SECONDS", 0.1)
    config, log, target = tmp_path / "config", tmp_path / "log.jsonl", tmp_path / "report.json"
    config.mkdir()
    for source in (CHECKOUT / "configs").glob("*.yaml"):
        (config / source.name).write_text(yaml.safe_dump(yaml.safe_load(source.read_text()) | QUICK.get(source.stem, {})))
    log.write_text("".join(json.dumps(row) + "\n" for row in a_day(random.Random(5))))

    assert day.demo_day(home, traffic=[log], report=target, seed=7, per_quarter=None, config=config) == 0

    report = json.loads(target.read_text())
    told = report["day"]
    assert [q["n"] for q in told["quarters"]] == [PER_QUARTER] * 4
    assert all(0.2 < q["share_repeated"] < 0.4 for q in told["quarters"])
    first, last = told["quarters"][0], told["quarters"][-1]
    assert first["saved"]["by_students"] == 0, "nobody but the teacher could answer before the first cycle"
    assert first["saved"]["by_cache"] == pytest.approx(first["saved"]["share"])
    assert 0.09 < first["latency"]["always-teacher"]["p50_seconds"] < 0.3
    assert len(told["cycles"]) == 3
    assert [(v["task"], v["action"]) for v in told["cycles"][0]["versions"]] in ([("lights", "promote")], [("lights", "keep")])
    assert last["saved"]["by_students"] > 0.2
    parts = sum(last["saved"][part] for part in ("by_students", "by_cache", "by_escalations", "by_checks"))
    assert parts == pytest.approx(last["saved"]["share"])
    assert last["alone"]["accuracy"] == 1.0, "the log's answers are the teacher's"
    assert last["quality"]["ratio"] > 0.8
    assert [t["met"] for t in told["targets"]] == [t["measured"] >= t["asked"] for t in told["targets"]]
    assert "chosen beforehand" in report["teacher"]["note"]
    page = target.with_suffix(".html").read_text()
    assert "Cycle after quarter 3" in page
    assert "Seconds of waiting by quarter" in page
