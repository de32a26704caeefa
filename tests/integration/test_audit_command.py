"""`tutelage audit` as a shell sees it, on a home of its own: what it says and how it exits."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from tutelage.fleet import engines
from tutelage.settings import CHECKOUT, Home

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home whose database runs, with two tenants made by hand."""
    made = Home(tmp_path_factory.mktemp("home"))
    engines.start_database(made)
    try:
        for name in ("acme", "bolt"):
            assert tutelage(made, "tenants", "create", name, "--json").returncode == 0
        yield made
    finally:
        engines.stop(made)


def tutelage(home: Home, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tutelage.cli", *arguments, "--home", str(home.root)]
    return subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


def execute(home: Home, *statements: str) -> None:
    """As somebody with all rights in the database would."""

    url = engines.start_database(home)

    async def run() -> None:
        connection = await asyncpg.connect(url)
        async with connection.transaction():
            await connection.execute("set local session_replication_role = replica")
            for statement in statements:
                await connection.execute(statement)
        await connection.close()

    asyncio.run(run())


def test_a_chain_is_read_exported_and_checked(home: Home, tmp_path: Path) -> None:
    whole = tutelage(home, "audit", "verify", "--json")
    assert (whole.returncode, json.loads(whole.stdout)["whole"]) == (0, True)
    listed = json.loads(tutelage(home, "audit", "list", "acme", "--json").stdout)
    assert [link["action"] for link in listed][-2:] == ["key.create", "tenant.create"]
    assert "tenant.create" in tutelage(home, "audit", "list", "acme").stdout
    exported = tutelage(home, "audit", "export", str(tmp_path / "chains.jsonl"), "--json")
    told, links = json.loads(exported.stdout), [json.loads(line) for line in (tmp_path / "chains.jsonl").read_text().splitlines()]
    assert told["links"] == len(links) == json.loads(whole.stdout)["links"]
    assert Path(told["heads"]).read_text().count("\n") == 2


def test_a_row_that_was_changed_ends_in_an_error_that_says_where(home: Home) -> None:
    execute(home, "update audit set actor = 'nobody' where sequence = 2 and tenant_id = (select id from tenants where name = 'acme')")
    broken = tutelage(home, "audit", "verify")
    assert broken.returncode == 1
    assert "broken at link 2" in broken.stderr
    assert tutelage(home, "audit", "verify", "--tenant", "bolt").returncode == 0


def test_an_end_that_was_cut_off_differs_from_the_heads_kept_elsewhere(home: Home, tmp_path: Path) -> None:
    assert tutelage(home, "audit", "export", str(tmp_path / "chains.jsonl")).returncode == 0
    (tmp_path / "kept.jsonl").write_bytes((home.root / "audit" / "heads.jsonl").read_bytes())
    execute(
        home,
        "delete from audit where sequence = 2",
        "update audit_heads h set sequence = 1, hash = (select hash from audit a where a.tenant_id = h.tenant_id and sequence = 1)",
    )
    (home.root / "audit" / "heads.jsonl").unlink()
    assert tutelage(home, "audit", "verify", "--tenant", "bolt").returncode == 0, "nobody can tell without the heads"
    cut = tutelage(home, "audit", "verify", "--tenant", "bolt", "--heads", str(tmp_path / "kept.jsonl"))
    assert (cut.returncode, "cut off" in cut.stderr) == (1, True)


def test_usage_is_there_as_csv(home: Home) -> None:
    told = tutelage(home, "usage", "--csv")
    assert told.stdout.splitlines() == ["tenant_id,key_id,model,domain,day,requests,cached,prompt_tokens,completion_tokens,cost_microusd"]


def test_a_tenant_is_deleted_without_a_question_where_nobody_could_answer(home: Home) -> None:
    assert tutelage(home, "tenants", "delete", "bolt").returncode == 0
    assert "bolt" not in tutelage(home, "tenants", "list", "--json").stdout
    assert tutelage(home, "tenants", "delete", "bolt").returncode == 1
