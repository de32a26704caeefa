"""The gateway under `bentoml serve`: the same app, so one request through it is enough."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from fakes import FakeModelServer

from tutelage.fleet import engines
from tutelage.operations import add_tenant
from tutelage.settings import CHECKOUT, Home
from tutelage.stores.database import open_pool

pytestmark = pytest.mark.slow
READY_SECONDS = 90


async def test_a_request_through_bentoml_is_answered_and_recorded(
    home: Home, encoder: Path, servers: engines.Engines, database_url: str
) -> None:
    home.models.joinpath("encoder").symlink_to(encoder)
    pool = await open_pool(database_url, size=1)
    made = await add_tenant(pool, home.secret("pepper"), name="acme", tier="pro")
    with FakeModelServer("4") as teacher:
        models = [{"name": "big", "kind": "openai", "base_url": f"{teacher.url}/v1"}]
        (home.folder("config") / "models.yaml").write_text(yaml.safe_dump({"models": models}))
        stores = {"TUTELAGE_DATABASE_URL": database_url, "TUTELAGE_VALKEY_URL": servers.valkey_url}
        with bentoml_serves({**os.environ, **home.environment(), **stores, "PYTHONPATH": str(CHECKOUT)}) as url:
            answered = ask(f"{url}/v1/chat/completions", made["key"])
    assert answered is not None
    assert answered.json()["choices"][0]["message"]["content"] == "4"
    assert answered.headers["x-tutelage-model"] == "big"
    assert await pool.fetchval("select count(*) from interactions where tenant_id = $1", made["tenant_id"]) == 1
    await pool.close()


@contextmanager
def bentoml_serves(environment: dict[str, str]) -> Iterator[str]:
    """Its URL; its output is shown if the test fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "bentoml", "serve", "bentos.gateway.service:Gateway", "--host", "127.0.0.1", "--port", port]
    with subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as served:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            served.terminate()
            print(served.communicate(timeout=30)[0].decode()[-3000:])


def ask(url: str, key: str) -> httpx.Response | None:
    """The first reply of 200, or None when there is none in time; one that came too late for this client is got by the next try."""
    body = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}]}
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            reply = httpx.post(url, json=body, headers={"authorization": f"Bearer {key}", "idempotency-key": "once"}, timeout=10)
            if reply.status_code == 200:
                return reply
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    return None
