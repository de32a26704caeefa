"""A student trained by a fine-tuning API: paid for once, whatever happens on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeFineTuning

from training.hosted import HostedSettings, tune
from tutelage.errors import ConfigInvalid, EngineFailed, TrafficUnreadable


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFineTuning]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with FakeFineTuning() as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", 12)


def write(file: Path, count: int, **more: Any) -> Path:
    rows = [{"prompt": f"What is {i}?", "label": str(i), **more} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(data: Path, out: Path, server: FakeFineTuning, **settings: Any) -> dict[str, Any]:
    told = tune(data, out, config=HostedSettings(base_url=server.url, poll_seconds=0.001, **settings), say=lambda _: None)
    assert json.loads((out / "job.json").read_text()) == told
    return told


def test_a_job_is_uploaded_run_and_named_for_the_gateway(server: FakeFineTuning, data: Path, tmp_path: Path) -> None:
    state = run(data, tmp_path / "out", server)
    assert state["status"] == "succeeded"
    assert state["models_entry"]["model"] == "ft:gpt-4o-mini-2024-07-18:org::1"
    [rows] = server.files.values()
    assert rows[3] == {"messages": [{"role": "user", "content": "What is 3?"}, {"role": "assistant", "content": "3"}]}
    assert server.jobs["ftjob-0"]["method"] == {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}


def test_preferences_are_trained_by_dpo(server: FakeFineTuning, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", 12, chosen="right", rejected="wrong")
    run(data, tmp_path / "out", server, method="preference")
    [rows] = server.files.values()
    assert rows[0]["non_preferred_output"] == [{"role": "assistant", "content": "wrong"}]
    assert server.jobs["ftjob-0"]["method"]["type"] == "dpo"


def test_a_run_that_was_cut_off_goes_on_with_its_job(server: FakeFineTuning, data: Path, tmp_path: Path) -> None:
    def cut(_: float) -> None:
        raise KeyboardInterrupt

    config = HostedSettings(base_url=server.url)
    with pytest.raises(KeyboardInterrupt):
        tune(data, tmp_path / "out", config=config, say=lambda _: None, sleep=cut)
    run(data, tmp_path / "out", server)
    assert (len(server.files), len(server.jobs)) == (1, 1)


def test_a_job_whose_making_was_not_heard_of_is_found_again(server: FakeFineTuning, data: Path, tmp_path: Path) -> None:
    server.break_after_create = True
    with pytest.raises(EngineFailed, match="run again"):
        run(data, tmp_path / "out", server)
    assert run(data, tmp_path / "out", server)["status"] == "succeeded"
    assert (len(server.files), len(server.jobs)) == (1, 1)


def test_other_data_are_another_job(server: FakeFineTuning, data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out", server)
    run(write(data, 13), tmp_path / "out", server)
    assert len(server.jobs) == 2


def test_a_dry_run_sends_nothing_and_says_what_it_would_cost(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = HostedSettings(usd_per_mtok=10.0, epochs=2)
    state = tune(data, tmp_path / "out", config=config, dry_run=True, say=lambda _: None)
    assert state["status"] == "dry-run"
    assert state["estimate"]["rows"] == 12
    assert state["estimate"]["usd"] == pytest.approx(state["estimate"]["tokens"] * 2 * 10 / 1e6, abs=1e-4)
    assert not (tmp_path / "out" / "job.json").exists()


def test_a_job_that_may_cost_too_much_is_refused(server: FakeFineTuning, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="max_usd"):
        run(data, tmp_path / "out", server, usd_per_mtok=1e6)
    assert server.files == {}


def test_too_few_rows_are_refused_before_anything_is_sent(server: FakeFineTuning, tmp_path: Path) -> None:
    with pytest.raises(TrafficUnreadable, match="at least 10"):
        run(write(tmp_path / "few.jsonl", 9), tmp_path / "out", server)
    assert server.files == {}


@pytest.mark.parametrize("ends", ["failed", "cancelled"])
def test_a_job_that_fails_is_told_with_its_reason(data: Path, tmp_path: Path, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with FakeFineTuning(ends=ends) as server, pytest.raises(EngineFailed, match=rf"{ends}: the data are bad"):
        run(data, tmp_path / "out", server)


def test_a_missing_key_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigInvalid, match="OPENAI_API_KEY"):
        tune(data, tmp_path / "out", config=HostedSettings(), say=lambda _: None)
