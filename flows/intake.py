"""What was recorded since the last look becomes evidence: users' verdicts, comparisons with the teacher, how requests were served.

Where a user judged a request, that counts and no comparison does, whichever came first. It refuses to know what follows from evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tutelage.evolution.evidence import Tally
from tutelage.evolution.outcomes import RIGHT_FROM, Outcome, contest, pair_up, sampled, verify
from tutelage.evolution.watch import Signal, Watched, WatchSettings, follow
from tutelage.stores import datasets, registry
from tutelage.stores import evidence as standing
from tutelage.stores.database import Pool
from tutelage.stores.evidence import Looked, News, Rollout, Source, Version
from tutelage.stores.registry import Champion

MOST = 5_000  # outcomes taken in at one look
Known = tuple[Watched, float | None]


@dataclass(frozen=True)
class Versions:
    """A tenant's versions by digest, the prompts that each was taught or examined with, and the `share` of requests that counts of each."""

    by_digest: Mapping[str, Version]
    taught: Mapping[Version, frozenset[bytes] | None]
    share: float

    def counts(self, version: Version, row: Mapping[str, Any]) -> bool:
        """Whether a comparison is evidence of a version: in the even sample, and of a prompt that it cannot have been trained on."""
        taught = self.taught[version]
        return taught is not None and row["prompt_hash"] not in taught and sampled(row["request_id"], row["observed"], self.share)


class Taught:
    """The prompts of each version's data set, by their hash; read once a version. None: there are no data, so nothing is new to it."""

    def __init__(self) -> None:
        self._known: dict[Version, frozenset[bytes]] = {}

    async def of(self, pool: Pool, tenant_id: str, versions: Iterable[Version]) -> Mapping[Version, frozenset[bytes] | None]:
        wanted = set(versions)
        folders = await registry.folders(pool, tenant_id) if wanted - self._known.keys() else {}
        for version in wanted - self._known.keys():
            asked = datasets.requests(folders[version])
            if asked is not None:  # a version that was only just spawned has none yet
                self._known[version] = await standing.prompts(pool, asked)
        return {version: self._known.get(version) for version in wanted}


@dataclass
class Judged:
    """Outcomes by request, and whether each answer that was given was right, by version in their order. `overruled`: requests and versions
    of which another source says what counts."""

    requests: dict[str, dict[Version, Outcome]] = field(default_factory=dict)
    overruled: set[tuple[str, Version]] = field(default_factory=set)
    domains: dict[str, str | None] = field(default_factory=dict)
    given: dict[Version, list[bool]] = field(default_factory=dict)

    def of(self, domain: str) -> list[Mapping[Version, Outcome]]:
        """Outcomes of each request of a domain, but of those where all are overruled."""
        here = {request: outcomes for request, outcomes in self.requests.items() if self.domains[request] == domain}
        return [outcomes for request, outcomes in here.items() if any((request, version) not in self.overruled for version in outcomes)]

    def add(self, row: Mapping[str, Any], version: Version, found: Outcome) -> None:
        self.requests.setdefault(row["request_id"], {})[version] = found
        self.domains[row["request_id"]] = row["domain"]


async def take_in(
    pool: Pool, tenant_id: str, champions: Mapping[str, Champion], going: Mapping[str, Rollout], watch: WatchSettings, *, share: float,
    taught: Taught,
) -> None:  # fmt: skip
    """Turn what was recorded of a tenant since the last look into evidence; champions and rollouts are by domain. `share`: of requests, the
    even sample of comparisons that counts.

    Raises:
        PromotionConflict: another watch has done so meanwhile.
    """
    before = await standing.looked(pool, tenant_id)
    by_digest = await registry.versions_by_digest(pool, tenant_id)
    judged = await standing.outcomes(pool, tenant_id, before, most=MOST)
    judged_to = judged[-1]["id"] if judged else before.feedback_id
    compared = await standing.comparisons(pool, tenant_id, before, judged_to=judged_to, most=MOST)
    served = await standing.served(pool, tenant_id, before, most=MOST)
    seen = {by_digest[row["digest"]] for row in (*judged, *compared) if row["digest"] in by_digest}
    versions, news = Versions(by_digest, await taught.of(pool, tenant_id, seen), share), News()
    said, agreed = _verdicts(news, judged, versions, before), _agreements(news, compared, versions)
    for domain, rollout in going.items():
        if domain in champions:
            held = (champions[domain].student, champions[domain].version)
            waiting = _contests(news, rollout, held, said.of(domain), "pairs", "")
            news.waiting[domain] = waiting | _contests(news, rollout, held, agreed.of(domain), "shadow-pairs", "shadow-")
    for champion in champions.values():
        version = (champion.student, champion.version)
        known = await standing.watches(pool, version)
        mine = [row for row in served if row["digest"] == champion.digest]
        frozen = {"acceptance": said.given.get(version, []), "agreement": agreed.given.get(version, [])}
        news.watches[version] = _frozen(known, frozen, watch) + _serving(known, mine, watch)
    until = served[-1]["created_at"] if served else before.served_until
    last = compared[-1]["id"] if compared else before.outcome_id
    await standing.keep(pool, tenant_id, news, before=before, after=Looked(judged_to, until, last))


def _verdicts(news: News, judged: Sequence[Mapping[str, Any]], versions: Versions, before: Looked) -> Judged:
    """Users' verdicts as tallies. A comparison that was counted before its request was judged is taken back; the pair it was part of
    stands, for the request would make it twice."""
    found = Judged()
    for row in judged:
        version = versions.by_digest.get(row["digest"])
        outcome = verify(row["answer"], served=row["accepted"], label=row["label"], score=row["score"], teacher=row["teacher"])
        if version is None or outcome is None:
            continue
        news.count(version, "live", _tally(outcome.win))
        if row["accepted"]:
            found.given.setdefault(version, []).append(outcome.right)
        if row["compared_id"] is not None and row["compared_id"] <= before.outcome_id and versions.counts(version, row):
            news.overruled.append((version, _tally(row["value"] >= RIGHT_FROM), row["compared_id"]))
        else:
            found.add(row, version, outcome)
    return found


def _agreements(news: News, compared: Sequence[Mapping[str, Any]], versions: Versions) -> Judged:
    """Comparisons with the teacher as tallies of the versions that cannot have known its answer."""
    found = Judged()
    for row in compared:
        version, good = versions.by_digest.get(row["digest"]), row["value"] >= RIGHT_FROM
        if version is None:
            continue
        if row["served"]:  # what is watched is a version against itself: what it was trained on may be part of both
            found.given.setdefault(version, []).append(good)
        if versions.counts(version, row):
            found.add(row, version, Outcome(good, good))
            if row["overruled"]:
                found.overruled.add((row["request_id"], version))
            else:
                news.count(version, "shadow", _tally(good))
    return found


def _tally(win: bool) -> Tally:
    return Tally(int(win), 0, int(not win))


def _contests(
    news: News, rollout: Rollout, champion: Version, by_request: Iterable[Mapping[Version, Outcome]], source: Source, prefix: str
) -> dict[str, list[bool]]:
    """Pairs of challenger and champion: on one request where both answered it (shadow), else in the order of their own; what is left."""
    candidate = (rollout.student, rollout.version)
    alone = {side: list(rollout.waiting.get(prefix + side, ())) for side in ("candidate", "champion")}
    pairs = Tally()
    for outcomes in by_request:
        if candidate in outcomes and champion in outcomes:
            pairs += contest(outcomes[candidate].right, outcomes[champion].right)
        elif candidate in outcomes:
            alone["candidate"].append(outcomes[candidate].right)
        elif champion in outcomes and rollout.percent:
            alone["champion"].append(outcomes[champion].right)
    more, left, theirs = pair_up(alone["candidate"], alone["champion"])
    news.count(candidate, source, pairs + more)
    news.count(candidate, "stage", pairs + more)
    return {f"{prefix}candidate": left, f"{prefix}champion": theirs[:MOST]}


def _frozen(known: Mapping[str, Known], found: Mapping[Any, Sequence[bool]], settings: WatchSettings) -> list[Known]:
    return [_held(signal, known.get(signal), outcomes, settings) for signal, outcomes in found.items()]


def _held(signal: Signal, known: Known | None, good: Sequence[bool], settings: WatchSettings) -> Known:
    """The first outcomes freeze the baseline, the later ones are held to it."""
    watched, baseline = known or (Watched(signal, (), 0, 0, False, ""), None)
    if baseline is not None:
        return follow(signal, settings.detector(signal, baseline), good, watched), baseline
    wanted = settings.baseline_outcomes - watched.seen
    seen, bad = watched.seen + len(good[:wanted]), watched.bad + sum(not outcome for outcome in good[:wanted])
    if seen < settings.baseline_outcomes:
        told = f"{signal}: {seen} of {settings.baseline_outcomes} outcomes until it is frozen"
        return replace(watched, seen=seen, bad=bad, reason=told), None
    baseline = 1 - bad / seen
    return follow(signal, settings.detector(signal, baseline), good[wanted:]), baseline


def _serving(known: Mapping[str, Known], served: Sequence[Mapping[str, Any]], settings: WatchSettings) -> list[Known]:
    """Service levels, by what became of each request that the version was asked for."""
    answered = [row for row in served if not row["failed"]]
    signals: dict[Signal, list[bool]] = {
        "error": [not row["failed"] for row in served],
        "truncation": [not row["truncated"] for row in answered],
        "latency": [not (row["accepted"] and row["latency_ms"] > settings.slow_ms) for row in answered],
    }
    found: list[Known] = []
    for signal, good in signals.items():
        detector = settings.detector(signal, 0.0)
        found.append((follow(signal, detector, good, known[signal][0] if signal in known else None), detector.baseline))
    return found
