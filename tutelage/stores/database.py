"""Opening the database and bringing its schema up to date. It refuses to know what the tables mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import asyncpg

MIGRATIONS = Path(__file__).parent / "migrations"
Pool = asyncpg.Pool


async def open_pool(url: str, *, size: int = 8) -> Pool:
    """A connection pool to `url` (postgresql://…) whose JSON columns read and write Python values."""
    return await asyncpg.create_pool(url, min_size=1, max_size=size, init=_speak_json, command_timeout=30)


async def _speak_json(connection: Any) -> None:
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")


def migrate(url: str) -> None:
    """Apply every migration not yet applied; safe to call from several processes at once (advisory lock in env.py)."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    command.upgrade(config, "head")


async def create_database(url: str, name: str) -> None:
    """Create database `name` on the server of `url` when it does not exist."""
    connection = await asyncpg.connect(url)
    try:
        if not await connection.fetchval("select 1 from pg_database where datname = $1", name):
            quoted = '"' + name.replace('"', '""') + '"'
            await connection.execute(f"create database {quoted}")
    finally:
        await connection.close()
