"""How long the others wait at a barrier for a worker that is connected and does not arrive. A decision: no clock."""

from __future__ import annotations

import statistics
from collections.abc import Collection

ENOUGH = 3
"""Arrivals from which a worker's own habit is known."""
SPREADS = 6.0
"""So many standard deviations from the median are no accident."""
TIMES = 2.0
"""Nor is it to take this many times as long as usual."""


def deadline_s(arrivals: Collection[float], floor_s: float, ceiling_s: float) -> float:
    """Seconds from a round's beginning after which a worker is not waited for any more.

    The median of its arrivals plus `SPREADS` standard deviations (estimated by 1.4826 times the median absolute
    deviation, Rousseeuw and Croux 1993), and at least `TIMES` the median.

    Args:
        arrivals: how many seconds after a round's beginning it arrived in earlier rounds; before there are
            `ENOUGH` of them the deadline is the ceiling.
    """
    if len(arrivals) < ENOUGH:
        return ceiling_s
    usual = statistics.median(arrivals)
    spread = 1.4826 * statistics.median(abs(x - usual) for x in arrivals)
    return min(ceiling_s, max(floor_s, usual + SPREADS * spread, TIMES * usual))
