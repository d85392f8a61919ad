"""A cluster in virtual time: the real handlers, table, policy, barrier and sessions, and an event heap instead of
sockets and clocks.

Only what `esync.worker.client` and `esync.ps.server` do between those objects is written again here, in a few lines
each. Tests give each worker the seconds of its n-th local step, and read off who waited how long.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from esync.algorithms import algorithm
from esync.config import RunConfig
from esync.messages import (
    Error,
    Join,
    Members,
    MessageError,
    Report,
    Reset,
    Response,
    Welcome,
)
from esync.ps.aggregation import AGGREGATIONS, INITIAL, Completed, Contribution, Event
from esync.ps.backend import NumpyBackend
from esync.state.handlers import Handlers, Tick
from esync.state.policy import Policy
from esync.tensors import DELTA, Layout, Leaf
from esync.worker.session import Action, Session

LAYOUT = Layout((Leaf(DELTA, "w", (1,), "float32"),))
PS = "ps"


@dataclass
class Device:
    """One worker: how fast it is, its session, and where it stands.

    Attributes:
        step_s: seconds of its n-th local step.
        delivery_s: seconds that its update takes to the parameter server.
        doing: what the training thread does: `train`, `wait` (for an answer), `sync` or `gone`.
        newest: the newest version of the model that it received.
    """

    name: str
    step_s: Callable[[int], float]
    session: Session
    delivery_s: float = 0.0
    doing: str = "join"
    newest: int = -1


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


@dataclass
class Cluster:
    """Runs workers in virtual time.

    Args:
        config: the run; `workers` is how many the run starts with.
        delay_s: how long every message takes.
        policy: instead of the configuration's.
    """

    config: RunConfig
    delay_s: float = 0.0
    policy: Policy | None = None
    now: float = 0.0
    devices: dict[str, Device] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._arrived: dict[str, tuple[float, int]] = {}
        self._queries: Counter[str] = Counter()
        self._mode = algorithm(self.config.mode)
        self.state = Handlers(
            self.config,
            lambda peer, message: self._soon(lambda: self._receive(peer.decode(), message)),
            lambda: self.now,
            say=lambda text: None,
            policy=self.policy,
        )
        self._handlers = self.state.table_of_handlers()
        self._ps = AGGREGATIONS[self._mode.aggregation](LAYOUT, NumpyBackend(), self.config)
        self._ps.receive(Contribution("0", INITIAL, 0, np.zeros(1, np.float32)))
        self._to_state(PS, Join(PS, "ps", endpoints={"push": "inproc://p", "model": "inproc://m"}))
        self._tick()

    # Events

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        """Have `event` happen at a time."""
        heapq.heappush(self._heap, (seconds, next(self._order), event))

    def _soon(self, event: Callable[[], None], more_s: float = 0.0) -> None:
        self.at(self.now + self.delay_s + more_s, event)

    def run(self, rounds: int, limit_s: float) -> list[Round]:
        """Go on until so many rounds have ended; a cluster that hangs fails at `limit_s`."""
        while len(self.rounds) < rounds:
            self.now, _, event = heapq.heappop(self._heap)
            if self.now > limit_s:
                standing = {x.name: (x.doing, x.session.round) for x in self.devices.values()}
                raise AssertionError(f"round {len(self.rounds)} does not end: {standing}")
            event()
        return self.rounds

    def _tick(self) -> None:
        self._to_state(PS, Report(PS, self._ps.version, 0, "serving"))
        self._handlers[Tick](b"", Tick())
        self.at(self.now + self.config.heartbeat_s / 4, self._tick)

    # Workers: what esync.worker.client does

    def join(
        self,
        name: str,
        step_s: float | Callable[[int], float],
        at: float = 0.0,
        delivery_s: float = 0.0,
    ) -> None:
        """A worker joins, or comes back."""

        def start() -> None:
            pace = step_s if callable(step_s) else lambda n: step_s
            session = Session(name, nonblocking=self.config.nonblocking)
            self.devices[name] = device = Device(name, pace, session, delivery_s)
            self._beat(device)
            self._to_state(name, Join(name, "worker", layout=LAYOUT.to_wire()))

        self.at(at, start)

    def kill(self, name: str, at: float) -> None:
        """A worker falls silent for good; what it has sent still arrives."""

        def stop() -> None:
            if name in self.devices:
                self.devices[name].doing = "gone"

        self.at(at, stop)

    def _beat(self, device: Device) -> None:
        if device.doing != "gone":
            session = device.session
            beat = Report(device.name, session.round, session.step, device.doing)
            if device.doing != "join":
                self._to_state(device.name, beat)
            self.at(self.now + self.config.heartbeat_s / 4, lambda: self._beat(device))

    def _receive(self, peer: str, message: object) -> None:
        """A message of the state server arrives."""
        if peer == PS:
            self._ps_receives(message)
            return
        device = self.devices[peer]
        if device.doing == "gone":
            return
        if isinstance(message, Welcome):
            self._model_arrives(device, self._ps.version)
        elif isinstance(message, Error):
            assert message.code == "unknown-worker", message
            self._to_state(peer, Join(peer, "worker", layout=LAYOUT.to_wire()))
        elif isinstance(message, Response):
            device.session.on_response(message)
            if device.doing == "wait":
                self._decide(device)

    def _model_arrives(self, device: Device, version: int) -> None:
        if device.doing == "gone":
            return
        device.newest = max(device.newest, version)
        if device.doing in ("join", "sync") and device.newest > device.session.round:
            first = device.session.round < 0
            device.session.begin(device.newest)
            self._query_if_wanted(device)
            if first:
                self._decide(device)
            else:
                self._train(device)
        elif device.doing == "wait":
            self._decide(device)

    def _query_if_wanted(self, device: Device) -> None:
        if device.session.wants_query():
            self._queries[device.name] += 1
            self._to_state(device.name, device.session.query())

    def _decide(self, device: Device) -> None:
        self._query_if_wanted(device)
        session, action = device.session, device.session.action()
        if session.step and device.newest > session.round:
            device.doing = "sync"  # the round ended without this worker
            self._model_arrives(device, device.newest)
        elif action is Action.SYNC and session.step:
            self._synchronise(device)
        elif action is Action.WAIT:
            device.doing = "wait"
        elif action is not Action.STOP:
            self._train(device)

    def _train(self, device: Device) -> None:
        device.doing = "train"
        seconds = device.step_s(device.session.totals.steps)

        def finished() -> None:
            if device.doing != "gone":
                device.session.finished(seconds, 1)
                self._decide(device)

        self.at(self.now + seconds, finished)

    def _synchronise(self, device: Device) -> None:
        device.doing = "sync"
        session = device.session
        self._to_state(device.name, session.synchronising())
        update = Contribution(
            device.name, session.round, 0, np.ones(1, np.float32), session.step, session.samples
        )
        self._soon(lambda: self._update_arrives(update), device.delivery_s)

    # Servers

    def _to_state(self, worker: str, message: object) -> None:
        def deliver() -> None:
            try:
                self._handlers[type(message)](worker.encode(), message)
            except MessageError as error:
                refusal = Error(error.code, error.text)
                self._soon(lambda: self._receive(worker, refusal))

        self._soon(deliver)

    def _ps_receives(self, message: object) -> None:
        if isinstance(message, Members):
            self._emit(self._ps.set_members(message.workers))
            self._to_state(PS, Members(message.epoch, {}))

    def _update_arrives(self, update: Contribution) -> None:
        self._arrived[update.worker] = (self.now, update.steps)
        self._emit(self._ps.receive(update))

    def _emit(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Completed):
                self._complete(event)

    def _complete(self, event: Completed) -> None:
        waits = {w: self.now - self._arrived[w][0] for w in event.members}
        steps = {w: self._arrived[w][1] for w in event.members}
        slowest = self.state.table.slowest()
        name = None if slowest is None else slowest.worker
        self.rounds.append(Round(event.version, self.now, waits, steps, self._queries, name))
        self._queries = Counter()
        self._to_state(PS, Reset(PS, event.version, dict(waits)))
        receivers = self.devices if self._mode.barrier else event.members
        for device in [self.devices[name] for name in receivers]:
            self._soon(lambda device=device: self._model_arrives(device, event.version))
