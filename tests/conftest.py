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

from benchmarks import replicas
from benchmarks.replicas import Replica, Site
from benchmarks.systems import mock
from tutelage.fleet import engines, processes
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
    return _database(servers)


def _database(servers: engines.Engines) -> str:
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


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model in a process of its own, which counts who asked it."""
    with mock(tmp_path_factory.mktemp("upstream"), record=True) as url:
        yield url


@pytest.fixture(scope="module")
def site(servers: engines.Engines, encoder: Path, upstream: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Where gateways run as processes: a database and a Valkey of their own, and the model behind them."""
    yield from _site(_database(servers), encoder, tmp_path_factory.mktemp("site"), upstream)


def _site(database_url: str, encoder: Path, folder: Path, upstream: str) -> Iterator[Site]:
    home, config = Home(folder / "site"), folder / "config"
    config.mkdir()
    home.models.joinpath("encoder").symlink_to(encoder)
    try:
        made = Site(home, config, engines.Engines(database_url, engines.start_valkey(home)))
        made.configure(upstream, admission_deadline_seconds=1.0)  # a busy machine is no outage of Valkey
        yield made
    finally:
        processes.stop(home, "valkey")


@pytest.fixture(scope="session")
def standing(
    servers: engines.Engines, encoder: Path, upstream: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Site, Replica]]:
    """One gateway with two workers for the run, for tests that only ask."""
    for site in _site(_database(servers), encoder, tmp_path_factory.mktemp("standing"), upstream):
        with replicas.running(site, replicas=1, workers=2) as (replica,):
            yield site, replica


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)
