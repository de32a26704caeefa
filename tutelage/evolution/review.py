"""What a reviewer did by hand, read off the names that versions carry: which were moved, what was approved, what was vetoed.

The promotion ledger says who answers; names (aliases) are its projection. A name that stands elsewhere than it was put was moved by
somebody, and that is an order. Pure rules: they refuse to know where names are kept and how an order takes effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tutelage.records import Tier

TIERS: tuple[Tier, ...] = ("student", "ta", "teacher")
NAMES = ("champion", "challenger", *TIERS)  # names of ours; others are nobody's business
UNKNOWN = 0  # a version that is none of the student's

Names = Mapping[str, int | None]


@dataclass(frozen=True)
class Standing:
    """What the ledger says of one student's versions. `able`: those that may answer at all, each with the tier it has or would get.
    `waiting`: those that wait for a person, with the tier they wait for. `out`: refused or vetoed already."""

    champion: int | None = None
    tier: Tier | None = None
    challenger: int | None = None
    able: Mapping[int, Tier] = field(default_factory=dict)
    waiting: Mapping[int, Tier] = field(default_factory=dict)
    out: frozenset[int] = frozenset()

    def names(self) -> dict[str, int]:
        """The projection: which version carries which name."""
        found = {"champion": self.champion, "challenger": self.challenger}
        if self.tier is not None:
            found[self.tier] = self.champion
        return {name: version for name, version in found.items() if version is not None}


@dataclass(frozen=True)
class Mark:
    """What a reviewer wrote on a version: their word, who they are, and why."""

    word: str
    by: str = ""
    why: str = ""


@dataclass(frozen=True)
class Order:
    """One thing to do about `version`. `serve`: it is the champion, as `tier`. `withdraw`: the teachers answer. `challenge`: it is tried
    beside the champion. `stop`: it is tried no longer. `nothing`: what was asked for cannot be done, for `reason`."""

    action: Literal["serve", "withdraw", "challenge", "stop", "approve", "veto", "nothing"]
    version: int
    reason: str
    tier: Tier | None = None


def moved(shown: Names, meant: Names, seen: Mapping[str, int], standing: Standing) -> dict[str, int | None]:
    """Names that stand elsewhere than they were put, and where (None: taken away). `shown`: as they were left the last time; `meant`: as
    they were being put when that was broken off; what the ledger says anyway was nobody's doing."""
    now = standing.names()
    return {name: seen.get(name) for name in NAMES if seen.get(name) not in (shown.get(name), meant.get(name), now.get(name))}


def orders(standing: Standing, elsewhere: Mapping[str, int | None], marks: Mapping[int, Mark]) -> list[Order]:
    """What a reviewer's marks and moves amount to, a veto before anything else."""
    found = [_marked(standing, version, mark) for version, mark in sorted(marks.items())]
    vetoed = {version for version, mark in marks.items() if mark.word == "veto"}
    return [order for order in found if order is not None] + _moves(standing, elsewhere, vetoed)


def _marked(standing: Standing, version: int, mark: Mark) -> Order | None:
    if mark.word == "veto":
        done = version in standing.out and version not in (standing.champion, standing.challenger)
        return None if done else Order("veto", version, "vetoed")
    if mark.word != "approve":
        return Order("nothing", version, f"{mark.word!r} says nothing; the words are approve and veto")
    if version not in standing.waiting:
        return Order("nothing", version, "nothing of it waits for approval; to have it answer, move the alias champion to it")
    tier = standing.waiting[version]
    return Order("approve", version, f"approved as {tier}", tier)


def _moves(standing: Standing, elsewhere: Mapping[str, int | None], vetoed: set[int]) -> list[Order]:
    found: list[Order] = []
    champion = standing.champion
    if "champion" in elsewhere:
        order = _serve(standing, elsewhere["champion"], vetoed)
        found.append(order)
        champion = {"serve": order.version, "withdraw": None}.get(order.action, champion)
    for tier in TIERS:
        if tier in elsewhere:
            found.append(_tier(standing, tier, elsewhere[tier], champion, vetoed))
    if "challenger" in elsewhere:
        found.append(_challenge(standing, elsewhere["challenger"], champion, vetoed))
    return found


def _serve(standing: Standing, version: int | None, vetoed: set[int]) -> Order:
    if version is None:
        return Order("withdraw", standing.champion or UNKNOWN, "the alias champion was taken away")
    return _unable(standing, version, vetoed) or Order("serve", version, "the alias champion was moved to it", standing.able[version])


def _tier(standing: Standing, tier: Tier, version: int | None, champion: int | None, vetoed: set[int]) -> Order:
    if version is None:
        return Order("nothing", champion or UNKNOWN, f"the alias {tier} alone decides nothing; veto the version or move the alias champion")
    if unable := _unable(standing, version, vetoed):
        return unable
    if standing.waiting.get(version) == tier:
        return Order("approve", version, f"approved as {tier}: the alias {tier} was given to it", tier)
    if version == champion:
        return Order("serve", version, f"the alias {tier} was given to it", tier)
    return Order("nothing", version, f"it does not answer, so it cannot answer as {tier}; move the alias champion to it")


def _challenge(standing: Standing, version: int | None, champion: int | None, vetoed: set[int]) -> Order:
    if version is None:
        return Order("stop", standing.challenger or UNKNOWN, "the alias challenger was taken away")
    if unable := _unable(standing, version, vetoed):
        return unable
    if champion is None or version == champion:
        return Order("nothing", version, "there is no other version that it could challenge")
    return Order("challenge", version, "the alias challenger was moved to it", standing.able[version])


def _unable(standing: Standing, version: int, vetoed: set[int]) -> Order | None:
    if version in vetoed:
        return Order("nothing", version, "it was vetoed; take the veto away first")
    if version not in standing.able:
        return Order("nothing", version, "it cannot answer: it is in training or in quarantine, or none of this student's versions")
    return None
