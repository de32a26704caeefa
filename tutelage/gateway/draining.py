"""The end of a worker: from SIGTERM on it is not ready, what runs may finish, and streams that are too long end with a typed error.
A worker whose first process was killed ends too: nobody would find it, and it would keep the port and old settings for ever.

It refuses to know how a stream is ended and what server runs the worker: the server's own handler of the signal still has its turn.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

log = logging.getLogger(__name__)

PARENT_SECONDS = 0.5


class Draining:
    """`cut` is called once, `grace_seconds` after the end has begun."""

    def __init__(self, *, grace_seconds: float, cut: Callable[[], None]) -> None:
        self._grace = grace_seconds
        self._cut = cut
        self.begun = False

    def begin(self) -> None:
        """From within the event loop; a second time does nothing."""
        if not self.begun:
            self.begun = True
            log.info("this worker drains: streams that still run in %g s will be cut", self._grace)
            asyncio.get_running_loop().call_later(self._grace, self._cut)

    def listen(self) -> None:
        """Begin when the process is asked to end. Without a server that handles SIGTERM itself, nothing is installed."""
        if threading.current_thread() is not threading.main_thread():
            return
        theirs, loop = signal.getsignal(signal.SIGTERM), asyncio.get_running_loop()
        if not callable(theirs):
            return

        def both(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self.begin)
            theirs(number, frame)

        signal.signal(signal.SIGTERM, both)
        parent = multiprocessing.parent_process()  # it may be gone by now, and the process have another
        self._mind(os.getppid() if parent is None or parent.pid is None else parent.pid)

    def _mind(self, parent: int) -> None:
        """End as by SIGTERM once the process that started this one is gone."""
        if os.getppid() != parent:
            log.error("the process that started this worker is gone; it ends")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        asyncio.get_running_loop().call_later(PARENT_SECONDS, self._mind, parent)
