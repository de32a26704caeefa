"""Run a program a model wrote against its tests, in a process of its own with limits.

Limits: CPU and wall time, address space, file size (1 MB), open files and processes; an empty environment and an empty folder; no network:
a network namespace of its own where the kernel lets users make one, and in any case sockets, other programs and ctypes are refused inside
the interpreter. Only the standard library can be imported. That stops accidents and careless programs. It is NOT a jail: a program
written to escape Python's own hooks can read what this user can read. Give hostile code a container or a virtual machine.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass

from tutelage.verifiers.rules import Verdict

FENCE = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)
MOST_OUTPUT = 64 * 1024

# Runs before the model's code: limits first, then the namespace, then the hooks, which nothing can take out again.
RUNNER = r"""
import os, resource, sys
seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
source = sys.stdin.read()
for what, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, megabytes << 20), (resource.RLIMIT_FSIZE, 1 << 20),
                    (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(what, (value, value))
try:
    import ctypes
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET; refused on some kernels
except Exception:
    pass
REFUSED = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "ctypes.",
           "pty.")
def refuse(event, _):
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is not allowed in a code test")
sys.addaudithook(refuse)
sys.argv = ["answer.py"]
exec(compile(source, "answer.py", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Limits:
    """Of one run: `seconds` of CPU (twice that of wall time), `megabytes` of address space."""

    seconds: float = 5.0
    megabytes: int = 512


def run_tests(answer: str, tests: str, limits: Limits) -> Verdict:
    """Whether the answer's Python (a fenced block, or all of it) runs through `tests`, statements that raise when it is wrong."""
    fenced = FENCE.findall(answer)
    passed = secrets.token_hex(8)  # an answer that prints "passed" and leaves has passed nothing
    program = f"{fenced[-1] if fenced else answer}\n\n{tests}\n\nprint({passed!r})\n"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-S", "-c", RUNNER, str(max(1, round(limits.seconds))), str(limits.megabytes)]
        process = subprocess.Popen(
            command, cwd=folder, env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            output, _ = process.communicate(program.encode(), timeout=2 * limits.seconds + 1)
        except subprocess.TimeoutExpired:
            return Verdict(0.0, False, f"still running after {2 * limits.seconds + 1:g} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = output[-MOST_OUTPUT:].decode("utf-8", "replace").strip().splitlines() or [""]
    if process.returncode == 0 and lines[-1] == passed:
        return Verdict(1.0, True, "tests passed")
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return Verdict(0.0, False, f"used more than {limits.seconds:g} s of CPU")
    return Verdict(0.0, False, lines[-1][:200] or f"ended with status {process.returncode}")
