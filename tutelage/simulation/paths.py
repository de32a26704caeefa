"""Outcomes of students whose true win rate is known, drawn at random, and where along them evidence first stands high enough.

It refuses to decide anything: it finds the looks at which the production rules could say yes, so that only those need be asked one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tutelage.evolution.evidence import Tally, log_e

CHUNK = 1 << 17  # looks whose e-values are computed together: memory, not result
HAIR = 1e-9  # of a log e-value: rounding must not hide a look from the rule that decides


@dataclass(frozen=True)
class Paths:
    """Counts after each query, integer arrays of shape [runs, queries]."""

    wins: Any
    ties: Any

    @property
    def runs(self) -> int:
        return int(self.wins.shape[0])

    @property
    def queries(self) -> int:
        return int(self.wins.shape[1])

    def tally(self, run: int, look: int) -> Tally:
        """What was counted after `look` queries (from 1)."""
        wins, ties = int(self.wins[run, look - 1]), int(self.ties[run, look - 1])
        return Tally(wins, ties, look - wins - ties)

    def log_e(self, run: int, *, null: float, since: int = 0, with_: Tally | None = None, reversed_: bool = False) -> Any:
        """The log e-value at every look of a run after look `since`, of the outcomes after it and those of `with_`; as the other side
        sees them when `reversed_`."""
        import numpy as np

        begun, more = self.tally(run, since) if since else Tally(), with_ or Tally()
        wins, ties = self.wins[run, since:] - begun.wins, self.ties[run, since:] - begun.ties
        losses = np.arange(1, self.queries - since + 1) - wins - ties + more.losses
        wins, ties = wins + more.wins, ties + more.ties
        return log_e(losses, ties, wins, null=null) if reversed_ else log_e(wins, ties, losses, null=null)


def draw(rng: Any, runs: int, queries: int, *, rate: float, ties: float = 0.0) -> Paths:
    """Independent outcomes with a true win rate (ties half) of `rate`, a share `ties` of them ties."""
    import numpy as np

    drawn = rng.random((runs, queries))
    tied = drawn < ties
    won = (drawn >= ties) & (drawn < ties + rate - ties / 2)
    return Paths(np.cumsum(won, axis=1), np.cumsum(tied, axis=1))


def looks(paths: Paths, *, null: float, needed: float) -> Iterator[Any]:
    """For each run the looks (query counts from 1) at which the e-value against `null` is at least `needed`."""
    import numpy as np

    count = np.arange(1, paths.queries + 1)
    together = max(1, CHUNK // paths.queries)
    for start in range(0, paths.runs, together):
        wins, ties = paths.wins[start : start + together], paths.ties[start : start + together]
        evidence = log_e(wins, ties, count - wins - ties, null=null)
        yield from (np.flatnonzero(row >= math.log(needed) - HAIR) + 1 for row in evidence)
