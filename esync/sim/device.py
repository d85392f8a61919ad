"""A virtual worker: what `esync.worker.client` and `esync.worker.link` do around a session, as events."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

from esync.config import RunConfig
from esync.errors import EsyncError
from esync.journal import Journal
from esync.messages import Error, Join, Leave, Message, Report, Response, Welcome
from esync.sim.events import Events
from esync.sim.trainee import Chunks, Trainee
from esync.tensors import Layout, Vector
from esync.worker.session import Action, Session, Totals

StepSeconds = Callable[[float, float], float]
"""(second of the run, width) -> seconds of the local step that begins then."""


@dataclass(frozen=True, slots=True)
class Push:
    """An update on its way; `result` is the update and the last step's loss, when they are computed."""

    device: Device
    round: int
    steps: int
    samples: int
    result: Future[tuple[Vector, float | None]]


class Outside(Protocol):
    """What a worker is connected to."""

    config: RunConfig
    events: Events
    layout: Layout
    split_digest: str

    def run_s(self) -> float:
        """Seconds since the run started."""

    def to_state(self, sender: str, message: Message, *, routine: bool = False) -> None:
        """A message for the state server."""

    def handle(self, sender: str, message: Message) -> None:
        """The same without delay."""

    def subscribe(self, device: Device) -> None:
        """Have the current model and every later one sent to `model_arrives`."""

    def push(self, update: Push) -> None:
        """An update for the parameter server."""


class Device:
    """One virtual worker: its session, its model, and where it stands.

    Attributes:
        doing: `join`, `train`, `query` (it waits for an answer), `sync` or `gone`.
        newest: the newest version that it received, and its chunks.
        loss: of the last step whose loss is known.
    """

    def __init__(
        self,
        name: str,
        rank: int | None,
        step_s: StepSeconds,
        trainee: Trainee,
        outside: Outside,
        journal: Journal,
    ) -> None:
        self.name, self.rank = name, rank
        config = outside.config
        self.session = Session(name, nonblocking=config.nonblocking, most=config.max_steps)
        self.doing = "join"
        self.newest: tuple[int, Chunks] = (-1, ())
        self.loss: float | None = None
        self._step_s, self._trainee = step_s, trainee
        self._outside, self._events = outside, outside.events
        self._config = config
        self._journal = journal
        self._welcome = False
        self._since = 0.0  # when it began what it does
        self._first = 0  # the version that it began with
        self._merged = -1  # the version that its model is based on
        self._was_away = False  # when it began to wait
        self._marks = Totals()

    # Coming and going

    def start(self) -> None:
        """It joins."""
        self._since = self._events.now
        self._join()
        self._beat()

    def _join(self) -> None:
        layout = self._outside.layout.to_wire()
        self._outside.to_state(self.name, Join(self.name, "worker", rank=self.rank, layout=layout))

    def leave(self, reason: str) -> None:
        """It leaves properly."""
        if self.doing == "gone":
            return
        self._account()
        self.doing = "gone"
        self._outside.handle(self.name, self._report("leaving"))
        self._outside.handle(self.name, Leave(self.name, reason))
        self._journal.write("end", totals=self.session.totals.to_wire())

    def fall_silent(self) -> None:
        """It does and says nothing any more; what it has sent still arrives."""
        self.doing = "gone"

    def _beat(self) -> None:
        if self.doing == "gone":
            return
        if self._welcome:
            self._outside.to_state(self.name, self._report(self.doing), routine=True)
        every = min(2.0, self._config.heartbeat_s / 4)
        self._events.at(self._events.now + every, self._beat, routine=True)

    def _report(self, phase: str) -> Report:
        session = self.session
        return Report(self.name, session.round, session.step, phase, totals=self._totals())

    def _totals(self) -> dict[str, Any]:
        return {**self.session.totals.to_wire(), "split_digest": self._outside.split_digest}

    # What arrives

    def receive(self, message: object) -> None:
        """A message of the state server.

        Raises:
            EsyncError: it refuses this worker.
        """
        if self.doing == "gone":
            return
        if isinstance(message, Welcome):
            self._welcomed()
        elif isinstance(message, Error):
            if message.code != "unknown-worker":
                raise EsyncError(f"{self.name}: {message.text}")
            self._join()
        elif isinstance(message, Response):
            self.session.on_response(message)
            if self.doing == "query":
                self._decide()

    def _welcomed(self) -> None:
        if not self._welcome:
            self._welcome = True
            self._outside.subscribe(self)
        elif self.doing == "query":  # it was forgotten, and its question with it
            self.session.ask_again()
            self._decide()

    def model_arrives(self, version: int, chunks: Chunks) -> None:
        """A version of the model."""
        if self.doing == "gone":
            return
        if version > self.newest[0]:
            self.newest = version, chunks
        session, newer = self.session, self.newest[0] > self.session.round
        if session.away and newer:
            session.begin(self.newest[0])
            running_s = self._events.now - self._since if self.doing == "train" else 0.0
            self._outside.to_state(self.name, session.query(running_s=running_s))
        elif self.doing in ("join", "sync") and newer:
            self._begin()
        elif self.doing == "query":
            self._decide()

    # Rounds

    def _begin(self) -> None:
        """A round begins from the newest model."""
        session, late = self.session, self.doing != "sync"
        self._do("sync")
        if session.step:
            self._row(session.round, session.step, late)
        version, chunks = self.newest
        if session.round < 0:
            self._first = version  # until it trains on this one it waits for the run to start
            self._journal.write("start", rank=self.rank, device="")
        session.begin(version)
        self._merged = version
        self._trainee.adopt(chunks)
        if self._config.asks_first or not session.totals.steps:
            self._decide()
        else:
            self._ask()
            self._train()

    def _ask(self) -> None:
        if self.session.wants_query():
            self._outside.to_state(self.name, self.session.query(self.loss))

    def _decide(self) -> None:
        self._ask()
        session, action = self.session, self.session.action()
        over = self.newest[0] > session.round and not session.away
        if action is Action.STOP:
            self._do("query")
        elif over and (session.step or action is Action.WAIT):
            self._begin()  # the round ended without this worker
        elif action is Action.SYNC:
            self._synchronise()
        elif action is Action.WAIT:
            if self.doing != "query":
                self._was_away = session.away
            self._do("query")
        else:
            self._merge()
            self._train()

    def _merge(self) -> None:
        """Take up the model of a round that began while a step was running."""
        if self.session.round != self._merged:
            self._merged, chunks = self.newest
            self._trainee.merge(chunks)

    def _train(self) -> None:
        self._do("train")
        session = self.session
        seconds = self._step_s(self._outside.run_s(), session.width)
        self._events.at(self._events.now + seconds, lambda: self._finished(seconds))

    def _finished(self, seconds: float) -> None:
        """A local step is done."""
        if self.doing == "gone":
            return
        session = self.session
        session.finished(seconds, self._config.batch_size)
        self._since = self._events.now
        self._trainee.train(1, session.width)
        self._decide()

    def _synchronise(self) -> None:
        self._merge()
        session, overlap = self.session, self._config.overlap
        report = session.synchronising(self.loss)
        report.totals = self._totals()
        self._outside.to_state(self.name, report)
        result = self._trainee.push(go_on=overlap)
        self._outside.push(Push(self, session.round, session.step, session.samples, result))
        if overlap:
            round, steps = session.round, session.step
            session.pushed()
            self._row(round, steps, late=False)
            self._train()
        else:
            self._do("sync")

    # Figures

    def _do(self, what: str) -> None:
        if self.doing != "train":  # a step's own duration counts when it ends
            self._account()
        self.doing, self._since = what, self._events.now

    def _account(self) -> None:
        """Count the time since `_since` to what it was doing."""
        totals, seconds = self.session.totals, self._events.now - self._since
        if self.doing == "train":
            totals.compute_s += seconds
        elif self.doing == "query" and self.session.step and not self._was_away:
            totals.query_s += seconds
        elif self.doing == "sync" or (self.doing == "query" and self.session.round > self._first):
            totals.sync_s += seconds
        self._since = self._events.now

    def _row(self, round: int, steps: int, late: bool) -> None:
        """A line of the log for a round that is over."""
        totals = self.session.totals
        self._journal.write(
            "round",
            round=round,
            steps=steps,
            **totals.since(self._marks),
            loss=self.loss,
            late=late,
        )
        self._marks = copy(totals)
