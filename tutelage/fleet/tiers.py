"""Telling a tier which adapters to hold, over its authenticated control endpoint. It refuses to know which students deserve it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from tutelage.errors import AdapterRejected, BackendFailed

log = logging.getLogger(__name__)
LOAD_SECONDS = 60.0


@dataclass(frozen=True)
class Wanted:
    """One adapter a tier must hold: its name there, the folder it lies in, and the digest it must have."""

    name: str
    path: str
    digest: str


class TierControl:
    """The control endpoint of one tier."""

    def __init__(self, url: str, token: str) -> None:
        self._client = httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=LOAD_SECONDS)

    def ready(self) -> bool:
        try:
            return self._client.get("/readyz", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def loaded(self) -> dict[str, str]:
        """Digests by adapter name. Raises BackendFailed."""
        try:
            response = self._client.get("/control/adapters")
            response.raise_for_status()
        except httpx.HTTPError as failed:
            raise BackendFailed(f"the tier did not list its adapters: {failed}") from failed
        return {str(a["name"]): str(a["digest"]) for a in response.json()["adapters"]}

    def load(self, wanted: Wanted) -> None:
        """Raises AdapterRejected when the tier refuses the files, BackendFailed when it cannot be reached."""
        try:
            response = self._client.put(f"/control/adapters/{wanted.name}", json={"path": wanted.path, "digest": wanted.digest})
        except httpx.HTTPError as failed:
            raise BackendFailed(f"the tier did not load {wanted.name}: {failed}") from failed
        if response.status_code == 422:
            raise AdapterRejected(f"the tier refused {wanted.name}: {response.text[:500]}")
        if response.is_error:
            raise BackendFailed(f"the tier did not load {wanted.name}: HTTP {response.status_code} {response.text[:300]}")

    def unload(self, name: str) -> None:
        """Raises BackendFailed."""
        try:
            self._client.delete(f"/control/adapters/{name}").raise_for_status()
        except httpx.HTTPError as failed:
            raise BackendFailed(f"the tier did not unload {name}: {failed}") from failed

    def close(self) -> None:
        self._client.close()


def changes(wanted: Sequence[Wanted], loaded: Mapping[str, str]) -> tuple[list[Wanted], list[str]]:
    """What to load and what to unload so that the tier holds exactly what is wanted."""
    names = {w.name for w in wanted}
    return [w for w in wanted if loaded.get(w.name) != w.digest], sorted(set(loaded) - names)


def reconcile(control: TierControl, wanted: Sequence[Wanted]) -> list[str]:
    """Bring the tier to what is wanted; what went wrong, one line each (the rest is done all the same)."""
    load, unload = changes(wanted, control.loaded())
    faults = []
    for adapter in load:
        try:
            control.load(adapter)
        except (AdapterRejected, BackendFailed) as failed:
            faults.append(str(failed))
    for name in unload:
        try:
            control.unload(name)
        except BackendFailed as failed:
            faults.append(str(failed))
    return faults
