"""The state table: one record per worker, and who is the slowest. No socket, no task, no clock.

Times are seconds on the state server's own monotonic clock and come in as arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


class Estimate(Protocol):
    """A running estimate of a duration in seconds."""

    value: float
    jitter: float

    def observe(self, seconds: float) -> None: ...


@dataclass(slots=True)
class Latest:
    """The last measurement, as in the paper."""

    value: float = 0.0
    jitter: float = 0.0

    def observe(self, seconds: float) -> None:
        self.value = seconds


@dataclass(slots=True)
class MedianOfThree:
    """The median of the last three measurements, and their smoothed mean deviation from it.

    One stall of a shared machine changes nothing; a lasting change counts from its second measurement on.
    """

    value: float = 0.0
    jitter: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=3))

    def observe(self, seconds: float) -> None:
        if self.recent:
            # A stall is not jitter: no deviation counts for more than half a step.
            deviation = min(abs(seconds - self.value), self.value / 2)
            self.jitter += (deviation - self.jitter) / 4
        self.recent.append(seconds)
        ordered = sorted(self.recent)
        self.value = ordered[(len(ordered) - 1) // 2]


@dataclass(slots=True)
class Record:
    """What is known of one worker.

    Attributes:
        peer: by which identity it is answered.
        life: which process it is; another one under the same name is another worker.
        suspected: since when it is thought to be dead; None: it is not.
        active: expected at the barrier (it has the model and has asked for work).
        round, step: the round it is in, and its finished local steps (the paper's k).
        since: when it finished its last step, or pulled the model (the paper's te).
        leave: how many steps of the round it was last told that it may do.
        ready: it was told to synchronise, after `goal` steps.
        arrived: it is synchronising: its update is on the way.
        finished: the last round whose steps it finished, and when.
        active_at: since when.
        freed: when it was last told to go on after it had been held.
        arrivals: how many seconds after the beginning of its last rounds it arrived.
        clock: how many rounds it finished.
        width: the share of each layer's units that it trains (1: the whole model).
        step_s: seconds per local step (the paper's c).
        delivery_s: seconds from the end of its last step to its update's arrival.
        sync_s: seconds from the end of its last step to the beginning of its next round.
        totals: its own running totals, as last reported.
    """

    worker: str
    rank: int
    step_s: Estimate = field(default_factory=Latest)
    delivery_s: Estimate = field(default_factory=Latest)
    sync_s: Estimate = field(default_factory=Latest)
    role: str = "worker"
    host: str = ""
    device: str = ""
    peer: bytes = b""
    life: str = ""
    heard: float = 0.0
    suspected: float | None = None
    active: bool = False
    active_at: float = 0.0
    freed: float = 0.0
    round: int = -1
    step: int = 0
    since: float = 0.0
    leave: int = 0
    ready: bool = False
    goal: int = 0
    arrived: bool = False
    finished: tuple[int, float] = (-1, 0.0)
    arrivals: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    clock: int = 0
    width: float = 1.0
    phase: str = "joined"
    loss: float | None = None
    totals: dict[str, Any] = field(default_factory=dict)


class Table:
    """All records, and the slowest active worker (kept, not searched for).

    Args:
        estimate: makes the estimator of a duration.
        unmeasured_s: what a worker that has not finished a step yet is taken to cost.
    """

    def __init__(
        self,
        estimate: Callable[[], Estimate] = MedianOfThree,
        unmeasured_s: float = float("inf"),
    ) -> None:
        self.records: dict[str, Record] = {}
        self._estimate = estimate
        self._unmeasured_s = unmeasured_s
        self._slowest: Record | None = None

    def add(self, worker: str, rank: int, now: float, **facts: Any) -> Record:
        """A new record, not active yet."""
        estimates = (self._estimate(), self._estimate(), self._estimate())
        record = Record(worker, rank, *estimates, heard=now, since=now, **facts)
        self.records[worker] = record
        return record

    def remove(self, worker: str) -> Record | None:
        """Forget a worker; None if it was not known."""
        record = self.records.pop(worker, None)
        if record is self._slowest:
            self._slowest = None
        return record

    def activate(self, record: Record, now: float = 0.0) -> None:
        """From now on the worker is expected at the barrier."""
        record.clock = self.behind()
        record.active, record.active_at = True, now
        self._slowest = None

    def suspend(self, record: Record) -> None:
        """The worker is not expected until it is heard of again."""
        record.active = False
        self._slowest = None

    def active(self) -> list[Record]:
        """Everybody expected at the barrier."""
        return [record for record in self.records.values() if record.active]

    def behind(self) -> int:
        """How many rounds everybody active has finished."""
        return min((record.clock for record in self.active()), default=0)

    def slowest(self) -> Record | None:
        """The active worker with the longest step and delivery; None if nobody is active."""
        if self._slowest is None:
            self._slowest = max(self.active(), key=self._cost, default=None)
        return self._slowest

    def progress(
        self,
        record: Record,
        round: int,
        step: int,
        compute_s: float,
        now: float,
        running_s: float = 0.0,
    ) -> None:
        """Store what a worker reports: `step` steps of `round` are finished, `compute_s` seconds each (0: none
        since it last said so), and the next one runs since `running_s` seconds."""
        record.heard = now
        if round != record.round:
            if record.arrived and record.finished[0] == record.round:
                record.sync_s.observe(now - record.finished[1])
            record.round, record.step = round, step
            record.ready = record.arrived = False
            record.leave = 0
            record.since = now - max(0.0, running_s)
        elif step > record.step:
            record.step = step
            record.since = now
        if compute_s > 0:
            self._measure(record, record.step_s, compute_s)

    def delivered(self, record: Record, seconds: float) -> None:
        """Store how long a worker's update took from its last step to the parameter server."""
        self._measure(record, record.delivery_s, max(0.0, seconds))

    def _measure(self, record: Record, estimate: Estimate, seconds: float) -> None:
        before = self._cost(record)
        estimate.observe(seconds)
        slowest = self._slowest
        if slowest is None or not record.active:
            return
        if record is slowest:
            if self._cost(record) < before:
                self._slowest = None
        elif self._cost(record) > self._cost(slowest):
            self._slowest = record

    def _cost(self, record: Record) -> float:
        if record.step_s.value:
            return record.step_s.value + record.delivery_s.value
        return self._unmeasured_s
