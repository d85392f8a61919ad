"""The state server's message handlers: they keep the table and the history, and answer queries.

They know messages and a `send`, but no socket; `now` comes from the clock they are given. They run only in the
router's task.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from esync import messages, transport
from esync.algorithms import algorithm
from esync.config import RunConfig
from esync.errors import ModelError, TransportError
from esync.fault_log import FaultLog
from esync.journal import Journal
from esync.limits import MAX_PEERS, Standing
from esync.messages import (
    Error,
    Join,
    Leave,
    Lost,
    Members,
    Message,
    MessageError,
    Query,
    Report,
    Reset,
    Response,
    Status,
    Welcome,
)
from esync.state.database import Record
from esync.state.deadline import deadline_s
from esync.state.history import (
    EVICTED,
    REPLACED,
    SPEECHLESS,
    TOTALS,
    History,
    compute_ratio,
)
from esync.state.policy import STOP, SYNC, TRAIN, Policy, policy_for, urgent
from esync.tensors import Layout
from esync.version import VERSION

log = logging.getLogger("esync.state")
LOADING_S = 60.0
"""A parameter server that is started again has at least so long to come."""
LENIENCE = 1.5
"""A worker may take so many times as long as is known for the steps that it was told to do."""
TICK_S = 0.2
"""Seconds between two looks at the time."""
LAST_VERSION_S = 3.0
"""How long a run that ends waits for the parameter servers to say which version is the last."""
GOODBYE_S = 20.0
"""How long a stopped run waits for its members to say goodbye."""
EVALUATION_S = 600.0
"""How long it waits for an evaluator that still evaluates the final model."""
LAST_LOOK_S = 2.0
"""After so long it says that it waits for an evaluator."""
PROGRESS_S = 10.0
"""Seconds between two lines of progress."""
SUSPICION = 1.5
"""Heartbeats that have to be missing for a worker whose connection is gone to be taken for dead."""
WATCHING_S = 2.0
"""Who asked for the table within so long is told that the run ends."""
WATCHERS, LOOK_S = 64, 0.1
"""So many may watch the table at a time. Who asks again within so long is answered at the next look at the time: it is
much to send for a small question."""
LAYOUTS = 4
"""Different models that workers may wait with: all but one of them will be refused."""
RANKS = 100_000
"""Workers whose ranks are kept for when they come back, those that came last."""
MAX_NAME, MAX_WORD = 200, 64
"""Longest name of a host or device, or reason for leaving, in characters, and of a phase or a life; a person is given
the beginning of what is longer."""
MAX_ENDPOINTS = 16
"""Entries in what a parameter server says of how it is reached."""
WAITING_S = 10.0
"""Who waits to be welcomed and does not ask again for so long is forgotten."""
SERVER_SILENCE_S, SERVER_GONE_S = 5.0, 2.5
"""A parameter server reports every second; it is not missed sooner than after so long. If its connection is gone it is,
and another process of its name has its place sooner in any case."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Local event: look at the time. It comes `late_s` late if this process was held up: in that time nobody
    could be heard."""

    late_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StopRun:
    """Local event: end the run."""

    reason: str


@dataclass(slots=True)
class Waiting:
    """Who waits to be welcomed."""

    join: Join
    peer: bytes
    heard: float  # when it last asked

    @property
    def worker(self) -> str:
        return self.join.worker


@dataclass(slots=True)
class Server:
    """A parameter server that joined."""

    worker: str
    peer: bytes
    life: str
    shard: int  # of the model, that it keeps
    endpoints: dict[str, Any]
    heard: float
    epoch: int = -1  # of the members that it goes by
    lost_at: float | None = None  # since when it is silent
    back: bool = False  # it is another life: its first version may be an older one
    version: int = -1  # that it has published
    bytes_up: int = 0
    bytes_down: int = 0


class Handlers:
    """The state server's whole behaviour.

    Args:
        config: the run's configuration.
        send: hands a message for a peer to the sender.
        clock: monotonic seconds.
        on_stop: called once, when the run stops.
        finished: called once, when everybody has left a stopped run.
        run_key: told to everybody who is welcomed.
        max_peers: ids that may be in the run; some are kept free for the parameter servers.
        reaches: whether a peer has a connection.
    """

    def __init__(
        self,
        config: RunConfig,
        send: Callable[[bytes, Message], None],
        clock: Callable[[], float],
        *,
        journal: Journal | None = None,
        say: Callable[[str], None] = log.info,
        on_stop: Callable[[], object] = lambda: None,
        finished: Callable[[], None] = lambda: None,
        policy: Policy | None = None,
        run_key: bytes = b"",
        max_peers: int = MAX_PEERS,
        reaches: Callable[[bytes], bool] = lambda peer: True,
    ) -> None:
        self.config = config
        self._max_peers = max_peers
        self._reaches = reaches
        self._run_key = run_key
        self.policy = policy or policy_for(config)
        self.table = self.policy.table()
        self.history = History()
        self.started: float | None = None
        self._standstill_s: float | None = None  # the run's time, until somebody trains again
        self.stopped: str | None = None
        self.servers: dict[str, Server] = {}
        self._departed: list[Server] = []  # from a run that had begun
        self._told: dict[int, dict[str, Any]] = {}  # shard -> the endpoints that workers know
        self.layout: Layout | None = None
        self._send = send
        self._clock = clock
        self._journal = journal or Journal(None, "state")
        self._say = say
        self._on_stop = on_stop
        self._finished = finished
        self._waiting: dict[str, Waiting] = {}
        self._waiting_layouts: dict[str, dict[str, Any]] = {}  # theirs: digest -> layout
        self._at_gate: dict[str, Query] = {}
        self._held: dict[str, Query] = {}
        self._drawn: set[str] | None = None  # who takes part in this round; None: everybody
        self._first: list[str] = []  # who is to be sent a new version before the others
        self._ranks: dict[str, int] = {}
        self._epoch = 0
        self._round_at = 0.0  # when the version that is trained from was published
        self._excused_at = 0.0  # until when members could not arrive, whatever they did
        self._stopped_at = 0.0
        self._restored_at = 0.0
        self._last: int | None = None  # the version after which none is made
        self._end_told: int | None = None  # to the workers: which version is the last
        self._last_waiting = ""
        self._last_look_said = False
        self.faults = FaultLog(log)
        self._watching: dict[bytes, float] = {}  # who asked for the table, and when it was answered
        self._impatient: set[bytes] = (
            set()
        )  # of these, who asked again so soon that the answer has to wait
        self._ended = False
        self._progress_said_at = 0.0

    def table_of_handlers(self) -> dict[type, Callable[[bytes, Any], None]]:
        """Message type -> handler: what the router calls."""
        return {
            Join: self.on_join,
            Query: self.on_query,
            Report: self.on_report,
            Reset: self.on_reset,
            Lost: self.on_lost,
            Members: self.on_members,
            Leave: self.on_leave,
            Status: self.on_status,
            Error: self.on_error,
            Tick: self.on_tick,
            StopRun: self.on_stop_run,
        }

    def saved(self) -> dict[str, Any]:
        """What another life of the state server needs to go on with this run."""
        return {
            "elapsed_s": None if self.started is None else self.elapsed_s,
            "ranks": self._ranks,
            "history": self.history.saved(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `saved` returned.

        Raises:
            KeyError, TypeError, ValueError: it did not.
        """
        self._ranks = {str(worker): int(rank) for worker, rank in saved["ranks"].items()}
        elapsed_s = saved["elapsed_s"]
        self.history.restore(saved["history"], elapsed_s or 0.0)
        if elapsed_s is not None:
            self._restored_at = self._clock()
            self.started = self._restored_at - float(elapsed_s)
            self._standstill_s = float(elapsed_s)
            self._say(
                f"going on with the run at version {self.history.version}, after {elapsed_s:.0f} s of it"
            )
        self._journal.write("resumed", round=self.history.version)

    def standing(self, peer: bytes) -> Standing:
        """What a peer is to this server."""
        name = messages.worker_of(peer)
        record, server = self.table.records.get(name), self.servers.get(name)
        if record is not None and record.peer == peer:
            return Standing.MEMBER
        known = server is not None and server.peer == peer
        return Standing.SERVER if known else Standing.STRANGER

    # Joining

    def on_join(self, peer: bytes, message: Join) -> None:
        _check_identity(peer, message.worker)
        messages.check_worker_id(message.worker)
        _check_texts(message)
        if message.role not in ("worker", "evaluator", "ps"):
            raise MessageError(
                "bad-role", f"a role is worker, evaluator or ps, not {message.role!r}"
            )
        if message.version != VERSION:
            text = f"runs esync {message.version:.40}, here {VERSION}"
            self.faults.say(message.worker, "version", text)
        if self.stopped is not None and message.worker not in self.table.records:
            raise MessageError("run-over", f"the run is over ({self.stopped})")
        life = peer.partition(b"\0")[2].decode("utf-8", "replace")
        if life and life != message.life:
            raise MessageError(
                "wrong-id", f"join.life is {message.life!r}, and the sender's {life!r:.80}"
            )
        if message.role == "ps":
            self._ps_joins(peer, message)
            return
        self._check_room(message.worker)
        waiting, now = self._waiting.get(message.worker), self._clock()
        if waiting is not None and waiting.join.life != message.life:
            self._check_gone(message.role, waiting, now - waiting.heard, SERVER_GONE_S)
        if message.layout is None or not self._served():
            self._wait_for_servers(peer, message)
        else:
            self._take_part(peer, message, message.layout)

    def _wait_for_servers(self, peer: bytes, message: Join) -> None:
        """Have a worker wait until the parameter servers are there; of the workers' layouts each is kept once."""
        if message.layout is not None:
            layout = self._layout_of(message.layout)
            if len(self._waiting_layouts) >= LAYOUTS:
                self._forget_layouts(message.worker)
            kept = self._waiting_layouts
            if layout.digest not in kept and len(kept) >= LAYOUTS:
                raise MessageError(
                    "layout-mismatch",
                    f"the model of {message.worker} is not the one of those that wait for the parameter server; start "
                    "every worker with the same model code and configuration",
                )
            message.layout = kept.setdefault(layout.digest, layout.to_wire())
        self._waiting[message.worker] = Waiting(message, peer, self._clock())
        if self._served():
            self._welcome_waiting()
        else:
            self._send(peer, Status(waiting_for=self.waiting_for()))

    def _layout_of(self, raw: dict[str, Any]) -> Layout:
        try:
            return self.config.cut(Layout.from_wire(raw))
        except ModelError as error:
            raise MessageError("bad-layout", str(error)) from error

    def _check_room(self, worker: str) -> None:
        """Raise MessageError if there is no room for one more."""
        if worker in self.table.records or worker in self._waiting:
            return
        most = self._max_peers - self.config.ps
        if len(self.table.records.keys() | self._waiting.keys()) >= most:
            raise MessageError(
                "full",
                f"{most} workers and evaluators are in this run, and it takes no more; raise max_peers in [state] "
                "if they are all yours",
            )

    def _ps_joins(self, peer: bytes, message: Join) -> None:
        endpoints = message.endpoints or {}
        if not all(isinstance(endpoints.get(key), str) for key in ("push", "model")):
            raise MessageError("bad-field", "join of a ps: endpoints need push and model")
        try:
            for key in ("push", "model"):
                transport.check_reachable(endpoints[key])
        except TransportError as error:
            raise MessageError("bad-field", f"join of a ps: {error}") from error
        if len(endpoints) > MAX_ENDPOINTS or any(
            isinstance(value, (dict, list)) for value in endpoints.values()
        ):  # every worker is told them
            raise MessageError(
                "bad-field",
                f"join of a ps: endpoints are at most {MAX_ENDPOINTS} texts and numbers",
            )
        now = self._clock()
        known = self.servers.get(message.worker)
        if known is not None and known.life != message.life:
            self._check_gone("parameter server", known, now - known.heard, SERVER_GONE_S)
        if known is None and self._served():
            known = self._replaced()
        if known is None and self._served():
            one = (
                "a parameter server"
                if self.config.ps == 1
                else f"{self.config.ps} parameter servers"
            )
            raise MessageError("second-ps", f"this run has {one} already")
        if known is None:
            self._say(f"parameter server {message.worker} joined from {message.host}")
            shard = self._shard_for(message.rank)
        else:
            shard = known.shard
            if self.started is not None and known.life != message.life:  # else it asks once more
                self._say(f"parameter server {message.worker} is back, from {message.host}")
        server = Server(message.worker, peer, message.life, shard, endpoints, now)
        server.back = known is not None or self.history.version > 0
        self.servers[message.worker] = server
        self._send(peer, self._welcome(shard))
        self._announce_members()
        told, self._told[shard] = self._told.get(shard, endpoints), endpoints
        if told != endpoints and self._served():
            for record in self.table.records.values():  # it listens elsewhere now
                self._send(record.peer, self._welcome(record.rank))
        self._welcome_waiting()

    def _replaced(self) -> Server | None:
        """A parameter server that has been lost and is to be replaced, if there is one; it is forgotten."""
        for server in self.servers.values():
            if server.lost_at is not None or not self._reaches(server.peer):
                return self.servers.pop(server.worker)
        return None

    def _served(self) -> bool:
        """Whether all shards of the model have their server."""
        return len(self.servers) == self.config.ps

    def _shard_for(self, wanted: int | None) -> int:
        """The shard asked for, if it is free, else the lowest free one."""
        taken = {server.shard for server in self.servers.values()}
        free = [shard for shard in range(self.config.ps) if shard not in taken]
        return wanted if wanted in free else free[0]

    def _welcome_waiting(self) -> None:
        if not self._served():
            for one in self._waiting.values():
                self._send(one.peer, Status(waiting_for=self.waiting_for()))
            return
        waiting, self._waiting = self._waiting, {}
        self._waiting_layouts = {}
        for one in waiting.values():
            message, peer = one.join, one.peer
            try:
                if message.layout is not None:
                    self._take_part(peer, message, message.layout)
                    continue
                record = self._register(peer, message)
            except MessageError as error:
                self._send(peer, Error(error.code, error.text))
                continue
            self._send(peer, self._welcome(record.rank))

    def _welcome(self, rank: int) -> Welcome:
        servers = sorted(self.servers.values(), key=lambda server: server.shard)
        return Welcome(
            rank,
            self.config.workers,
            self.config.to_wire(),
            [server.endpoints for server in servers],
            self.config.heartbeat_s,
            key=self._run_key,
        )

    def _register(self, peer: bytes, message: Join) -> Record:
        now = self._clock()
        record = self.table.records.get(message.worker)
        if record is not None and record.life != message.life:
            self._check_gone(record.role, record, now - record.heard, self.config.heartbeat_s / 2)
            self._remove(message.worker, REPLACED)
            record = None  # nobody waits for it while it loads
        if record is not None:
            record.heard, record.peer = now, peer
            return record
        evaluator = message.role == "evaluator"
        if algorithm(self.config.mode).single and not evaluator:
            others = [r for r in self.table.records.values() if r.role == "worker"]
            if others:
                raise MessageError(
                    "run-full",
                    f"mode {self.config.mode} trains on one worker, and {others[0].worker} is it",
                )
        rank = -1 if evaluator else self._rank_for(message)
        record = self.table.add(
            message.worker,
            rank,
            now,
            role=message.role,
            host=message.host,
            device=message.device,
            peer=peer,
            life=message.life,
        )
        self.history.joined(record, self.run_s(now))
        self._journal.write("join", worker=message.worker, kind=message.role, rank=rank)
        self._say(f"{message.role} {message.worker} joined ({message.device or 'no device'})")
        return record

    def _check_gone(
        self, what: str, one: Record | Server | Waiting, silent_s: float, enough_s: float
    ) -> None:
        """Raise MessageError if the process that has a name seems to live: it has a connection, and is not silent."""
        if silent_s < enough_s and self._reaches(one.peer):
            raise MessageError(
                "name-taken",
                f"a {what} named {one.worker!r} was heard {silent_s:.1f} s ago; choose another --name, or, if that one "
                "was killed, try again in a few seconds",
            )

    def _rank_for(self, message: Join) -> int:
        """The rank asked for or had before, if it is free, else the lowest free one."""
        taken = {r.rank for r in self.table.records.values()}
        for rank in (message.rank, self._ranks.get(message.worker)):
            if rank is not None and rank >= 0 and rank not in taken:
                break
        else:
            rank = next(n for n in range(len(taken) + 1) if n not in taken)
        self._ranks.pop(message.worker, None)
        self._ranks[message.worker] = rank
        if len(self._ranks) > RANKS:
            del self._ranks[next(iter(self._ranks))]
        return rank

    def _take_part(self, peer: bytes, message: Join, raw: dict[str, Any]) -> None:
        layout = self._layout_of(raw)
        if self.layout is None:
            self.layout = layout
            self._announce_members()
        elif layout.digest != self.layout.digest:
            raise MessageError(
                "layout-mismatch",
                f"the model of {message.worker} is not the run's model: "
                f"{layout.difference(self.layout)} (digests {layout.digest} and {self.layout.digest}). "
                "Start every worker with the same model code and configuration",
            )
        record = self._register(peer, message)
        self._send(peer, self._welcome(record.rank))

    # Training

    def on_query(self, peer: bytes, message: Query) -> None:
        if self._waits(peer, message.worker):
            return
        record = self._record(peer, message.worker)
        now = self._clock()
        if message.ahead > 1:
            raise MessageError("bad-field", "query.ahead: expected 0 or 1")
        record.phase = TRAIN
        if message.loss is not None:
            record.loss = message.loss
        self.table.progress(
            record, message.round, message.step, message.compute_s, now, message.running_s
        )
        if self.stopped is not None:
            self._tell_end(record)
        elif self.started is None or self._standstill_s is not None or not record.active:
            self._wait_at_gate(record, message, now)
        else:
            self._answer(peer, record, message, now)

    def _answer(self, peer: bytes, record: Record, message: Query, now: float) -> None:
        decision = None
        if self._takes_part(record, message.round) and not self._paused():
            decision = self.policy.decide(self.table, record, message.ahead, now)
        if decision is None:
            record.phase = "held"
            self._held[record.worker] = message
            return
        if self._held.pop(record.worker, None) is not None:
            record.since = record.freed = now  # it begins only now
        record.phase = TRAIN
        action, lease, width = decision.action, decision.lease, decision.width
        record.leave = message.step + lease
        self._send(peer, Response(message.round, message.step, action, lease, width))

    def _takes_part(self, record: Record, round: int) -> bool:
        """Whether the worker may train in this round, and the parameter server waits for it."""
        if self._drawn is None:
            return True
        agreed = all(server.epoch == self._epoch for server in self.servers.values())
        return record.worker in self._drawn and round == self.history.version and agreed

    def _paused(self) -> bool:
        """Whether too few workers are left to go on."""
        return self.started is not None and len(self.table.active()) < self.config.min_workers

    def _release(self, now: float) -> None:
        """Somebody arrived or left: whoever has to wait may go on now."""
        for worker, query in list(self._held.items()):
            record = self.table.records.get(worker)
            if record is None:
                del self._held[worker]
            else:
                self._answer(record.peer, record, query, now)

    def _draw(self) -> None:
        """Decide who takes part in the round that begins."""
        before, drawn = self._drawn, self.policy.participants(self.table, self.history.version)
        self._drawn = None if drawn is None else {record.worker for record in drawn}
        if drawn is not None or before is not None:
            self._announce_members()

    def _wait_at_gate(self, record: Record, message: Query, now: float) -> None:
        """A worker's first query: it has the model. The run starts when enough workers are here."""
        if record.role != "worker":
            raise MessageError("bad-role", f"a {record.role} does not train")
        if not record.active:
            self.table.activate(record, now)
            self._members_changed()
        self._at_gate[record.worker] = message
        if self.started is None:
            record.phase = "waiting"
            if text := self.waiting_for():
                self._send(record.peer, Status(waiting_for=text))
            self._start_if_ready(now)
        elif self._goes_on(now):
            self._open_gate(now)
            self._release(now)

    def on_members(self, peer: bytes, message: Members) -> None:
        """The parameter server goes by this epoch's members."""
        server = self._server(peer, messages.worker_of(peer))
        if server is not None:
            server.epoch = message.epoch
        self._tell_end_if_agreed()
        now = self._clock()
        self._start_if_ready(now)
        self._release(now)

    def on_lost(self, peer: bytes, message: Lost) -> None:
        """A worker's connection to a parameter server is gone; the next look at the time tells whether it is too."""
        record = self.table.records.get(message.peer)
        if self._server(peer, message.worker) is not None and record is not None:
            record.suspected = self._clock()

    def _start_if_ready(self, now: float) -> None:
        """Start once enough workers are here, and the parameter server will wait for each of them."""
        if self.started is not None or len(self.table.active()) < self.config.workers:
            return
        if (
            self.stopped is None
            and self._served()
            and all(s.epoch == self._epoch for s in self.servers.values())
        ):
            self._start(now)
            self._draw()
            self._open_gate(now)

    def _open_gate(self, now: float) -> None:
        waiting, self._at_gate = self._at_gate, {}
        for worker, query in waiting.items():
            waiter = self.table.records.get(worker)
            if waiter is not None:
                waiter.since = now
                waiter.phase = TRAIN
                self._answer(waiter.peer, waiter, query, now)

    def _start(self, now: float) -> None:
        self.started = self._round_at = now
        for passage in self.history.passages:
            passage.joined_s = 0.0
        self._journal.write("start", workers=[r.worker for r in self.table.active()])
        count = len(self.table.active())
        self._say(f"the run starts with {count} worker{'s' if count > 1 else ''}")

    def _goes_on(self, now: float) -> bool:
        """Whether the clock of a run that was gone on with runs again: when as many workers are back as it began with,
        or some are and nobody else has come for a heartbeat's time."""
        if self._standstill_s is None:
            return True
        active = self.table.active()
        last = max((record.active_at for record in active), default=now)
        if len(active) < self.config.workers and now - last < self.config.heartbeat_s:
            return False
        self._journal.write("goes_on", run_s=round(self._standstill_s, 4))
        self.started, self._standstill_s, self._excused_at = now - self._standstill_s, None, now
        return True

    def on_report(self, peer: bytes, message: Report) -> None:
        now = self._clock()
        server = self.servers.get(message.worker)
        if server is not None and server.peer == peer:
            server.heard, server.lost_at = now, None
            if server.epoch != self._epoch:  # lost on the way
                self._send_members(server)
            if message.round > server.version:  # so was a reset
                self._published(server, message.round, {}, now)
            return
        if self._waits(peer, message.worker):
            return
        record = self._record(peer, message.worker)
        record.heard = now
        record.phase = _line(message.phase, MAX_WORD)
        if message.loss is not None:
            record.loss = message.loss
        if message.totals is not None:
            self._store_totals(record, message.totals)
        if message.phase == "eval" and message.accuracy is not None:
            self._evaluated(message, message.accuracy, now)
        elif message.phase == SYNC and message.round >= record.round:
            slowest, behind = self.table.slowest(), self.table.behind() if self._held else 0
            began = self._began(record)
            self.table.progress(record, message.round, message.step, message.compute_s, now)
            record.arrived = True
            if record.finished[0] != message.round:  # heartbeats say `sync` too
                record.finished = (message.round, now)
                current = not algorithm(self.config.mode).barrier
                current = current or message.round == self.history.version
                if (
                    current and began > self._excused_at and not self._paused()
                ):  # else it is no habit
                    record.arrivals.append(now - began)
                record.clock += 1
            if record is slowest or record is self.table.slowest():
                for other in self.policy.hurry(self.table, record, now):
                    response = Response(other.round, other.step, SYNC, 0, other.width)
                    self._send(other.peer, response)
            if self._held and self.table.behind() > behind:
                self._release(now)
        if self.stopped is not None:
            self._tell_end(record)

    def _store_totals(self, record: Record, totals: dict[str, Any]) -> None:
        for key in TOTALS:
            value = totals.get(key)
            if isinstance(value, (int, float)) and 0 <= value < 1e15:
                record.totals[key] = value
        digest = totals.get("split_digest")
        if isinstance(digest, str):
            self.history.split_digest = digest[:64]

    def _evaluated(self, message: Report, accuracy: float, now: float) -> None:
        self.history.evaluated(message.round, accuracy, message.loss, self.run_s(now))
        at = self.history.version_s.get(message.round)
        self._journal.write(
            "accuracy", round=message.round, accuracy=accuracy, loss=message.loss, run_s=at
        )
        target = self.config.target_accuracy
        if target and accuracy >= target and self.stopped is None:
            self.stop(f"test accuracy {accuracy:.4f} reached the target")

    def on_reset(self, peer: bytes, message: Reset) -> None:
        server = self._server(peer, message.worker)
        if server is None and self.stopped is not None:
            return  # it has said goodbye, and this was still on its way out
        if server is None:
            raise MessageError("unknown-worker", f"{message.worker} has not joined; join first")
        now = server.heard = self._clock()
        server.bytes_up, server.bytes_down = message.bytes_up, message.bytes_down
        self._published(server, message.round, message.members, now)

    def _published(self, server: Server, version: int, members: dict[str, Any], now: float) -> None:
        """A parameter server has published its shard of a version. The last one to do so makes it whole."""
        servers = [*self.servers.values(), *self._departed]
        before, server.version = server.version, max(server.version, version)
        if 0 < self.config.rounds <= version and not algorithm(self.config.mode).barrier:
            self._ends_with(server)
        if self._last is not None and server.version > self._last:  # the others come to it, too
            self._last = server.version
            self._announce_members()
        version = min(other.version for other in servers)
        if len(servers) < self.config.ps or version < server.version or server.version == before:
            return
        if server.back:
            server.back = False
            self._excused_at = now  # nobody could begin while it was away
            if version <= self.history.version:  # else its first word is of the next version
                self._roll_back(server, version)
        newer = version > self.history.version
        bytes_up, bytes_down = sum(s.bytes_up for s in servers), sum(s.bytes_down for s in servers)
        if not all(s.bytes_up or s.bytes_down for s in servers):  # one that came back has not said
            bytes_up, bytes_down = self.history.bytes_up, self.history.bytes_down
        self.history.published(version, self.run_s(now), bytes_up, bytes_down)
        for worker, early_s in members.items():
            record = self.table.records.get(worker)
            if record is None or not isinstance(early_s, (int, float)):
                continue
            round, at = record.finished
            if self.policy.measures_delivery and round == version - 1:
                self.table.delivered(record, now - early_s - at)
        self._journal.write("round", round=version, members=list(members))
        self._tell_end_if_agreed()
        if self.config.rounds and version >= self.config.rounds and self.stopped is None:
            self.stop(f"{version} rounds")
        goes_on = self.started is not None and self._standstill_s is None and self.stopped is None
        if newer and goes_on:
            self._round_at = now
            self._draw()
            if algorithm(self.config.mode).barrier:  # else a version is no round
                self._release(now)
            if self.config.slowest_first and urgent(self.table) != self._first:
                self._announce_members()

    def _ends_with(self, server: Server) -> None:
        """One of several parameter servers has counted all updates that it takes: without a barrier the others may
        never have as many, if a worker died between two of them."""
        if self.config.ps > 1 and self.stopped is None:
            self.stop(f"{server.version} rounds")

    def _roll_back(self, server: Server, version: int) -> None:
        """A parameter server goes on from an older version: the rounds since then are done again."""
        lost = self.history.version - version
        if lost > 0:
            again = (
                f"rounds {version + 1} to {self.history.version} are"
                if lost > 1
                else "one round is"
            )
            self._say(f"{server.worker} goes on from version {version}: {again} done again")
        self._journal.write("rolled_back", round=version, lost=max(0, lost))
        self.history.roll_back(version)

    # Leaving and ending

    def on_leave(self, peer: bytes, message: Leave) -> None:
        worker, reason = message.worker, _line(message.reason, MAX_NAME)
        if self._server(peer, worker) is not None:
            self._server_gone(worker, reason or "no reason given")
        if _speaks_for(peer, self._waiting.get(worker)):
            del self._waiting[worker]
        if _speaks_for(peer, self.table.records.get(worker)):
            self._remove(worker, reason or "left")
        self._end_when_alone()

    def _server_gone(self, worker: str, why: str) -> None:
        """The model goes with it: a run that has begun is over."""
        server = self.servers.pop(worker)
        self._say(f"parameter server {worker} left: {why}")
        if self.started is not None:
            self._departed.append(server)  # the others' last versions are still on their way
            self.stop(f"the parameter server left: {why}")
            self._tell_end_if_agreed()

    def _look_for_late(self, now: float) -> None:
        """Let the others go on without whoever they wait for, at a barrier or held, and who is far beyond its habit.

        Where the policy plans for the slowest, habits change all at once when somebody else is that. So there is more
        to it: they have waited, and it has not spoken of a step, for longer than the steps take that it still was to
        do, and than one of those who have arrived takes, with its delivery: no other of theirs fitted into the round.
        """
        if not self.config.deadline_s:
            return
        servers = self.servers.values()
        silent = any(s.lost_at is not None or not self._reaches(s.peer) for s in servers)
        if self._paused() or silent or not self._served():
            self._excused_at = now  # it is not the members whom everybody waits for
            return
        barrier, version = algorithm(self.config.mode).barrier, self.history.version
        waiting: list[Record] = []
        rest: list[Record] = []
        if barrier:
            for record in self._members():
                (waiting if record.arrived and record.round == version else rest).append(record)
        else:
            behind = self.table.behind()
            rest = [
                r for r in self.table.active() if r.clock == behind and r.worker not in self._held
            ]
        waiting = waiting or [r for r in self.table.active() if r.worker in self._held]
        if not waiting:
            return
        floor, ceiling = self.config.deadline_floor_s, self.config.deadline_s
        waiting_since = min(r.finished[1] for r in waiting)
        fitting_s = max(floor, *(r.step_s.value + r.delivery_s.value for r in waiting))
        for record in rest:
            began = max(self._began(record), self._excused_at)
            if now - began <= deadline_s(record.arrivals, floor, ceiling):
                continue
            to_do_s = LENIENCE * max(1, record.leave - record.step) * record.step_s.value
            since = max(began, waiting_since, record.since)
            if now - since > min(ceiling, max(fitting_s, to_do_s)):
                self._suspend(record, now - began, now)

    def _began(self, record: Record) -> float:
        """When a worker's round began: everybody's, or, if it came in its middle, its own. Without a barrier that is
        when its last one ended, since synchronising is part of it, or when it was let go on."""
        if algorithm(self.config.mode).barrier:
            return max(self._round_at, record.active_at)
        return max(record.finished[1], record.active_at, record.freed)

    def _suspend(self, record: Record, waited: float, now: float) -> None:
        """Go on without a worker until it asks again."""
        usual = statistics.median(record.arrivals) if record.arrivals else 0.0
        habit = f", it usually arrives after {usual:.1f} s" if usual else ""
        self._say(
            f"{record.worker} has not arrived after {waited:.1f} s{habit}: the others go on without it"
        )
        self._journal.write("late", worker=record.worker, waited_s=round(waited, 3))
        # The time counts, or one that has become slow for good would be late in every round.
        record.arrivals.append(waited)
        record.phase = "late"
        self.table.suspend(record)
        self._members_changed()
        self._release(now)

    def _server_lost(self, server: Server, silent_s: float) -> None:
        """A parameter server is silent: the run waits for it, or for another in its place, and in the end gives up."""
        if self.started is None or silent_s > self.config.ps_wait_s or self.stopped is not None:
            self._server_gone(server.worker, "it was silent for too long")
        elif server.lost_at is None:
            server.lost_at = server.heard
            self._say(
                f"parameter server {server.worker} is silent; the run waits for it, "
                f"up to {self.config.ps_wait_s:g} s"
            )

    def _give_up_servers(self, now: float) -> None:
        """A run that is to be gone on with waits for its parameter servers as one does that has lost them."""
        patience_s = max(self.config.ps_wait_s, LOADING_S)
        if self.stopped is None and now - self._restored_at > patience_s:
            self.stop(f"{self.waiting_for()} did not come back: waited {patience_s:g} s")

    def _remove(self, worker: str, reason: str) -> None:
        record = self.table.remove(worker)
        self._at_gate.pop(worker, None)
        if record is None:
            return
        now = self._clock()
        self.history.left(record, self.run_s(now), reason)
        self._journal.write("leave", worker=worker, reason=reason)
        if self.stopped is None:
            self._say(f"{record.role} {worker} left: {reason}")
        if self.started is None and not self.table.records:
            self.layout = None  # nothing was trained: the next worker may bring another model
        self._held.pop(worker, None)
        if record.active and self.stopped is None:  # a stopped run publishes no more versions
            self._members_changed()
            self._release(now)

    def on_tick(self, peer: bytes, event: Tick) -> None:
        now = self._clock()
        members: list[Record | Server] = [*self.table.records.values(), *self.servers.values()]
        for member in members:
            member.heard = min(now, member.heard + event.late_s)
        for record in list(self.table.records.values()):
            if (
                now - record.heard > self.config.heartbeat_s - TICK_S
            ):  # the next look would be too late
                self._remove(record.worker, f"{EVICTED}: silent for {self.config.heartbeat_s:g} s")
            elif record.suspected is not None:
                record.suspected += event.late_s
                if record.heard > record.suspected:
                    record.suspected = None
                elif now - record.suspected > SUSPICION * transport.beat_s(self.config.heartbeat_s):
                    self._remove(record.worker, f"{EVICTED}: its connection is gone")
        for server in list(self.servers.values()):
            silent_s = now - server.heard
            goes_on = self.started is not None and self.stopped is None
            if silent_s > max(self.config.heartbeat_s, SERVER_SILENCE_S) or (
                goes_on and silent_s > SERVER_GONE_S and not self._reaches(server.peer)
            ):
                self._server_lost(server, silent_s)
        impatient, self._impatient = self._impatient, set()
        for watcher in impatient:
            self._show(watcher, now)
        self._forget_waiting(now - event.late_s)
        if event.late_s:
            self._excused_at = now
        self._restored_at += event.late_s
        if self._standstill_s is not None and not self._served():
            self._give_up_servers(now)
        if self.started is not None and self.stopped is None:
            if self._standstill_s is not None and self._at_gate and self._goes_on(now):
                self._open_gate(now)
                self._release(now)
            self._look_for_late(now)
        limit = self.config.duration_s
        if self.stopped is None:
            if limit and self.run_s(now) >= limit:
                self.stop(f"{limit:g} seconds")
            self._say_waiting()
            self._say_progress(now)
        else:
            self._see_off(now - self._stopped_at)
        self._end_when_alone()

    def _see_off(self, since_s: float) -> None:
        """The run was stopped so long ago: who has not left by now?"""
        if since_s > LAST_VERSION_S and self._end_told is None:
            self._tell_end_to_all()
        self._tell_end_if_agreed()
        if since_s > LAST_LOOK_S:
            self._say_last_look()
        for record in list(self.table.records.values()) if since_s > GOODBYE_S else ():
            # An evaluator may evaluate the last version for as long as it is heard of.
            if record.role != "evaluator" or since_s > EVALUATION_S:
                log.warning("%s never said goodbye", record.worker)
                self._remove(record.worker, SPEECHLESS)

    def _waits(self, peer: bytes, worker: str) -> bool:
        """Whether it was a member before this state server was started again, and waits for the parameter servers."""
        one = self._waiting.get(worker)
        if one is None or one.peer != peer:
            return False
        one.heard = self._clock()
        return worker not in self.table.records  # a member may ask where the servers are, too

    def _forget_waiting(self, now: float) -> None:
        """Who waits asks again every second; who does not has gone."""
        gone = [w for w, one in self._waiting.items() if now - one.heard > WAITING_S]
        for worker in gone:
            del self._waiting[worker]

    def _forget_layouts(self, but: str) -> None:
        """Keep the layouts of those that wait, but for one that comes with another."""
        wanted = {id(one.join.layout) for w, one in self._waiting.items() if w != but}
        kept = self._waiting_layouts.items()
        self._waiting_layouts = {digest: x for digest, x in kept if id(x) in wanted}

    def _say_last_look(self) -> None:
        """What a run that has ended still waits for."""
        evaluators = [r.worker for r in self.table.records.values() if r.role == "evaluator"]
        if evaluators and not self._last_look_said:
            self._last_look_said = True
            self._say(
                f"waiting for {', '.join(evaluators)} to evaluate the last version, at most "
                f"{EVALUATION_S / 60:.0f} minutes; Ctrl-C does without"
            )

    def _say_waiting(self) -> None:
        text = self.waiting_for()
        if text != self._last_waiting:
            self._last_waiting = text
            if text:
                self._say(f"waiting for {text}")
                for worker in self._at_gate:
                    self._send(self.table.records[worker].peer, Status(waiting_for=text))

    def _say_progress(self, now: float) -> None:
        if self.started is None or self._standstill_s is not None:
            return
        if now - max(self.started, self._progress_said_at) < PROGRESS_S:
            return
        self._progress_said_at = now
        latest = self.history.accuracy[-1:]
        accuracy = f", accuracy {latest[0]['accuracy']:.4f}" if latest else ""
        count = len(self.table.active())
        self._say(
            f"{self.run_s(now):.0f} s: round {self.history.version}, "
            f"{count} worker{'s' if count != 1 else ''}{accuracy}"
        )

    @property
    def waits(self) -> bool:
        """Whether something kept the run from going on when that was last looked at; from any thread."""
        return bool(self._last_waiting)

    def waiting_for(self) -> str:
        """What keeps the run from going on, in words; empty if nothing does."""
        if self.stopped is not None:
            return ""
        if not self._served():
            lacking = self.config.ps - len(self.servers)
            if self.config.ps == 1:
                return "the parameter server"
            return f"{lacking} more parameter server{'s' if lacking > 1 else ''}"
        missing = self.config.workers - len(self.table.active())
        if (self.started is None or self._standstill_s is not None) and missing > 0:
            return f"{missing} more worker{'s' if missing > 1 else ''}"
        lost = [server.worker for server in self.servers.values() if server.lost_at is not None]
        if lost:
            return f"the parameter server {lost[0]}, which is silent"
        if self.started is not None and not self.table.active():
            return "a worker: none is left"
        if self._paused():
            few = self.config.min_workers - len(self.table.active())
            return f"{few} more worker{'s' if few > 1 else ''}: too few are left"
        return ""

    def on_stop_run(self, peer: bytes, event: StopRun) -> None:
        """Somebody ends the run; if it has ended, the wait for its last evaluation."""
        if self.stopped is None:
            self.stop(event.reason)
        else:
            self._do_without_evaluators(event.reason)

    @property
    def evaluates(self) -> bool:
        """Whether the run has ended, but for its last evaluation."""
        return self.stopped is not None and any(
            record.role == "evaluator" for record in self.table.records.values()
        )

    def stop(self, reason: str) -> None:
        """End the run: the parameter servers make no more versions, every worker and evaluator is told which one is the
        last, they leave, and the parameter servers go."""
        if self.stopped is not None:
            return
        self.stopped = reason
        self._stopped_at = self._clock()
        self._held.clear()
        self._on_stop()
        self._journal.write("stop", reason=reason, round=self.history.version)
        self._say(f"the run ends: {reason}")
        servers = [*self.servers.values(), *self._departed]
        self._last = max([self.history.version, *(server.version for server in servers)])
        if self.started is not None:
            self._announce_members()
        self._tell_end_if_agreed()
        for one in self._waiting.values():
            self._send(one.peer, Error("run-over", f"the run is over ({reason})"))
        last = max(self._watching.values(), default=0.0)
        for peer, asked in self._watching.items():  # this server may be gone before they ask again
            if last - asked < WATCHING_S:
                self._send(peer, Status(table=self.status()))
        self._end_when_alone()

    def _do_without_evaluators(self, why: str) -> None:
        """A run that has ended does not wait for the last evaluation any more."""
        if self._end_told is None:
            return  # they do not know yet that it has ended
        for record in list(self.table.records.values()):
            if record.role == "evaluator":
                self._say(f"{record.worker} is not waited for: {why}")
                self._remove(record.worker, why)
        self._end_when_alone()

    def _tell_end_if_agreed(self) -> None:
        """Tell everybody that the run has ended, once it is known with which version: what was on its way when it was
        stopped may have made another one. After a whole version more they are told again."""
        servers = self.servers.values()
        agreed = all(s.epoch == self._epoch or not self._reaches(s.peer) for s in servers)
        whole = not algorithm(self.config.mode).barrier or len({s.version for s in servers}) <= 1
        told = self._end_told == self.history.version
        if self.stopped is not None and not told and (self.started is None or (agreed and whole)):
            self._tell_end_to_all()

    def _tell_end_to_all(self) -> None:
        self._end_told = self.history.version
        for record in self.table.records.values():
            self._tell_end(record)

    def _tell_end(self, record: Record) -> None:
        if self._end_told is not None:
            self._send(record.peer, Response(self._end_told, record.step, STOP))

    def _end_when_alone(self) -> None:
        if self.stopped is None or self.table.records:
            return
        if self.servers:
            for server in self.servers.values():
                self._send(server.peer, Leave(server.worker, self.stopped))
        elif not self._ended:
            self._ended = True
            self._finished()

    def _announce_members(self) -> None:
        self._epoch += 1
        if self.config.slowest_first:
            self._first = urgent(self.table)
        for server in self.servers.values():
            self._send_members(server)

    def _members_changed(self) -> None:
        """Somebody came or left; a round that nobody takes part in any more is drawn again."""
        if self._drawn is not None and not self._members():
            self._excused_at = self._clock()  # they begin now
            self._draw()
        else:
            self._announce_members()

    def _members(self) -> list[Record]:
        """Whom the barrier waits for."""
        active = self.table.active()
        return [r for r in active if self._drawn is None or r.worker in self._drawn]

    def _send_members(self, server: Server) -> None:
        workers: dict[str, Any] = {r.worker: r.rank for r in self._members()}
        layout = self.layout.to_wire() if self.layout else None
        members = Members(self._epoch, workers, layout, list(self._first), self._last)
        self._send(server.peer, members)

    # Looking

    def on_status(self, peer: bytes, message: Status) -> None:
        now = self._clock()
        asked = self._watching.get(peer)
        if asked is not None and now - asked < LOOK_S:
            self._impatient.add(peer)
            return
        if asked is None and len(self._watching) >= WATCHERS:
            self._watching = {p: t for p, t in self._watching.items() if now - t < WATCHING_S}
            if len(self._watching) >= WATCHERS:
                text = f"{WATCHERS} others watch this run, and no more are shown it"
                raise MessageError("too-many", text)
        self._show(peer, now)

    def _show(self, peer: bytes, now: float) -> None:
        self._watching[peer] = now
        self._send(peer, Status(table=self.status(), waiting_for=self.waiting_for()))

    def on_error(self, peer: bytes, message: Error) -> None:
        text = f"reports an error: {message.code}: {message.text}"
        self.faults.say(peer, "reported", text[:MAX_NAME])  # codes can be made up

    def status(self) -> dict[str, Any]:
        """The live table, for people."""
        latest = self.history.accuracy[-1] if self.history.accuracy else {}
        return {
            "mode": self.config.mode,
            "model": self.config.model,
            "dataset": self.config.dataset,
            "round": self.history.version,
            "rounds": self.config.rounds,
            "elapsed_s": self.elapsed_s,
            "duration_s": self.config.duration_s,
            "target_accuracy": self.config.target_accuracy,
            "started": self.started is not None,
            "stopped": self.stopped,
            "accuracy": latest.get("accuracy"),
            "accuracy_round": latest.get("round"),
            "loss": latest.get("loss"),
            "steps": self.history.total("steps"),
            "workers": [
                {
                    "worker": r.worker,
                    "rank": r.rank,
                    "role": r.role,
                    "device": r.device,
                    "round": r.round,
                    "step": r.step,
                    "phase": r.phase,
                    "step_s": r.step_s.value,
                    "loss": r.loss,
                    "samples": r.totals.get("samples", 0),
                    "steps": r.totals.get("steps", 0),
                    "compute_ratio": compute_ratio(r.totals),
                }
                for r in sorted(
                    self.table.records.values(), key=lambda r: (r.role != "worker", r.rank)
                )
            ],
        }

    def summary(self) -> dict[str, Any]:
        """The summary of the run so far, or of the whole if it has ended."""
        return self.history.summary(self.config, self.elapsed_s, self.stopped or "")

    @property
    def elapsed_s(self) -> float:
        """How long the run has taken, up to its end."""
        return self.run_s(self._clock() if self.stopped is None else self._stopped_at)

    def run_s(self, now: float) -> float:
        """The run's own time, in seconds since its start."""
        if self._standstill_s is not None:
            return self._standstill_s
        return 0.0 if self.started is None else now - self.started

    def _record(self, peer: bytes, worker: str) -> Record:
        """The sender's record; MessageError if it is not a member, or another process has its name by now."""
        record = self.table.records.get(worker)
        if record is not None and record.peer == peer:
            return record
        _check_identity(peer, worker)
        raise MessageError("unknown-worker", f"{worker} is not a member of this run; join first")

    def _server(self, peer: bytes, worker: str) -> Server | None:
        """The sender, if it is a parameter server of this run; MessageError if it speaks for another."""
        server = self.servers.get(worker)
        if server is not None and server.peer == peer:
            return server
        _check_identity(peer, worker)
        return None


def _check_texts(message: Join) -> None:
    """Make a line of what people read, and refuse what cannot be cut."""
    message.host, message.device = _line(message.host, MAX_NAME), _line(message.device, MAX_NAME)
    if len(message.life) > MAX_WORD:
        raise MessageError(
            "bad-field", f"join.life: {len(message.life)} characters are more than {MAX_WORD}"
        )


def _line(text: str, most: int) -> str:
    """What others say, as one line that does nothing to a terminal."""
    return "".join(x if x.isprintable() else " " for x in text[:most]).strip()


def _speaks_for(peer: bytes, one: Record | Waiting | None) -> bool:
    """Whether the sender may say that this one leaves: it is this one, or whoever started it, under its name alone."""
    return one is not None and peer in (one.peer, one.peer.partition(b"\0")[0])


def _check_identity(peer: bytes, worker: str) -> None:
    if messages.worker_of(peer) != worker:
        raise MessageError(
            "wrong-id", f"the message speaks for {worker!r} but came from {peer!r:.80}"
        )
