"""The models that a worker may ask, as models.yaml names them, and the local tier's students by adapter name.

It refuses to know which of them should answer.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tutelage.fleet.backends import Backend
from tutelage.settings import ModelEntry, Price


@dataclass(frozen=True)
class Models:
    """The backends of models.yaml, in their order, and the local tier's clients by adapter name."""

    configured: tuple[tuple[ModelEntry, Backend], ...]
    adapter: Callable[[str], Backend]

    @cached_property
    def lineages(self) -> dict[str, str]:
        """What names each configured model and all that makes it answer as it does; by its name."""
        return {entry.name: _lineage(entry) for entry, _ in self.configured}

    @cached_property
    def servable(self) -> frozenset[str]:
        """The lineages of all configured models."""
        return frozenset(self.lineages.values())

    @cached_property
    def _without_fallbacks(self) -> set[str]:
        return {entry.name for entry, _ in self.configured if not entry.fallbacks}

    @cached_property
    def dearest(self) -> Price:
        """The highest price of a token in and of one out, of all models that may answer."""
        prices = [entry.price for entry, _ in self.configured if entry.price is not None]
        return Price(
            input_per_mtok=max((price.input_per_mtok for price in prices), default=0.0),
            output_per_mtok=max((price.output_per_mtok for price in prices), default=0.0),
        )

    def teachers(self, domain: str | None) -> list[Backend]:
        """Those that name the domain first, then those that answer anything."""
        teachers = [(entry, backend) for entry, backend in self.configured if entry.tier == "teacher"]
        own = [backend for entry, backend in teachers if domain is not None and domain in entry.domains]
        return own + [backend for entry, backend in teachers if not entry.domains]

    def answering(self, domain: str | None) -> list[ModelEntry]:
        """Every configured model that may answer the domain, whatever its tier: those that name it first."""
        own = [entry for entry, _ in self.configured if domain is not None and domain in entry.domains]
        return own + [entry for entry, _ in self.configured if not entry.domains]

    @cached_property
    def by_name(self) -> dict[str, tuple[ModelEntry, Backend]]:
        return {entry.name: (entry, backend) for entry, backend in self.configured}

    def chain(self, first: Sequence[Backend]) -> list[Backend]:
        """Who is asked in turn: these models, then the fallbacks of each, then theirs; nobody twice."""
        if len(first) == 1 and first[0].name in self._without_fallbacks:
            return list(first)
        found = {backend.name: backend for backend in first}
        ahead = deque(found)
        while ahead:
            entry, _ = self.by_name.get(ahead.popleft(), (None, None))
            for name in entry.fallbacks if entry is not None else ():
                if name not in found:
                    found[name] = self.by_name[name][1]
                    ahead.append(name)
        return list(found.values())


def _lineage(entry: ModelEntry) -> str:
    """An entry that asks another model, or asks it elsewhere, may answer otherwise; its price and deadlines change no answer."""
    told = entry.model_dump_json(include={"kind", "base_url", "model", "path"})
    return f"model:{entry.name}:{hashlib.sha256(told.encode()).hexdigest()[:16]}"
