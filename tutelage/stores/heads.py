"""Signed heads of the audit chains, appended to a file outside the database: what shows later that a chain's end was not cut off.

Copy the file elsewhere: whoever can write to both it and the database, and has the key, can rewrite both. It refuses to read chains.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tutelage.errors import AuditBroken
from tutelage.settings import Home
from tutelage.stores import audit
from tutelage.stores.audit import Head
from tutelage.stores.database import Pool
from tutelage.tasks import end

log = logging.getLogger(__name__)

MOST_LINE = 4_096  # bytes; a head has a few hundred
LOCK = 7_301_905  # of the one process that exports


@dataclass(frozen=True)
class HeadsFile:
    """The heads of one home, and the key they are signed with (made once, from the home's own secret)."""

    path: Path
    key: Ed25519PrivateKey

    @classmethod
    def of(cls, home: Home) -> HeadsFile:
        return cls(home.folder("audit") / "heads.jsonl", Ed25519PrivateKey.from_private_bytes(bytes.fromhex(home.secret("audit_key"))))

    @property
    def public_key(self) -> Ed25519PublicKey:
        return self.key.public_key()

    def append(self, heads: list[Head], *, now: datetime) -> None:
        """Sign and write; on disk when this returns."""
        self._mend()
        with self.path.open("ab") as file:
            for head in heads:
                told = {"tenant_id": head.tenant_id, "sequence": head.sequence, "hash": head.hash.hex(), "at": now.isoformat()}
                signature = base64.b64encode(self.key.sign(_canonical(told))).decode()
                file.write(orjson.dumps(told | {"signature": signature}) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _mend(self) -> None:
        """Cut off the half of a line that a crash may have left behind."""
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start = file.seek(max(0, size - MOST_LINE))
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                file.truncate(start + tail.rfind(b"\n") + 1)

    def read(self) -> dict[str, dict[int, bytes]]:
        """Hashes by tenant and sequence. Raises AuditBroken for a line that is not ours."""
        found: dict[str, dict[int, bytes]] = {}
        for number, line in self._lines():
            try:
                told = orjson.loads(line)
                self.public_key.verify(base64.b64decode(told.pop("signature")), _canonical(told))
                found.setdefault(told["tenant_id"], {})[told["sequence"]] = bytes.fromhex(told["hash"])
            except (InvalidSignature, ValueError, KeyError, TypeError) as broken:
                raise AuditBroken(f"{self.path}:{number}: the signature of this head does not hold; the file was changed") from broken
        return found

    def newest(self) -> dict[str, dict[str, Any]]:
        """The last line of each chain as it was written, signature and all."""
        return {told["tenant_id"]: told for told in (orjson.loads(line) for _, line in self._lines())}

    @property
    def public_text(self) -> str:
        """The public key in base64."""
        return base64.b64encode(self.public_key.public_bytes_raw()).decode()

    def exported(self, since: int) -> tuple[dict[str, int], int]:
        """The last sequence of each chain in what was written from byte `since` on, and where the next look begins."""
        found: dict[str, int] = {}
        for _, line in self._lines(since):
            told = orjson.loads(line)
            found[told["tenant_id"]] = told["sequence"]
            since += len(line) + 1
        return found, since

    def _lines(self, since: int = 0) -> Iterator[tuple[int, bytes]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(since)
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):  # a crash may leave half a line behind
                    yield number, line[:-1]


class HeadsExporter:
    """Exports every head that moved, every `seconds`, from one process of all that try."""

    def __init__(self, pool: Pool, file: HeadsFile, *, seconds: float) -> None:
        self._pool = pool
        self._file = file
        self._seconds = seconds
        self._exported: dict[str, int] = {}
        self._looked = 0  # bytes of the file
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Export once more, then end."""
        if self._task:
            await end(self._task)
            with contextlib.suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await self.export()

    async def export(self) -> int:
        """How many heads were written; none while another process does it."""
        async with self._pool.acquire() as connection, connection.transaction():
            if not await connection.fetchval("select pg_try_advisory_xact_lock($1)", LOCK):
                return 0
            # another worker may have exported since
            others, self._looked = await asyncio.to_thread(self._file.exported, self._looked)
            self._exported |= others
            moved = [head for head in await audit.heads(connection) if head.sequence > self._exported.get(head.tenant_id, 0)]
            if moved:
                await asyncio.to_thread(self._file.append, moved, now=datetime.now(UTC))
            return len(moved)

    async def _run(self) -> None:
        while True:
            try:
                await self.export()
            except Exception as failed:  # the next one exports what this one could not
                log.warning("heads of the audit chains not exported: %r", failed)
            await asyncio.sleep(self._seconds)


def _canonical(told: dict[str, object]) -> bytes:
    return orjson.dumps(told, option=orjson.OPT_SORT_KEYS)
