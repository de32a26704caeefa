"""A version becomes a Bento that serves on its own: `bentoml serve NAME:VERSION`. It refuses to know why, and needs no Prefect."""

from __future__ import annotations

import json
from pathlib import Path

from flows.workshop import Cycle, run_stage, tell
from tutelage.stores import registry
from tutelage.stores.database import Pool


async def pack(cycle: Cycle, pool: Pool, *, student: str, version: int, folder: Path, digest: str) -> str:
    """Pack the adapter in a student's folder with its base, and note the tag with the version. Raises StageFailed."""
    arguments = ["-m", "bentos.tier.package", "--student-name", student, "--adapter", str(folder / "adapter"), "--digest", digest]
    arguments += ["--base", str(cycle.state.models / "smollm2-135m-instruct"), "--label", f"cycle={cycle.id}"]
    told = await run_stage(cycle, "package", arguments, student=student)
    tag = str(json.loads(told.splitlines()[-1])["tag"])
    await registry.complete_version(pool, student, version, bento=tag)
    tell("package", f"bento {tag}", student=student)
    return tag
