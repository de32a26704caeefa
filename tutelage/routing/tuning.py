"""Should a tenant's threshold or similarity cut-off move? A proposal with its reason and its evidence, from what was logged.

Both are cuts: at or above it the cheap answer is given, below it the teacher's. Cuts are tried from the strictest down and the search stops
at the first that does not surely keep the promised loss, so that many looks cost nothing (fixed sequence testing: Angelopoulos et al. 2021,
Learn then Test). Sure is what both estimates of `offpolicy.py` say at their bounds. Pure; it refuses to know who applies a change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tutelage.routing.offpolicy import Estimated, Logs, Refused, doubly_robust, snips

Setting = Literal["threshold", "similarity"]
STRICTEST, STEP = 0.99, 0.01


@dataclass(frozen=True)
class Try:
    """A student's answer, given or not. `confidence` is its probability of being right, `value` what it is worth beside the teacher's
    answer (None: nobody looked), `observed` the probability that anybody looked, whether or not it was given."""

    confidence: float
    value: float | None
    observed: float


@dataclass(frozen=True)
class Choice:
    """A request that one model answered alone. `propensity`: of this model being the one; `cheap`: it was not the teacher."""

    similarity: float
    cheap: bool
    value: float | None
    observed: float
    propensity: float


@dataclass(frozen=True)
class Proposal:
    """`new` is `old` where nothing should change. `evidence`: the estimates at both cuts."""

    setting: Setting
    old: float
    new: float
    reason: str
    evidence: dict[str, Any]

    @property
    def changes(self) -> bool:
        return self.new != self.old


@dataclass(frozen=True)
class Loss:
    """Of all requests looked at, the mean loss against the teacher at one cut, and the share that is answered cheaply."""

    cut: float
    share: float
    loss: float
    most: float  # no higher with 95 %
    least: float  # no lower with 95 %
    effective: float


def propose_threshold(tries: Sequence[Try], *, old: float, floor: float, promised_loss: float) -> Proposal:
    """From students' tries; nothing below `floor` was ever given, so nothing is proposed there."""
    import numpy as np

    confidence, observed = (np.array([getattr(one, name) for one in tries], dtype=float) for name in ("confidence", "observed"))
    value = np.array([np.nan if one.value is None else one.value for one in tries], dtype=float)

    def at(cut: float) -> Loss | Refused:
        """Of what would be given, how much is wrong; what would not be given loses nothing."""
        given = confidence >= cut
        promised = confidence[given]
        logs = Logs(value[given], observed[given], np.ones_like(promised), promised, promised)
        return _loss(cut, float(given.mean()) if len(given) else 0.0, snips(logs), doubly_robust(logs))

    return _propose("threshold", at, old, floor, promised_loss, len(tries))


def propose_similarity(choices: Sequence[Choice], *, old: float, promised_loss: float) -> Proposal:
    """From requests that one model answered alone. A teacher's answer loses nothing; that of another is predicted to be worth as much, so
    that only what was seen decides."""
    import numpy as np

    names = ("similarity", "cheap", "observed", "propensity")
    similarity, cheap, observed, propensity = (np.array([getattr(one, name) for one in choices], dtype=float) for name in names)
    value = np.array([1.0 if not one.cheap else np.nan if one.value is None else one.value for one in choices], dtype=float)
    likely = propensity * np.where(cheap == 1, observed, 1.0)

    def at(cut: float) -> Loss | Refused:
        wanted = similarity >= cut
        target = (cheap == wanted).astype(float)
        mine = cheap == 1
        informative = snips(Logs(value[mine], likely[mine], target[mine], value[mine], value[mine]))
        if isinstance(informative, Refused):
            return informative
        logs = Logs(value, likely, target, np.ones_like(value), np.ones_like(value))
        return _loss(cut, float(wanted.mean()), snips(logs), doubly_robust(logs), of_all=True)

    return _propose("similarity", at, old, 0.0, promised_loss, len(choices))


def _propose(setting: Setting, at: Callable[[float], Loss | Refused], old: float, floor: float, promised: float, n: int) -> Proposal:
    here = at(old)
    best: Loss | None = None
    tested = 0
    for step in range(round((STRICTEST - floor) / STEP) + 1):
        found = at(round(STRICTEST - step * STEP, 4))
        if isinstance(found, Refused):
            if tested:
                break
            continue  # too few are that strict: which cuts can be told of depends on no outcome
        tested += 1
        if found.most > promised:
            break
        best = found
    evidence = {"requests": n, "promised_loss": promised, "at_old": _told(here), "at_new": _told(best)}
    if best is not None and abs(best.cut - old) >= STEP / 2:
        way = "lower" if best.cut < old else "raise"
        reason = f"{way} the {setting} to {best.cut:.2f}: a loss of {best.loss:.3f}, at most {best.most:.3f}, is within {promised:.3f}"
        return Proposal(setting, old, best.cut, f"{reason}; {best.share:.0%} are answered cheaply", evidence)
    if best is None and isinstance(here, Loss) and here.least > promised:
        reason = (
            f"raise the {setting} to {STRICTEST}: the loss is at least {here.least:.3f}, above {promised:.3f}, and no cut surely keeps it"
        )
        return Proposal(setting, old, STRICTEST, reason, evidence)
    if best is not None:
        return Proposal(setting, old, old, f"{old:.2f} is the lowest that surely keeps a loss of {promised:.3f}", evidence)
    why = (
        here.reason
        if isinstance(here, Refused)
        else f"a loss of {here.loss:.3f}, at most {here.most:.3f}: not surely within {promised:.3f}"
    )
    return Proposal(setting, old, old, f"nothing is changed: {why}", evidence)


def _loss(cut: float, share: float, ratio: Estimated | Refused, robust: Estimated | Refused, *, of_all: bool = False) -> Loss | Refused:
    if isinstance(ratio, Refused):
        return ratio
    if isinstance(robust, Refused):
        return robust
    part = 1.0 if of_all else share
    lowest, highest = min(ratio.lo, robust.lo), max(ratio.hi, robust.hi)
    return Loss(cut, share, part * (1 - robust.value), part * (1 - lowest), part * (1 - highest), ratio.effective)


def _told(loss: Loss | Refused | None) -> dict[str, Any] | None:
    if loss is None:
        return None
    if isinstance(loss, Refused):
        return {"refused": loss.reason}
    return {
        "cut": loss.cut, "share": round(loss.share, 4), "loss": round(loss.loss, 4), "loss_at_most": round(loss.most, 4),
        "loss_at_least": round(loss.least, 4), "effective": round(loss.effective, 1),
    }  # fmt: skip
