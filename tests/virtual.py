"""The virtual cluster of `esync.sim` with a model that learns nothing: who waited how long, after how many steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from esync import config
from esync.config import NetworkConfig, RunConfig
from esync.messages import Query, Report, Reset
from esync.sim.cluster import Cluster as VirtualCluster
from esync.sim.cluster import virtual_cluster
from esync.sim.events import Event, Events
from esync.sim.network import Network
from esync.state.policy import Policy
from esync.tensors import DELTA, Layout, Leaf

LAYOUT = Layout((Leaf(DELTA, "w", (1,), "float32"),))


def done(value: Any) -> Future[Any]:
    """A future that has come."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@contextmanager
def compiled_once(directory: Path) -> Iterator[None]:
    """Programs that were compiled within are found in `directory` the next time."""
    options = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


class Untrained:
    """`Lessons` and every worker's `Trainee` in which nothing is learnt."""

    split_digest = ""
    layout = LAYOUT

    def initial(self):
        return np.zeros(1, np.float32)

    def trainee(self, rank):
        return self

    def evaluate(self, chunks):
        return done((0.1, 1.0))

    def adopt(self, chunks):
        pass

    def train(self, steps, width):
        pass

    def push(self, *, go_on):
        return done((np.ones(1, np.float32), None))

    def merge(self, chunks):
        pass


class Delays(Network):
    """Every message and tensor takes as long as every other; updates of some workers take longer.

    Attributes:
        deliveries_s: how much longer.
    """

    def __init__(self, delay_s: float, events: Events) -> None:
        super().__init__(NetworkConfig(latency_s=delay_s), {}, events)
        self.deliveries_s: dict[str, float] = {}
        self._later = events

    def send(
        self, name: str, way: str, size: int, event: Event, through: Event | None = None
    ) -> None:
        more_s = self.deliveries_s.get(name, 0.0) if way == "up" else 0.0
        self._later.at(self._later.now + self.latency_s(name) + more_s, event)
        if through is not None:
            through()


@dataclass
class Round:
    """A version of the model: when it came out, and each member's wait for it and local steps.

    `queries` counts the queries that a worker sent since the version before; `slowest` is whom the state server took
    for the slowest.
    """

    version: int
    at: float
    waits: dict[str, float]
    steps: dict[str, int]
    queries: Counter[str]
    slowest: str | None


class Rounds:
    """What the messages for the state server say about the rounds of a virtual cluster."""

    def __init__(self) -> None:
        self.rows: list[Round] = []
        self.cluster: VirtualCluster | None = None
        self._steps: dict[str, int] = {}
        self._queries: Counter[str] = Counter()

    def watch(self, sender: str, message: object) -> None:
        if isinstance(message, Query):
            self._queries[sender] += 1
        elif isinstance(message, Report) and message.phase == "sync":
            self._steps[sender] = message.step
        elif isinstance(message, Reset) and self.cluster is not None:
            slowest = self.cluster.state.table.slowest()
            self.rows.append(
                Round(
                    message.round,
                    self.cluster.events.now,
                    dict(message.members),
                    {worker: self._steps[worker] for worker in message.members},
                    self._queries,
                    None if slowest is None else slowest.worker,
                )
            )
            self._queries = Counter()


def untrained(file: dict[str, Any], **run: Any) -> tuple[VirtualCluster, list[Round]]:
    """The virtual cluster of a cluster file's tables in which nothing is learnt, and its rounds as they come."""
    rounds = Rounds()
    rounds.cluster = virtual_cluster(config.cluster(file, run), Untrained(), watch=rounds.watch)
    return rounds.cluster, rounds.rows


class Cluster:
    """Workers of given paces, without a limit of the network.

    A barrier waits here for whoever it is told to: paces change as wildly as a generator of tests likes, and who is
    late is not what they are about (`tests/test_deadline.py`).

    Args:
        config: the run; `workers` is how many it starts with.
        delay_s: how long every message takes.
        policy: instead of the configuration's.
    """

    def __init__(
        self, config: RunConfig, delay_s: float = 0.0, policy: Policy | None = None
    ) -> None:
        events, rounds, lessons = Events(), Rounds(), Untrained()
        self._network = Delays(delay_s, events)
        self._virtual = VirtualCluster(
            replace(config, deadline_s=0.0),
            LAYOUT,
            lessons.initial(),
            events,
            self._network,
            policy=policy,
            watch=rounds.watch,
        )
        rounds.cluster = self._virtual
        self.rounds = rounds.rows

    @property
    def now(self) -> float:
        return self._virtual.events.now

    def run(self, rounds: int, limit_s: float) -> list[Round]:
        """Go on until so many rounds have ended; a cluster that hangs fails at `limit_s`."""
        while len(self.rounds) < rounds:
            self._virtual.step()
            if self.now > limit_s:
                standing = {x.name: (x.doing, x.session.round) for x in self._devices()}
                raise AssertionError(f"round {len(self.rounds)} does not end: {standing}")
        return self.rounds

    def _devices(self):
        return self._virtual.devices.values()

    def join(
        self,
        name: str,
        step_s: float | Callable[[int], float],
        at: float = 0.0,
        delivery_s: float = 0.0,
    ) -> None:
        """A worker joins, or comes back; `step_s`: seconds of its n-th local step."""

        def seconds(run_s: float, width: float) -> float:
            steps = self._virtual.devices[name].session.totals.steps
            return step_s(steps) if callable(step_s) else step_s

        self._network.deliveries_s[name] = delivery_s
        self._virtual.join(name, None, seconds, Untrained(), at)

    def kill(self, name: str, at: float) -> None:
        """A worker falls silent for good; what it has sent still arrives."""

        def stop() -> None:
            if name in self._virtual.devices:
                self._virtual.kill(name)

        self._virtual.events.at(at, stop)
