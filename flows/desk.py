"""MLflow's registry as a desk between the ledger and reviewers: names put and read, words read and answered.

It refuses to know what a name or a word means (`tutelage.evolution.review`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tutelage.evolution.review import NAMES, Mark

PAGE = 200
WORD, BY, WHY, RESULT = "review", "review.by", "review.reason", "review.result"
SINCE = "\n\n## Since it was judged\n\n"  # what is above it in a description was written by the gate


class Desk:
    """MLflow's registry of this home. Made once a process: that is when MLflow is imported."""

    def __init__(self, tracking_uri: str) -> None:
        # read by MLflow when it is imported
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri)

    def names(self) -> dict[str, dict[str, str]]:
        """MLflow's version numbers by alias, of every registered model."""
        return {m.name: {alias: str(number) for alias, number in m.aliases.items()} for m in _all(self._client.search_registered_models)}

    def marks(self) -> dict[str, dict[str, Mark]]:
        """What reviewers wrote, by registered model and MLflow's version number."""
        found: dict[str, dict[str, Mark]] = {}
        for version in _all(self._client.search_model_versions, filter_string=f"tags.`{WORD}` LIKE '%'"):
            tags = version.tags
            mark = Mark(tags[WORD].strip().casefold(), tags.get(BY, "").strip(), tags.get(WHY, "").strip())
            found.setdefault(version.name, {})[str(version.version)] = mark
        return found

    def who(self, model: str, number: str) -> Mark:
        """Who signed a version and why, where a name was moved and no word written."""
        tags = self._client.get_model_version(model, number).tags
        return Mark("", tags.get(BY, "").strip(), tags.get(WHY, "").strip())

    def put(self, model: str, names: Mapping[str, str], *, seen: Mapping[str, str]) -> bool:
        """Have the aliases of ours stand so; those of others are left alone. False: they are not as they were `seen`, nothing is done."""
        held = {alias: str(number) for alias, number in self._client.get_registered_model(model).aliases.items()}
        if held != seen:
            return False
        for alias in NAMES:
            if alias in names and held.get(alias) != names[alias]:
                self._client.set_registered_model_alias(model, alias, names[alias])
            elif alias in held and alias not in names:
                self._client.delete_registered_model_alias(model, alias)
        return True

    def answer(self, model: str, number: str, told: str, *, done: bool) -> None:
        """Say what became of an order; its words are taken away once it is `done`: they are no words on something later."""
        if self._client.get_model_version(model, number).tags.get(RESULT) != told:
            self._client.set_model_version_tag(model, number, RESULT, told)
        if done:
            for tag in (WORD, BY, WHY):
                self._client.delete_model_version_tag(model, number, tag)

    def describe(self, model: str, number: str, tags: Mapping[str, str], since: str) -> None:
        """Tags, and what has been decided of a version since the gate wrote its description."""
        for key, value in tags.items():
            self._client.set_model_version_tag(model, number, key, value)
        card = (self._client.get_model_version(model, number).description or "").split(SINCE)[0]
        self._client.update_model_version(model, number, card + SINCE + since)


def _all(search: Any, **asked: Any) -> list[Any]:
    """Every page of a search."""
    found, token = [], None
    while True:
        page = search(max_results=PAGE, page_token=token, **asked)
        found += page
        token = page.token
        if not token:
            return found
