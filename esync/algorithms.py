"""The table of synchronisation algorithms: mode -> pacing policy (state server) + aggregation (parameter server).

The names are keys of `esync.state.policy.POLICIES` and `esync.ps.aggregation.AGGREGATIONS`. A new algorithm
is one entry here and at most one policy and one aggregation there; the worker's loop is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from esync.errors import ConfigError, unknown


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One mode.

    Attributes:
        pacing: who trains on and who synchronises.
        aggregation: what becomes of an update.
        summary: one line for `--help` and the documentation.
        barrier: whether a round ends for everybody at once.
        single: whether only one worker can take part.
        ordered: whether updates are added up in the order of ranks, so that a run is repeatable bit for bit
            (at the price of keeping a round's updates until the last one is there).
    """

    pacing: str
    aggregation: str
    summary: str
    barrier: bool = True
    single: bool = False
    ordered: bool = False


ALGORITHMS: dict[str, Algorithm] = {
    "esync": Algorithm(
        pacing="esync",
        aggregation="mean",
        summary="as many local steps as fit before the slowest worker arrives (Li et al. 2019)",
    ),
    "sync": Algorithm(
        pacing="fixed",
        aggregation="mean",
        summary="SSGD: one step each, average (Chen et al. 2016)",
        ordered=True,
    ),
    "async": Algorithm(
        pacing="fixed",
        aggregation="immediate",
        summary="ASGD: each update is applied as it arrives (Dean et al. 2012); --dcasgd compensates "
        "the delay (Zheng et al. 2017)",
        barrier=False,
    ),
    "local": Algorithm(
        pacing="fixed",
        aggregation="mean",
        summary="one worker alone; publishes its model every --local-steps steps",
        single=True,
    ),
}


def algorithm(mode: str) -> Algorithm:
    """The entry for `mode`.

    Raises:
        ConfigError: there is none.
    """
    try:
        return ALGORITHMS[mode]
    except KeyError:
        raise ConfigError(unknown("mode", mode, ALGORITHMS)) from None
