"""Real servers for tests that need them: one PostgreSQL and one Valkey for the run, a fresh database for each test."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tutelage.fleet import engines
from tutelage.settings import CHECKOUT, Home
from tutelage.stores.database import create_database, migrate

hypothesis.settings.register_profile("any-machine", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("any-machine")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for name in ("TUTELAGE_HOME", "TUTELAGE_CONFIG", "TUTELAGE_DATABASE_URL", "TUTELAGE_VALKEY_URL", "TUTELAGE_TIER_TOKEN"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[engines.Engines]:
    """PostgreSQL and Valkey from their wheels, as `tutelage serve` runs them."""
    home = Home(tmp_path_factory.mktemp("servers"))
    try:
        yield engines.start(home)
    finally:
        engines.stop(home)


@pytest.fixture
def database_url(servers: engines.Engines) -> str:
    """A migrated database of this test's own."""
    name = f"test_{uuid.uuid4().hex}"
    asyncio.run(create_database(servers.database_url, name))
    url = servers.database_url.replace("/tutelage?", f"/{name}?", 1)
    migrate(url)
    return url


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged encoder, exported once for the run."""
    out = tmp_path_factory.mktemp("models") / "encoder"
    subprocess.run([sys.executable, "-m", "inference.encoder_export", "--out", str(out)], check=True, cwd=CHECKOUT)
    return out


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)
