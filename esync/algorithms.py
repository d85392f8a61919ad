"""The table of synchronisation algorithms: mode -> pacing policy (state server) + aggregation (parameter server).

The names are keys of `esync.state.policy.POLICIES` and `esync.ps.aggregation.AGGREGATIONS`. A new algorithm
is one entry here and at most one policy and one aggregation there; the worker's loop is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        asks_first: whether a worker waits for an answer before the first local step of each round.
        local_steps: local steps a round where their number is fixed, unless the run says otherwise.
    """

    pacing: str
    aggregation: str
    summary: str
    barrier: bool = True
    single: bool = False
    ordered: bool = False
    asks_first: bool = False
    local_steps: int = 1


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
    "ssp": Algorithm(
        pacing="ssp",
        aggregation="immediate",
        summary="as async, but nobody is more than --max-staleness rounds ahead of the slowest (Ho et al. 2013)",
        barrier=False,
        asks_first=True,
    ),
    "fedavg": Algorithm(
        pacing="fedavg",
        aggregation="mean",
        summary="--local-steps steps each, average; --participation draws who takes part (McMahan et al. 2017)",
        asks_first=True,
        local_steps=20,
    ),
    "fedasync": Algorithm(
        pacing="fixed",
        aggregation="fedasync",
        summary="--local-steps steps, then mixed in on arrival, the less the staler (Xie et al. 2019)",
        barrier=False,
        local_steps=20,
    ),
    "tifl": Algorithm(
        pacing="tifl",
        aggregation="mean",
        summary="fedavg whose workers are drawn from one tier of equal speed at a time (Chai et al. 2020)",
        asks_first=True,
        local_steps=20,
    ),
    "feddrop": Algorithm(
        pacing="feddrop",
        aggregation="mean",
        summary="fedavg in which slow workers train a random sub-network (Caldas et al. 2018, Wen et al. 2022)",
        asks_first=True,
        local_steps=20,
    ),
    "local": Algorithm(
        pacing="fixed",
        aggregation="mean",
        summary="one worker alone; publishes its model every --local-steps steps",
        single=True,
        local_steps=50,
    ),
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"mode": "esync", "policy": "paper"},
    "fast": {
        "mode": "esync",
        "overlap": True,
        "outer": "nesterov",
        "outer_momentum": 0.8,
        "global_lr": 0.7,
        "ema": 0.8,
        "compression": "int8",
    },
    "skewed": {
        "mode": "esync",
        "max_steps": 16,
        "slowest_first": True,
        "outer": "nesterov",
        "outer_momentum": 0.9,
        "global_lr": 1.0,
        "ema": 0.8,
        "compression": "int8",
    },
}
"""Name -> options of `[run]` that belong together; what a run sets itself takes precedence."""


def algorithm(mode: str) -> Algorithm:
    """The entry for `mode`.

    Raises:
        ConfigError: there is none.
    """
    try:
        return ALGORITHMS[mode]
    except KeyError:
        raise ConfigError(unknown("mode", mode, ALGORITHMS)) from None
