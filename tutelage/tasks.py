"""Ending a background task for certain. It refuses to know what tasks do."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_SECONDS = 0.5


async def end(task: asyncio.Task[Any] | None) -> None:
    """Cancel it until it has ended. Once is not enough: a call that completes in the same moment may swallow the cancellation (Python
    3.11's wait_for does), and a task that runs for ever would then run on."""
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=AGAIN_SECONDS)
