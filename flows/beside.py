"""What runs beside the gateway and looks at the database every so often: its command line, its loop, its end.

It refuses to know what is looked at (`watch`, `review`, `timer`), and needs no Prefect: none of them may wait for a scheduler.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from tutelage.errors import TutelageError
from tutelage.settings import Home

log = logging.getLogger(__name__)

Serve = Callable[[Home, Path, str, float | None], Awaitable[None]]  # home, configuration, database, seconds between looks (None: once)


async def looking(look: Callable[[], Awaitable[object]], *, every: float | None) -> None:
    """Look once, or every so many seconds until cancelled; then a look that fails is told and the next one tries again."""
    while True:
        try:
            await look()
        except Exception:
            if every is None:
                raise
            log.exception("this look failed; the next one tries again")
        if every is None:
            return
        await asyncio.sleep(every)


def command(name: str, told: str, serve: Serve, *, every: float, once: bool = True) -> int:
    """The command line of `python -m flows.NAME`, its exit status. `once`: whether it may be asked for one look alone."""
    from tutelage.fleet import processes
    from tutelage.operations import database

    parser = argparse.ArgumentParser(prog=f"python -m flows.{name}", description=told)
    parser.add_argument("--every", type=float, default=every, metavar="SECONDS")
    if once:
        parser.add_argument("--once", action="store_const", dest="every", const=None, help="one look, then end")
    parser.add_argument("--config", metavar="DIR")
    arguments = parser.parse_args()
    home = Home.from_environment()
    processes.on_terminate_raise()
    try:
        with database(home) as url:
            asyncio.run(_served(serve(home, home.config_dir(arguments.config), url, arguments.every)))
    except TutelageError as error:
        print(f"{name}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _served(serving: Awaitable[None]) -> None:
    await serving
