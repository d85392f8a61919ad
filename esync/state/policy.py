"""Pacing policies: who trains on and who synchronises. Pure decisions on the state table, with `now` as an argument.

A worker asks after local step `record.step`; with `ahead` = 1 its next step is already running. The answer is counted
from `record.step`: see `Decision`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from esync.algorithms import algorithm
from esync.config import RunConfig
from esync.state.database import Latest, MedianOfThree, Record, Table

TRAIN = "train"
SYNC = "sync"
STOP = "stop"
PAPER_EPSILON_S = 0.5
"""Epsilon of the 2019 implementation."""
FEW_STEPS = 3
"""When no more steps than these fit, they are decided at once."""
MOST_STEPS = 1_000_000
"""More are never said to fit, however absurd the times that somebody reports."""


@dataclass(frozen=True, slots=True)
class Decision:
    """`train`: run up to `lease` more steps, then have a new answer. `sync`: run exactly `lease` more steps,
    then synchronise. A step already running counts."""

    action: str
    lease: int


class Policy(Protocol):
    """Decides for one worker at a time.

    Attributes:
        measures_delivery: the table is to be told how long updates take to arrive.
    """

    measures_delivery: bool

    def table(self) -> Table:
        """An empty table with the estimators that the policy wants."""

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision:
        """What `record`'s worker does next. A `sync` is remembered in the record."""

    def hurry(self, table: Table, record: Record, now: float) -> list[Record]:
        """Now that `record`'s worker, which was the slowest or is, has arrived at the barrier: who else is to come
        at once, without asking."""


class FixedSteps:
    """The same number of local steps for everybody: SSGD and ASGD (1), local SGD and FedAvg (more)."""

    measures_delivery = False

    def __init__(self, steps: int = 1) -> None:
        self.steps = steps

    def table(self) -> Table:
        return Table()

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision:
        record.ready = True
        return Decision(SYNC, max(ahead, self.steps - record.step))

    def hurry(self, table: Table, record: Record, now: float) -> list[Record]:
        return []


class PaperEsync:
    """ESync exactly as published (Li et al. 2019, algorithm of the state server).

    Args:
        epsilon_s: the published margin against boundary error, in seconds.
    """

    measures_delivery = False

    def __init__(self, epsilon_s: float = PAPER_EPSILON_S) -> None:
        self.epsilon_s = epsilon_s

    def table(self) -> Table:
        return Table(Latest, unmeasured_s=0.0)

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision:
        slowest = table.slowest()
        if slowest is None or record.step == 0 or slowest.round < record.round:
            return Decision(TRAIN, 1)
        rest = slowest.step_s.value - (now - slowest.since)
        if record is slowest or slowest.ready or record.step_s.value + self.epsilon_s > rest:
            record.ready = True
            return Decision(SYNC, 0)
        return Decision(TRAIN, 1)

    def hurry(self, table: Table, record: Record, now: float) -> list[Record]:
        return []


class AdaptiveEsync:
    """ESync with robust estimates, answers ahead of time, leases, and a measured margin.

    The slowest worker arrives at the barrier at `since + step_s + delivery_s`. Another worker may run as many
    steps as end, with its own delivery and the margin, before that. While many fit it gets half of them as a
    lease, so that it asks again a few times as the barrier comes nearer, and after each change of the others'
    pace; when few are left it is told the step after which to synchronise.

    Args:
        epsilon_s: the margin in seconds; None measures it: the mean deviations of both workers' steps.
    """

    measures_delivery = True

    def __init__(self, epsilon_s: float | None = None) -> None:
        self.epsilon_s = epsilon_s

    def table(self) -> Table:
        return Table(MedianOfThree)

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision:
        slowest = table.slowest()
        # A round has at least one step, and a step that is running is finished.
        at_least = max(ahead, 1 - record.step)
        if slowest is None or not record.step_s.value:
            return Decision(TRAIN, max(1, at_least))  # one step, to know how long it takes
        if record is slowest:
            return self._sync(record, at_least)
        if not slowest.step_s.value:
            return Decision(TRAIN, ahead + 1)
        fits = self._fitting_steps(slowest, record, now)
        if fits <= max(at_least, FEW_STEPS):
            return self._sync(record, max(at_least, fits))
        return Decision(TRAIN, fits // 2)

    def _fitting_steps(self, slowest: Record, record: Record, now: float) -> int:
        """How many of `record`'s steps, begun now, end before the slowest worker's update arrives."""
        if slowest.round != record.round:
            done = now + slowest.step_s.value  # it has not pulled yet
        elif slowest.arrived:
            done = slowest.finished[1]
        else:
            steps = max(0, slowest.goal - slowest.step) if slowest.ready else 1
            done = slowest.since + steps * slowest.step_s.value
        epsilon = self.epsilon_s
        if epsilon is None:
            epsilon = slowest.step_s.jitter + record.step_s.jitter
        left = done + slowest.delivery_s.value - record.delivery_s.value - epsilon - now
        return math.floor(max(0.0, min(left / record.step_s.value, MOST_STEPS)))

    def hurry(self, table: Table, record: Record, now: float) -> list[Record]:
        """Somebody came sooner than expected: whoever has no time for another step does not use up its lease."""
        slowest = table.slowest()
        if slowest is None or not slowest.step_s.value:
            return []
        late = [
            other
            for other in table.active()
            if other.round == record.round
            and other.step_s.value
            and not other.arrived
            and not (other.ready and other.goal <= other.step + 1)
            and (other is slowest or not self._fitting_steps(slowest, other, now))
        ]
        for other in late:
            other.ready, other.goal = True, other.step
        return late

    @staticmethod
    def _sync(record: Record, lease: int) -> Decision:
        record.ready = True
        record.goal = record.step + lease
        return Decision(SYNC, lease)


class AtMost:
    """Another policy with a bound on the local steps of a round."""

    def __init__(self, policy: Policy, steps: int) -> None:
        self.policy, self.steps = policy, steps
        self.measures_delivery = policy.measures_delivery

    def table(self) -> Table:
        return self.policy.table()

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision:
        decision = self.policy.decide(table, record, ahead, now)
        most = max(ahead, self.steps - record.step)
        if decision.lease < most or (decision.action == SYNC and decision.lease == most):
            return decision
        record.ready = True
        return Decision(SYNC, most)

    def hurry(self, table: Table, record: Record, now: float) -> list[Record]:
        return self.policy.hurry(table, record, now)


def policy_for(config: RunConfig) -> Policy:
    """The policy of a run."""
    epsilon_s = None if config.epsilon_s < 0 else config.epsilon_s
    make = POLICIES[algorithm(config.mode).pacing]
    policy = make(config.policy, config.steps_per_round, epsilon_s)
    return AtMost(policy, config.max_steps) if config.max_steps else policy


def _esync(variant: str, steps: int, epsilon_s: float | None) -> Policy:
    if variant == "paper":
        return PaperEsync(PAPER_EPSILON_S if epsilon_s is None else epsilon_s)
    return AdaptiveEsync(epsilon_s)


def _fixed(variant: str, steps: int, epsilon_s: float | None) -> Policy:
    return FixedSteps(steps)


POLICIES: dict[str, Callable[[str, int, float | None], Policy]] = {
    "esync": _esync,
    "fixed": _fixed,
}
"""Pacing -> maker of its policy, from (variant, steps a round, epsilon in seconds or None)."""
