"""What a student is expected to save, from what its gap cost and what its held-out items say. Pure; it refuses to know invoices: what was
saved in fact is in the usage report.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Saving:
    """Micro-dollars of a request of the domain: `before`, as the gap was served; `after`, when the student answers the share of the
    requests that it is sure of and the others cost what they did, on top of its own try. `per_day`: of the domain, negative for a loss."""

    before: float
    after: float
    per_day: float
    reason: str


def expected(*, cost_microusd: float, requests: int, requests_per_day: float, share: float, student_microusd: float) -> Saving:
    """`cost_microusd` of `requests`; `share`: of held-out items that the student answers surely enough to be given; `student_microusd`: of
    one of its answers."""
    before = cost_microusd / max(requests, 1)
    after = student_microusd + (1 - share) * before
    told = f"sure of {share:.0%}: ${before / 1000:.4f} per 1,000 requests become ${after / 1000:.4f}"
    return Saving(before, after, (before - after) * requests_per_day, told)
