"""Reviewers in MLflow, with its real client on the home's own store: what they move, approve and veto changes what gateways serve."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from fakes import build_tiny_adapter, build_tiny_base

from flows.desk import Desk
from flows.review import Office, look, pack_those_moved_up
from flows.watch import Rules
from flows.watch import look as watch
from tutelage.errors import PromotionConflict
from tutelage.evolution.promotion import PromotionSettings
from tutelage.evolution.rollout import RolloutSettings
from tutelage.evolution.watch import Watched, WatchSettings
from tutelage.gateway import snapshot
from tutelage.records import Tenant
from tutelage.routing.confidence import Calibrator
from tutelage.settings import Home, RoutingSettings
from tutelage.stores import audit, evidence, registry, tenants
from tutelage.stores.database import Pool, open_pool
from tutelage.stores.registry import Decision, Pointer

pytestmark = pytest.mark.slow
TENANT = Tenant("ten_a", "acme", "pro")
STUDENT = "acme-sums"


@dataclass
class Review:
    """A home whose versions 1 and 2 served once, version 2 does now and version 3 challenges it; and the reviewer's own client."""

    office: Office
    desk: Desk
    client: Any

    async def look(self) -> list[str]:
        return await look(self.office, self.desk)

    def names(self) -> dict[str, int]:
        return {alias: int(number) for alias, number in self.client.get_registered_model(STUDENT).aliases.items()}

    def tag(self, version: int, **tags: str) -> None:
        for key, value in tags.items():
            self.client.set_model_version_tag(STUDENT, str(version), key.replace("_", "."), value)

    def tags(self, version: int) -> dict[str, str]:
        return dict(self.client.get_model_version(STUDENT, str(version)).tags)

    async def served(self) -> list[tuple[int, str]]:
        """Version and tier of whoever answers, as a gateway sees it."""
        view = (await snapshot.read(self.office.pool, routing=RoutingSettings(), teachers=[])).view(TENANT.id)
        return [(student.version, student.tier) for student in view.students]

    async def line(self) -> dict[str, Any]:
        """The ledger's last one."""
        return (await registry.list_promotions(self.office.pool))[-1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store whose tables are made once."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    home = Home(tmp_path_factory.mktemp("mlflow"))
    MlflowClient(home.environment()["MLFLOW_TRACKING_URI"]).search_registered_models()
    return (home.root / "mlflow" / "mlflow.db").as_posix()


@pytest.fixture
async def review(database_url: str, home: Home, store: str) -> AsyncIterator[Review]:
    from mlflow import MlflowClient

    shutil.copy(store, home.folder("mlflow") / "mlflow.db")
    config = home.folder("config")
    (config / "tier.yaml").write_text("port: 9")  # no tier listens there
    pool = await open_pool(database_url, size=3)
    await tenants.create_tenant(pool, TENANT)
    await registry.open_cycle(pool, "c1", TENANT.id)
    uri = home.environment()["MLFLOW_TRACKING_URI"]
    client = MlflowClient(uri, uri)
    client.create_registered_model(STUDENT)
    for number, status in ((1, "student"), (2, "ta"), (3, "challenger")):
        await registry.spawn(pool, tenant_id=TENANT.id, domain="sums", student=STUDENT, cycle_id="c1", folder="/s/v{version}")
        published = client.create_model_version(STUDENT, f"/s/v{number}").version
        facts = {"digest": f"d{number}", "calibrator": Calibrator("platt", 200, a=1.0).to_dict(), "mlflow_version": str(published)}
        await registry.complete_version(pool, STUDENT, number, status=status, **facts)
    for number, tier in ((1, "student"), (2, "ta")):
        await decide(pool, "promote", number, Pointer(0, STUDENT, number, tier))
    await evidence.begin_rollout(pool, evidence.Rollout(TENANT.id, "sums", STUDENT, 3, 0, "ta"))
    made = Review(Office(pool, home, config), Desk(uri), client)
    assert await made.look() == [], "what the ledger says is nobody's order"
    yield made
    await pool.close()


async def decide(pool: Pool, action: Any, version: int, champion: Pointer) -> None:
    now = await registry.pointer(pool, TENANT.id, "sums")
    decision = Decision(TENANT.id, "sums", action, STUDENT, version, champion, f"{action} because", {})
    await registry.decide(pool, decision, expected=now.sequence)


async def test_aliases_follow_the_ledger_by_domain_and_tier(review: Review) -> None:
    assert review.names() == {"champion": 2, "ta": 2, "challenger": 3}
    await decide(review.office.pool, "rollback", 2, Pointer(0, STUDENT, 1, "student"))
    review.client.set_registered_model_alias(STUDENT, "theirs", "2")

    assert await review.look() == []
    assert review.names() == {"champion": 1, "student": 1, "challenger": 3, "theirs": 2}
    assert review.tags(1)["standing"] == "champion"
    assert "rollback because" in review.client.get_model_version(STUDENT, "2").description


async def test_an_alias_moved_by_hand_changes_what_is_served_and_the_ledger_says_who_and_why(review: Review) -> None:
    assert await review.served() == [(2, "ta")]
    review.tag(1, review_by="ada", review_reason="v2 is rude")
    review.client.set_registered_model_alias(STUDENT, "champion", "1")
    await review.look()

    assert await review.served() == [(1, "student")]
    line = await review.line()
    assert (line["action"], line["actor"], line["champion_version"]) == ("rollback", "mlflow:ada", 1)
    assert "v2 is rude" in line["reason"]
    (link,) = [row for row in await audit.newest(review.office.pool, TENANT.id, limit=9) if row["action"] == "student.rollback"]
    assert (link["actor"], link["subject"]) == ("mlflow:ada", "acme-sums.v1")
    assert review.names() == {"champion": 1, "student": 1, "challenger": 3}
    assert "v2 is rude" in review.tags(1)["review.result"]
    assert await review.look() == []


async def test_two_aliases_moved_at_once_are_two_lines_of_the_ledger_a_look_each(review: Review) -> None:
    for alias in ("champion", "ta"):
        review.client.set_registered_model_alias(STUDENT, alias, "1")
    await review.look()
    assert await review.served() == [(1, "student")]
    await review.look()

    assert await review.served() == [(1, "ta")]
    assert review.names() == {"champion": 1, "ta": 1, "challenger": 3}


async def test_an_alias_that_was_taken_away_leaves_the_domain_to_the_teachers(review: Review) -> None:
    review.client.delete_registered_model_alias(STUDENT, "champion")
    await review.look()

    assert await review.served() == []
    assert review.names() == {"challenger": 3}


async def test_a_vetoed_champion_goes_and_no_rollback_ever_comes_back_to_it(review: Review) -> None:
    review.tag(2, review_by="ada", review_reason="leaks", review="veto")
    await review.look()

    assert await review.served() == [(1, "student")]
    assert (await review.line())["reason"] == "vetoed by ada in MLflow: leaks; v1 answers"
    assert (await registry.before(review.office.pool, TENANT.id, "sums", student=STUDENT, version=1)).student is None
    review.client.set_registered_model_alias(STUDENT, "champion", "2")
    await review.look()
    assert await review.served() == [(1, "student")]
    assert "it was vetoed" in review.tags(2)["review.result"]
    assert review.names()["champion"] == 1


async def test_a_vetoed_challenger_is_tried_no_longer(review: Review) -> None:
    review.tag(3, review="veto")
    await review.look()

    assert await evidence.rollouts(review.office.pool) == []
    assert (await review.line())["action"] == "stop"
    assert await review.served() == [(2, "ta")]


async def test_a_version_that_waits_is_approved_by_tag_as_what_it_waits_for(review: Review) -> None:
    pool = review.office.pool
    await decide(pool, "wait", 2, Pointer(0, STUDENT, 2, "ta"))
    await registry.complete_version(pool, STUDENT, 2, awaits="teacher")
    await review.look()
    assert review.tags(2)["awaits"] == "teacher"
    assert "Waits for a person as teacher" in review.client.get_model_version(STUDENT, "2").description
    assert await review.served() == [(2, "ta")], "until somebody says so it stays what it is"
    review.tag(2, review="Approve")
    await review.look()

    assert await review.served() == [(2, "teacher")]
    assert "review" not in review.tags(2), "a word that was heard is no word on something later"
    assert review.names() == {"champion": 2, "teacher": 2, "challenger": 3}


async def test_a_version_that_waits_is_approved_by_the_alias_of_its_tier(review: Review) -> None:
    pool = review.office.pool
    await registry.complete_version(pool, STUDENT, 3, status="waiting", awaits="ta")
    (rollout,) = await evidence.rollouts(pool)
    await evidence.move_rollout(pool, rollout, percent=0)
    await decide(pool, "quarantine", 2, Pointer())
    await review.look()
    assert await review.served() == []
    review.client.set_registered_model_alias(STUDENT, "ta", "3")
    await review.look()

    assert await review.served() == [(3, "ta")]


async def test_what_cannot_be_done_is_put_back_and_said(review: Review) -> None:
    await registry.complete_version(review.office.pool, STUDENT, 1, status="quarantined")
    review.client.set_registered_model_alias(STUDENT, "champion", "1")
    review.tag(3, review="approve")
    await review.look()

    assert await review.served() == [(2, "ta")]
    assert review.names()["champion"] == 2
    assert "in quarantine" in review.tags(1)["review.result"]
    assert "nothing of it waits" in review.tags(3)["review.result"]


async def test_a_projection_that_was_broken_off_is_not_taken_for_a_reviewers_move(review: Review) -> None:
    from tutelage.stores import reviews

    pool = review.office.pool
    await decide(pool, "rollback", 2, Pointer(0, STUDENT, 1, "student"))
    await reviews.mean(pool, STUDENT, {"champion": 1, "student": 1, "challenger": 3})  # a crash came after the first of the names
    review.client.set_registered_model_alias(STUDENT, "champion", "1")
    await decide(pool, "promote", 2, Pointer(0, STUDENT, 2, "ta"))

    assert await review.look() == []
    assert await review.served() == [(2, "ta")]
    assert review.names() == {"champion": 2, "ta": 2, "challenger": 3}


async def test_a_version_that_was_rolled_back_serves_again_when_a_person_says_so_and_is_judged_anew(review: Review) -> None:
    pool = review.office.pool
    before = await evidence.looked(pool, TENANT.id)
    alarm = Watched("acceptance", (1e6,) * 3, 80, 30, True, "acceptance: alarm")
    await evidence.keep(pool, TENANT.id, evidence.News(watches={(STUDENT, 2): [(alarm, 0.9)]}), before=before, after=before)
    rules = Rules(PromotionSettings(), RolloutSettings(), WatchSettings())
    await watch(pool, rules)
    await review.look()
    assert await review.served() == [(1, "student")]
    review.client.set_registered_model_alias(STUDENT, "champion", "2")
    await review.look()

    assert await review.served() == [(2, "student")], "what was refused has no tier; a person may give it one by its alias"
    assert await watch(pool, rules) == []
    assert await review.served() == [(2, "student")]


async def test_an_order_that_comes_between_two_looks_of_the_engine_is_carried_out_by_the_next_look(
    review: Review, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, decided = review.office.pool, registry.decide

    async def too_late(*_: Any, **__: Any) -> Pointer:
        raise PromotionConflict("the champion of 'sums' moved")

    review.client.set_registered_model_alias(STUDENT, "champion", "1")
    monkeypatch.setattr(registry, "decide", too_late)
    assert await review.look() == ["the champion of 'sums' moved"]
    assert review.names()["champion"] == 1, "the order stands"
    monkeypatch.setattr(registry, "decide", decided)
    await review.look()

    assert await review.served() == [(1, "student")]
    assert (await registry.pointer(pool, TENANT.id, "sums")).sequence == 3


async def test_a_version_that_is_moved_up_becomes_a_bento_and_one_that_cannot_is_told_once(
    review: Review, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, home, tried = review.office.pool, review.office.home, set[tuple[str, int]]()
    base_dir = build_tiny_base(home.models / "smollm2-135m-instruct")
    digest = build_tiny_adapter(base_dir, home.root / "s" / "v1" / "adapter")
    await pool.execute("update versions set path = $1, digest = $2 where version = 1", str(home.root / "s" / "v1"), digest)
    for number in (2, 3):
        await registry.complete_version(pool, STUDENT, number, bento=f"made:{number}")
    await decide(pool, "rollback", 2, Pointer(0, STUDENT, 1, "student"))
    await pack_those_moved_up(review.office, tried)
    assert await bento(pool, 1) is None, "a student's own tier needs none"

    await decide(pool, "promote", 1, Pointer(0, STUDENT, 1, "ta"))
    await pack_those_moved_up(review.office, tried)
    tag = await bento(pool, 1)
    assert tag is not None
    assert (home.folder("bentoml") / "bentos" / tag.replace(":", "/") / "bento.yaml").is_file()

    await pool.execute("update versions set bento = null, digest = 'another' where version = 1")
    await pack_those_moved_up(review.office, set())
    assert "v1 serves without a Bento" in capsys.readouterr().out
    await pack_those_moved_up(review.office, {(STUDENT, 1)})
    assert "without a Bento" not in capsys.readouterr().out


async def bento(pool: Pool, version: int) -> str | None:
    tag: str | None = await pool.fetchval("select bento from versions where student = $1 and version = $2", STUDENT, version)
    return tag
