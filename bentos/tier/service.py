"""`bentoml serve bentos.tier.service:Tier`: the tier under BentoML, which adds process supervision, probes and metrics.

Knows BentoML and wires the parts together. One worker always: adapters live in its memory, and a control request reaches
one worker only.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import bentoml

from bentos.tier import contents
from bentos.tier.app import create_app, start_tier
from bentos.tier.settings import ServiceSettings, from_environment

log = logging.getLogger(__name__)

app = create_app()


@bentoml.service(
    name="tutelage-tier",
    workers=1,
    traffic={"timeout": 600},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(app, path="/")
class Tier:
    """One base model with many LoRA adapters."""

    @bentoml.on_startup
    async def start(self) -> None:
        # Both are read when torch and transformers are first imported, which is below.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        settings = from_environment(os.environ)
        found = _contents(settings)
        tier = await start_tier(found.base_dir, settings)
        for packed in found.adapters:
            await asyncio.to_thread(tier.engine.load_adapter, packed.name, packed.path, packed.digest)
        app.state.tier = tier
        log.info("serving base %s with %d adapters", tier.engine.fingerprint, len(found.adapters))

    @bentoml.on_shutdown
    async def stop(self) -> None:
        tier, app.state.tier = app.state.tier, None
        if tier is not None:
            await tier.close()

    def __is_ready__(self) -> bool:
        return app.state.tier is not None


def _contents(settings: ServiceSettings) -> contents.Contents:
    bento = cast(Any, Tier).bento  # BentoML's decorators make another class of it
    if bento is not None and bento.info.all_models:
        return contents.of_bento([_stored(str(model.tag)) for model in bento.info.all_models])
    home = Path(os.environ.get("TUTELAGE_HOME") or ".tutelage")
    return contents.of_settings(settings, models_dir=home.resolve() / "models")


def _stored(tag: str) -> tuple[Path, Mapping[str, Any]]:
    model = bentoml.models.get(tag)
    return Path(model.path), model.info.metadata
