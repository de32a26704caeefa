"""Peak memory of everything a demo starts, sampled from outside.

Proportional set size where the system tells it (Linux), so that pages shared by PostgreSQL's processes count once; resident
set size elsewhere, which counts them once a process. It refuses to know what the processes do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Literal

import psutil

MEGABYTE = 1e6


class PeakMemory:
    """Samples some processes and all their descendants every `interval` seconds until stopped.

    `root_pids` may be added to while it runs: a server that made itself a daemon is nobody's descendant.
    """

    def __init__(self, root_pids: Iterable[int], *, interval: float = 1.0) -> None:
        self._roots = set(root_pids)
        self._interval = interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._peak_bytes = 0
        self.measure: Literal["PSS", "RSS"] = "PSS"

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Begin sampling. Raises RuntimeError when started twice."""
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end; further calls do nothing."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, pid: int) -> None:
        """Count this process and its descendants too, from the next sample on."""
        self._roots = self._roots | {pid}  # a new set: the sampling thread may be reading the old one

    @property
    def peak_mb(self) -> float:
        """The largest sum seen so far, in megabytes of 10^6 bytes."""
        return self._peak_bytes / MEGABYTE

    def sample(self) -> int:
        """Bytes in use now by all processes together; processes that end meanwhile count nothing."""
        return sum(self._used(process) for process in self._processes())

    def _watch(self) -> None:
        while True:
            self._peak_bytes = max(self._peak_bytes, self.sample())
            if self._stopped.wait(self._interval):
                self._peak_bytes = max(self._peak_bytes, self.sample())
                return

    def _processes(self) -> set[psutil.Process]:
        found: set[psutil.Process] = set()
        for pid in self._roots:
            try:
                root = psutil.Process(pid)
                found |= {root, *root.children(recursive=True)}
            except psutil.Error:
                continue
        return found

    def _used(self, process: psutil.Process) -> int:
        try:
            full = process.memory_full_info() if self.measure == "PSS" else process.memory_info()
        except psutil.AccessDenied:
            self.measure = "RSS"  # one process that hides its share: count all by the same measure from here
            return self._used(process)
        except psutil.Error:
            return 0
        if self.measure == "PSS" and not hasattr(full, "pss"):
            self.measure = "RSS"
        return int(full.pss if self.measure == "PSS" else full.rss)
