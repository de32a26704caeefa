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

import asyncpg
import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tutelage.errors import AuditBroken
from tutelage.settings import Home
from tutelage.stores import audit
from tutelage.stores.audit import Head
from tutelage.stores.database import Pool

log = logging.getLogger(__name__)

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
        with self.path.open("ab") as file:
            for head in heads:
                told = {"tenant_id": head.tenant_id, "sequence": head.sequence, "hash": head.hash.hex(), "at": now.isoformat()}
                signature = base64.b64encode(self.key.sign(_canonical(told))).decode()
                file.write(orjson.dumps(told | {"signature": signature}) + b"\n")
            file.flush()
            os.fsync(file.fileno())

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

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a crash may leave half a line behind
        yield from enumerate(whole.splitlines(), start=1)


class HeadsExporter:
    """Exports every head that moved, every `seconds`, from one process of all that try."""

    def __init__(self, pool: Pool, file: HeadsFile, *, seconds: float) -> None:
        self._pool = pool
        self._file = file
        self._seconds = seconds
        self._exported: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Export once more, then end."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            with contextlib.suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await self.export()

    async def export(self) -> int:
        """How many heads were written; none while another process does it."""
        async with self._pool.acquire() as connection, connection.transaction():
            if not await connection.fetchval("select pg_try_advisory_xact_lock($1)", LOCK):
                return 0
            if not self._exported:
                self._exported = {tenant: max(known) for tenant, known in self._file.read().items()}
            moved = [head for head in await audit.heads(connection) if head.sequence > self._exported.get(head.tenant_id, 0)]
            if moved:
                await asyncio.to_thread(self._file.append, moved, now=datetime.now(UTC))
            self._exported |= {head.tenant_id: head.sequence for head in moved}
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
