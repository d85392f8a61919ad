"""A cluster in virtual time: the real handlers, table, policies, aggregations and sessions, and a queue of events in
the place of sockets and clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from esync.config import ClusterConfig, RunConfig
from esync.emulation import StepTimes, cost_of
from esync.errors import EsyncError
from esync.journal import Journal
from esync.messages import Error, Join, Leave, Message, MessageError, Report, Reset
from esync.sim.device import Device, Push, StepSeconds
from esync.sim.evaluator import EVALUATOR, Evaluator
from esync.sim.events import Event, Events
from esync.sim.network import Network
from esync.sim.server import PS, Server
from esync.sim.trainee import Chunks, Lessons, Trainee
from esync.state.handlers import TICK_S, Handlers, Tick
from esync.state.policy import Policy
from esync.tensors import Layout, Vector

MOST = 1_000_000
"""Members, at most: nobody comes to a virtual cluster uninvited."""
QUIET_S = 30.0
"""When nothing but heartbeats has happened for so long, and for a heartbeat's patience, nothing will."""


class Cluster:
    """Runs workers in virtual time.

    Args:
        config: the run; `workers` is how many it starts with.
        layout, initial: the model.
        network: how long tensors and messages take.
        evaluate: a model -> its accuracy and loss, when they are computed; None: nothing is evaluated.
        split_digest: of which sample belongs to which worker.
        log: the file for all roles' events.
        policy: instead of the configuration's.
        watch: called with the sender and each message for the state server.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        initial: Vector,
        events: Events,
        network: Network,
        *,
        evaluate: Callable[[Chunks], Future[tuple[float, float]]] | None = None,
        split_digest: str = "",
        log: Path | None = None,
        policy: Policy | None = None,
        watch: Callable[[str, Message], None] = lambda sender, message: None,
    ) -> None:
        self.config, self.events = config, events
        self.layout = layout.cut(1, config.mib_per_chunk)
        self.split_digest = split_digest
        self.devices: dict[str, Device] = {}
        self._network, self._watch = network, watch
        self._journal = Journal(log, "state", lambda: events.now)
        self._after_start: list[tuple[float, Event]] = []
        self.state = Handlers(
            config,
            self._from_state,
            lambda: events.now,
            journal=self._journal,
            say=lambda text: None,
            policy=policy,
            max_peers=MOST,
        )
        self._handlers = self.state.table_of_handlers()
        self._evaluator: Evaluator | None = None
        self.server = Server(self, initial, network, self._journal.of(PS), self._on_version)
        self.to_state(PS, Join(PS, "ps", endpoints={"push": "inproc://p", "model": "inproc://m"}))
        if evaluate is not None:
            self._evaluator = Evaluator(
                config,
                events,
                evaluate,
                newest=lambda: (self.server.version, self.server.averaged),
                known=lambda: self.state.history.version,
                report=lambda report: self.handle(EVALUATOR, report),
            )
            self.to_state(EVALUATOR, Join(EVALUATOR, EVALUATOR, layout=layout.to_wire()))
        self._tick()

    # Workers

    def join(
        self, name: str, rank: int | None, step_s: StepSeconds, trainee: Trainee, at: float = 0.0
    ) -> None:
        """A worker joins, or comes back, at a second of virtual time."""

        def start() -> None:
            journal = self._journal.of(name)
            device = Device(name, rank, step_s, trainee, self, journal)
            self.devices[name] = device
            device.start()

        self.events.at(at, start)

    def leave(self, name: str) -> None:
        """A worker leaves properly."""
        self.devices[name].leave("left")

    def kill(self, name: str) -> None:
        """A worker falls silent for good; what it has sent still arrives."""
        self.devices[name].fall_silent()

    def after_start(self, seconds: float, event: Event) -> None:
        """Have `event` happen so many seconds after the run's start."""
        self._after_start.append((seconds, event))

    # Running

    def step(self) -> None:
        """Let the next event happen.

        Raises:
            EsyncError: nothing will happen any more, or the training diverged.
        """
        self.events.next()
        if self.state.started is not None:
            for seconds, event in self._after_start:
                self.events.at(self.state.started + seconds, event)
            self._after_start = []
        if self.events.quiet_s > self.config.heartbeat_s + QUIET_S and not self._will_end():
            doing = {name: device.doing for name, device in self.devices.items()}
            raise EsyncError(
                f"nothing happens any more after {self.events.now:.0f} virtual seconds: waiting for "
                + (self.state.waiting_for() or f"workers that wait themselves ({doing!s:.200})")
            )

    def _will_end(self) -> bool:
        return self.state.started is not None and self.config.duration_s > 0

    def run(self) -> dict[str, Any]:
        """Go on until the run has ended; returns its summary.

        Raises:
            EsyncError: as `step`.
        """
        while self.state.stopped is None:
            self.step()
        return self.finish()

    def finish(self) -> dict[str, Any]:
        """Take leave of a run that was stopped; returns its summary."""
        for device in self.devices.values():
            device.leave("done")
        if self._evaluator is not None:
            self._evaluator.finish(self.server.version)
            self.handle(EVALUATOR, Leave(EVALUATOR, "done"))
        self.handle(PS, Leave(PS, "done"))
        self._journal.close()
        return {**self.state.summary(), "refused": {}, "virtual": True}

    def _tick(self) -> None:
        self.to_state(PS, Report(PS, self.server.version, 0, "serving"), routine=True)
        if self._evaluator is not None:
            self.handle(EVALUATOR, Report(EVALUATOR, 0, 0, "watching"))
        self._handlers[Tick](b"", Tick())
        now = self.events.now
        # To the point: the next number after the sum, which may be rounded down.
        ends = math.nextafter((self.state.started or 0.0) + self.config.duration_s, math.inf)
        self.events.at(
            ends if now < ends < now + TICK_S else now + TICK_S, self._tick, routine=True
        )

    # Between the roles

    def run_s(self) -> float:
        """Seconds since the run started."""
        return self.events.now - (self.state.started or 0.0)

    def to_state(self, sender: str, message: Message, *, routine: bool = False) -> None:
        """A message for the state server; `routine`: a heartbeat."""
        self._watch(sender, message)
        when = self.events.now + self._network.latency_s(sender)
        self.events.at(when, lambda: self.handle(sender, message), routine=routine)

    def handle(self, sender: str, message: Message) -> None:
        """The state server receives a message."""
        try:
            self._handlers[type(message)](sender.encode(), message)
        except MessageError as error:
            self._from_state(sender.encode(), Error(error.code, error.text))
        if isinstance(message, Reset) and self._evaluator is not None:
            self._evaluator.heard()

    def _from_state(self, peer: bytes, message: Message) -> None:
        name = peer.decode()
        when = self.events.now + self._network.latency_s(name)
        if name == PS:
            self.events.at(when, lambda: self.server.receive(message))
        elif name in self.devices:
            self.events.at(when, lambda: self.devices[name].receive(message))

    def subscribe(self, device: Device) -> None:
        """A worker asks for the current model and every later one."""
        self.server.subscribe(device)

    def push(self, update: Push) -> None:
        """A worker sends its update."""
        self.server.push(update)

    def _on_version(self, version: int) -> None:
        if self._evaluator is not None:
            self._evaluator.published(version)


def virtual_cluster(
    config: ClusterConfig,
    learner: Lessons,
    *,
    log: Path | None = None,
    watch: Callable[[str, Message], None] = lambda sender, message: None,
) -> Cluster:
    """The virtual cluster of a cluster file."""
    # Several parameter servers are one here, with the links of all of them.
    run, events = replace(config.run, ps=1), Events()
    workers = {worker.name: worker for worker in config.each_worker()}
    cluster = Cluster(
        run,
        learner.layout,
        learner.initial(),
        events,
        Network(config.network, workers, events, servers=config.run.ps),
        evaluate=learner.evaluate,
        split_digest=learner.split_digest,
        log=log,
        watch=watch,
    )
    for rank, (name, worker) in enumerate(workers.items()):
        step_s = step_seconds(StepTimes(worker, run.seed, rank), worker.step_time_s)

        def join(name: str = name, rank: int = rank, step_s: StepSeconds = step_s) -> None:
            cluster.join(name, rank, step_s, learner.trainee(rank), events.now)

        if worker.join_s:
            cluster.after_start(worker.join_s, join)
        else:
            join()
        if worker.leave_s:
            cluster.after_start(worker.leave_s, lambda name=name: cluster.leave(name))  # type: ignore[misc]
    return cluster


def step_seconds(times: StepTimes, whole_s: float) -> StepSeconds:
    """Seconds of a device's steps; a sub-network of width x costs x * x of the whole model's."""
    return lambda run_s, width: times.next(run_s, whole_s * cost_of(width))
