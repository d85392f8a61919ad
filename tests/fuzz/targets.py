"""The targets: name -> a function of bytes that raises for a defect and for nothing else."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import io
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq
from rich.console import Console

from esync import messages, shared_memory
from esync.compression import COMPRESSIONS, Compressor, Decoder
from esync.config import PsConfig, RunConfig
from esync.device_memory import opened
from esync.errors import ConfigError, EsyncError, ModelError, ProtocolError
from esync.messages import (
    INITIAL,
    Error,
    Fetch,
    Have,
    Join,
    Leave,
    Members,
    MessageError,
    Model,
    Offer,
    Query,
    Report,
    Response,
    Status,
    Update,
    Want,
    Welcome,
)
from esync.messaging import LOCAL, MessageServer
from esync.ps import checkpoint as checkpoints
from esync.ps import server as ps_server
from esync.ps.backend import NumpyBackend
from esync.ps.checkpoint import ABOUT, Checkpoints, Snapshot, join
from esync.ps.server import ParameterServer, TensorThread
from esync.run import view
from esync.seal import KEY_BYTES, Envelope, Opener, Sealer
from esync.shared_memory import MODEL_SLOTS, UPDATE_SLOTS, Region, SharedMemoryError
from esync.state import metrics
from esync.state.handlers import Handlers, StopRun, Tick
from esync.status.inquiry import Inquiry
from esync.tensors import DELTA, VALUE, Layout, Leaf
from esync.worker import channel as channel_module
from esync.worker import link as link_module
from esync.worker.assembly import Shards
from esync.worker.channel import Push
from esync.worker.link import Ask, Link
from esync.worker.session import Session
from tests.fuzz.fakes import Clock, Frame, Socket, Wire, connected, replaced
from tests.fuzz.reader import FLOATS, NUMBERS, Reader, pack

LAYOUT = RunConfig().cut(
    Layout((Leaf(DELTA, "w", (3,), "float32"), Leaf(VALUE, "s", (2,), "float32")))
)
"""Two chunks, of 3 deltas and 2 values."""
OTHER = Layout((Leaf(DELTA, "w", (4,), "float32"),))
NAMES = ("a", "b", "ps", "ps1", "ev", "c", "e/a", "x" * 64, "\x1b[2J", "new\nline")
ENDPOINTS = {"push": "tcp://127.0.0.1:1", "model": "tcp://127.0.0.1:2"}
KEY = bytes(range(KEY_BYTES))
"""The key of a run."""
EVENTS = 64
"""So many of one input's events are looked at."""


# The codec


def codec(data: bytes) -> None:
    """What can be read can be written, and reads the same; nothing else than MessageError is raised."""
    try:
        message = messages.decode(data)
    except MessageError as error:
        assert error.code
        assert error.text
        messages.encode(Error(error.code, error.text[: messages.MAX_TEXT]))
        return
    again = messages.decode(messages.encode(message))
    assert repr(again) == repr(message)  # (NaN within a map is not equal to itself)


def codec_fields(data: bytes) -> None:
    """The codec, on messages whose fields are made up."""
    codec(Reader(data).message(likely))


def likely(kind: str, field: str) -> Sequence[Any]:
    """Values of a message's field with which something happens."""
    if field == "worker" or (kind, field) == ("lost", "peer"):
        return NAMES
    return LIKELY.get((kind, field), LIKELY.get(field, ()))


LIKELY: dict[Any, Sequence[Any]] = {
    "role": ("worker", "worker", "ps", "evaluator", "other"),
    "layout": (LAYOUT.to_wire(), LAYOUT.to_wire(), OTHER.to_wire(), {}),
    "round": (0, 1, 2, 3, 5, -1, 1 << 40),
    "step": (0, 1, 2, 3, 1 << 50),
    "ahead": (0, 1, 2),
    "version": (0, 1, 2, 3, -1),
    "chunk": (0, 1, 2, -1),
    "digest": (LAYOUT.digest, LAYOUT.digest, LAYOUT.digest, OTHER.digest),
    "phase": ("sync", "train", "eval", "leaving", "[/b]"),
    "compute_s": (0.0, 0.5, 1.0, 1, 5e-324, 1e308, -1.0),
    "running_s": (0.0, 0.5, 1e308),
    "accuracy": (0.5, 0.9, 1.0, -1.0, None),
    "loss": (0.5, 2.0, None),
    "samples": (1, 64, 1 << 52),
    "steps": (1, 3, 0, 1 << 52, -1),
    "totals": (
        {"steps": 3, "samples": 9, "compute_s": 1.5, "split_digest": "x"},
        {"steps": -1},
        {},
    ),
    "members": ({"a": 0.5, "b": 0.0}, {"a": float("-inf")}, {}, {b"a": 1.0}),
    "workers": ({"a": 0}, {"a": 0, "b": 1}, {}, {"b": 0, "c": 0}),
    "epoch": (1, 2, 3, 1 << 30),
    "first": ([], ["a"], [1]),
    "endpoints": (ENDPOINTS, ENDPOINTS, {"push": "tcp://*:*", "model": "inproc://x"}, {}),
    ("welcome", "endpoints"): (
        [ENDPOINTS],
        [ENDPOINTS],
        [{**ENDPOINTS, "curve": 1}],
        [],
        [3],
        [{}],
    ),
    "config": (RunConfig().to_wire(), RunConfig(ps=2).to_wire(), {}, {"mode": "x"}),
    "rank": (0, 1, 5, -1, None),
    "shares": (1, 2),
    "heartbeat_s": (10.0, 0.1, 0.0, -1.0),
    "key": (b"", KEY, b"short"),
    "life": ("", "1", "2"),
    "incarnation": ("", "one", "two"),
    "encoding": ("f32", "bf16", "int8", "topk"),
    "slot": (-1, 0, 1, 5),
    "base": (-1, 0, 1),
    "pushed": (-1, 0, 1, 2),
    "missing": ([], [0], [0, 1], [5, "x", -1]),
    "chunks": ([], [0], [1, 0, 9, None]),
    "action": ("train", "sync", "stop", "?"),
    "lease": (0, 1, 3, 1 << 50),
    "width": (1.0, 0.5, 0.0),
    "waiting_for": ("", "you"),
    "table": (None, {}, {"x": 1}),
    "code": ("name-taken", "unknown-worker", "no-shared-memory", "run-over"),
    "host": ("head", "[/b]"),
    "device": ("cpu", "[/b]", "\x1b[2J"),
    "boot": (shared_memory.boot_id(), "", "other"),
    "fd": (-1, 0, 1, 3),
    "size": (0, 512),
    "reason": ("", "done"),
}


# The state server

STATES = [
    {"workers": 1},
    {"workers": 2, "rounds": 3},
    {"workers": 1, "min_steps": 0},
    {"workers": 2, "policy": "paper"},
    {"workers": 2, "slowest_first": True, "min_workers": 2},
    {"mode": "sync", "workers": 2, "deadline_s": 1.0, "deadline_floor_s": 0.1},
    {"mode": "async", "workers": 1, "ps": 2, "rounds": 2},
    {"mode": "ssp", "workers": 2, "max_staleness": 1},
    {"mode": "fedavg", "workers": 2, "participation": 0.5},
    {"mode": "tifl", "workers": 2, "tiers": 2, "rounds": 3},
    {"mode": "feddrop", "workers": 2},
    {"mode": "local", "target_accuracy": 0.8, "duration_s": 30.0, "max_steps": 3},
]
PATIENCE_S = (0.0, 0.1, 0.3, 1.0, 6.0, 11.0, 30.0)


class State:
    """A state server's handlers behind a message server, as they are in a process."""

    def __init__(self, config: RunConfig) -> None:
        self.clock, self.finished = Clock(), 0
        socket: Any = Socket(zmq.ROUTER)
        self.server = MessageServer(socket)
        self.wire = Wire(self.server, socket)
        journal: Any = _Journal()
        self.handlers = Handlers(
            config, self.server.send, self.clock, journal=journal, finished=self._finish
        )
        for kind, handler in self.handlers.table_of_handlers().items():
            self.server.on(kind, handler)

    def _finish(self) -> None:
        self.finished += 1

    def gets(self, message: Any) -> list[Any]:
        """What an honest sender is answered."""
        self.wire.take()
        name = message.worker.encode()
        self.wire.gets(name, messages.encode(message))
        return [answer for peer, answer in self.wire.take() if peer == name]

    def check(self) -> None:
        """What holds whatever came."""
        handlers, records = self.handlers, self.handlers.table.records
        ranks = [record.rank for record in records.values() if record.role == "worker"]
        assert len(set(ranks)) == len(ranks)
        assert min(ranks, default=0) >= 0
        assert handlers._held.keys() <= records.keys()
        assert handlers._at_gate.keys() <= records.keys()
        shards = [server.shard for server in handlers.servers.values()]
        assert len(set(shards)) == len(shards) <= handlers.config.ps
        assert self.finished <= 1
        slowest = handlers.table.slowest()
        assert slowest is None or slowest.active
        for record in records.values():
            numbers = (record.step_s, record.delivery_s, record.sync_s)
            assert not any(math.isnan(x.value) or math.isnan(x.jitter) for x in numbers)


class _Journal:
    """In place of a log: what is written to it is JSON."""

    def write(self, event: str, **fields: Any) -> None:
        json.dumps(fields)


def state(data: bytes) -> None:
    """A state server after any events: no handler has failed, it can be looked at, and an honest worker that joins is
    answered."""
    reader = Reader(data)
    server = State(RunConfig(**reader.pick(STATES)))
    looks = reader.chance(0.25)  # that takes long
    for _ in range(EVENTS):
        if not reader.more:
            break
        _state_event(reader, server)
        server.check()
    if looks:
        _look_at(server)
    _honest_worker(server)


def _state_event(reader: Reader, server: State) -> None:
    kind = reader.byte() % 16
    if kind == 0:
        server.wire.gets(reader.bytes(9), reader.bytes(250))
    elif kind == 1:
        server.wire.gets(b"a", [reader.bytes(30), reader.bytes(3)])
    elif kind in (2, 3):
        server.clock.now += reader.pick(PATIENCE_S)
        server.wire.gets(LOCAL, Tick(reader.pick((0.0, 0.0, 2.0))))
    elif kind == 4 and reader.chance(0.1):
        server.wire.gets(LOCAL, StopRun("interrupted"))
    elif kind <= 6:  # what follows by itself in a run
        for peer, message in server.wire.take():
            if isinstance(message, Members):
                server.wire.gets(peer, messages.encode(Members(message.epoch, {})))
    elif kind <= 8:
        name = reader.pick(("a", "b", "c"))
        for layout in (None, LAYOUT.to_wire()):
            server.wire.gets(name.encode(), messages.encode(Join(name, "worker", layout=layout)))
        version = server.handlers.history.version
        server.wire.gets(name.encode(), messages.encode(Query(name, version, reader.byte() % 4)))
    elif kind == 9:
        name = reader.pick(("ps", "ps1"))
        server.wire.gets(name.encode(), messages.encode(Join(name, "ps", endpoints=ENDPOINTS)))
    else:
        frame = reader.message(likely, STATE_TYPES)
        name = reader.pick(NAMES) if reader.chance(0.1) else _worker_of(frame)
        server.wire.gets(name.encode(), frame)


STATE_TYPES = (
    *(Join, Query, Query, Report, Report, messages.Reset, messages.Lost),
    *(Members, Leave, Status, Error, Update),
)


def _worker_of(frame: bytes) -> str:
    """Whose message it says it is."""
    raw = msgpack.unpackb(frame) if frame else {}
    name = raw.get("worker")
    return name if isinstance(name, str) else "a"


def _look_at(server: State) -> None:
    """Everything that is shown of a run."""
    handlers = server.handlers
    json.dumps(handlers.summary())
    list(metrics.collect(handlers, server.server, 0, server.clock.now))
    metrics.health(handlers)
    saved = json.loads(json.dumps(handlers.saved()))
    State(handlers.config).handlers.restore(saved)
    server.wire.take()
    server.wire.gets(b"status-1", messages.encode(Status()))
    (answer,) = (message for peer, message in server.wire.take() if peer == b"status-1")
    inquiry = Inquiry.__new__(Inquiry)
    assert inquiry._take(messages.encode(answer))
    shown(inquiry.table, inquiry.waiting_for)


def shown(table: dict[str, Any], waiting_for: str) -> None:
    """Show a table as a terminal would; nothing in it is more than text."""
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(view.live_table(table, waiting_for))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(x.isprintable() or x == "\n" for x in text), f"{text!r:.300}"
    view.plain_line(table, waiting_for)


def _honest_worker(server: State) -> None:
    """A worker that nobody has spoken for joins, asks, and is answered or waits for the others."""
    handlers, name = server.handlers, "honest"
    if not handlers._served():
        for i in range(handlers.config.ps):
            server.gets(Join(f"honest-ps{i}", "ps", endpoints=ENDPOINTS))
    for peer in list(handlers.servers):
        server.gets(Members(handlers._epoch, {}) if not peer else Report(peer, 0, 0, "serving"))
    answers = server.gets(Join(name, "worker"))
    assert answers, "nobody answers a worker that joins"
    if isinstance(answers[0], Error):
        assert answers[0].code in ("run-over", "run-full"), answers
        return
    layout = (handlers.layout or LAYOUT).to_wire()
    answers = server.gets(Join(name, "worker", layout=layout))
    assert any(isinstance(answer, Welcome) for answer in answers), answers
    answers = server.gets(Query(name, handlers.history.version, 1, compute_s=0.5))
    waits = name in handlers._at_gate or name in handlers._held
    assert waits or any(isinstance(answer, Response) for answer in answers), answers
    server.check()


# The parameter server

TENSORS: list[dict[str, Any]] = [
    {"mode": "sync"},
    {"mode": "sync", "compression": "int8", "outer": "adam", "ema": 0.5},
    {"mode": "esync", "weights": "samples", "outer": "nesterov", "compression": "bf16"},
    {"mode": "esync", "weights": "fednova", "slowest_first": True, "compression": "topk"},
    {"mode": "async"},
    {"mode": "async", "dcasgd": True},
    {"mode": "fedasync", "compression": "topk", "topk": 0.5},
    {"mode": "fedavg", "rounds": 2, "outer": "momentum", "shared_memory": False},
]
ENCODINGS = {name: make(0.5) for name, make in COMPRESSIONS.items()}


class Tensors:
    """A tensor thread that is not started, between sockets that are none."""

    def __init__(self, config: RunConfig, clock: Clock, key: bytes = b"") -> None:
        self.clock, self.epoch = clock, 0
        self.xpub: Any = Socket(zmq.XPUB)
        self.xpub.arrived.clear()
        pull: Any = Socket(zmq.PULL)
        envelope = Envelope(key, "ps")
        self.thread = TensorThread(
            pull, self.xpub, NumpyBackend(), config, self._told, envelope=envelope
        )
        self.told: list[Any] = []
        self.members({"a": 0})

    def _told(self, what: Any) -> None:
        self.told.append(what)

    def members(self, workers: dict[str, int], first: Sequence[str] = ()) -> None:
        self.epoch += 1
        self.thread._set_members(Members(self.epoch, workers, LAYOUT.to_wire(), list(first)))

    def upstream(self, event: bytes) -> None:
        self.xpub.arrived.append(event)
        self.thread._upstream()

    def push(self, worker: str, round: int, chunk: int, data: bytes, **fields: Any) -> None:
        update = Update(worker, round, chunk, LAYOUT.digest, **fields)
        self.gets([messages.encode(update), data])

    def gets(self, frames: list[bytes]) -> None:
        self.thread.handle([memoryview(frame) for frame in frames])

    def check(self) -> None:
        """The model is finite, and nothing is kept for who is neither expected nor here."""
        thread = self.thread
        aggregation = thread.aggregation
        assert aggregation is not None
        if aggregation.version >= 0:
            chunks = [*aggregation.chunks, *aggregation.averaged()]
            assert all(np.isfinite(chunk).all() for chunk in chunks)
        known = thread._members | thread._subscribers.keys()
        for kept in (thread._arrival, thread._delivery._lines):
            assert kept.keys() <= known, f"{list(kept)} are kept, {sorted(known)} known"
        assert all(count > 0 for count in thread._subscribers.values())
        on_the_way = sum(line.bytes for line in thread._delivery._lines.values())
        assert on_the_way >= 0
        self.xpub.sent.clear()
        self.told.clear()


def ps(data: bytes) -> None:
    """A parameter server after any messages: its model is finite, and an honest member can make a round."""
    reader = Reader(data)
    clock = Clock()
    with replaced(clock, ps_server):
        config = RunConfig(**reader.pick(TENSORS))
        tensors = Tensors(config, clock)
        try:
            for _ in range(EVENTS):
                if not reader.more:
                    break
                _tensor_event(reader, tensors)
                tensors.check()
            _honest_member(tensors)
        finally:
            tensors.thread.inbox.close()


def _tensor_event(reader: Reader, tensors: Tensors) -> None:
    kind = reader.byte() % 16
    thread, clock = tensors.thread, tensors.clock
    assert thread.aggregation is not None
    name = reader.pick(("a", "b", "ev", "c"))
    if kind <= 4:  # an update that fits, but for its numbers
        version = thread.aggregation.version
        round = version if reader.chance(0.8) else reader.pick((-1, 0, 1, version + 1))
        chunk = reader.byte() % 2
        encoding = reader.pick(("f32", "f32", thread._config.encoding.name))
        payload = _payload(reader, encoding, LAYOUT.chunks[chunk].size, thread._config)
        count = reader.pick((1, 0, 3, 1 << 52))
        tensors.push(name, round, chunk, payload, encoding=encoding, steps=count, samples=count)
    elif kind <= 6:
        frames = [reader.message(likely, (Update, Update, Fetch, Offer, Have, Query))]
        frames += [reader.bytes(20) for _ in range(reader.byte() % 3)]
        tensors.gets(frames)
    elif kind == 7:
        tensors.gets([reader.bytes(99) for _ in range(1 + reader.byte() % 3)])
    elif kind == 8:
        version = thread.aggregation.version
        fetch = Fetch(name, reader.byte() % 4 - 1, reader.byte() % 4 - 1, version, [0, 1, 7])
        fetch.evaluator = reader.chance(0.3)
        tensors.gets([messages.encode(fetch)])
    elif kind == 9:
        workers = {w: i for i, w in enumerate(("a", "b", "c")) if reader.chance(0.5)}
        tensors.members(workers, [name] if reader.chance(0.5) else [])
    elif kind <= 11:
        way = reader.pick((b"\1", b"\1", b"\0"))
        topic = reader.pick(
            (f"w/{name}/".encode(), b"e/ev/", b"e/a/", b"w//", b"x", b"w/e/a/", b"w/")
        )
        tensors.upstream(way + topic)
    elif kind == 12:
        if reader.chance(0.8):
            tensors.gets([reader.message(likely, (Have, Have, Have, Fetch))])
        else:
            tensors.upstream(reader.bytes(30))
    elif kind == 13:
        clock.now += reader.pick((0.1, 1.0, 3.0, 11.0))
        thread._ask_for_initial_model()
        if thread._turns.waiting:
            thread._send_held(thread._turns.look(thread._subscribers, clock.now))
        thread.numbers()
    else:
        offer = region().offer(name, thread.incarnation)
        if reader.chance(0.3):
            offer.token = "other"
        offer.fd = -1 if reader.chance(0.1) else offer.fd
        tensors.gets([messages.encode(offer)])


@functools.cache
def region() -> Region:
    """Memory of this process."""
    return Region.create(LAYOUT, UPDATE_SLOTS)


def _payload(reader: Reader, encoding: str, elements: int, config: RunConfig) -> bytes:
    """Bytes of a chunk, of the right length or nearly."""
    size = 4 * elements if encoding == "f32" else config.encoding.size(elements)
    if reader.chance(0.1):
        return reader.bytes(40)
    if reader.chance(0.5):
        return (reader.bytes(size) * size)[:size].ljust(size, b"\0")
    numbers = [reader.pick((1.0, 0.0, -1.0, 3e38, -3e38, *FLOATS[-3:])) for _ in range(elements)]
    return (np.array(numbers, np.float32).tobytes() * 2)[:size].ljust(size, b"\0")


def _honest_member(tensors: Tensors) -> None:
    """One worker alone brings a model, if there is none, and makes a round."""
    thread, name = tensors.thread, "honest"
    tensors.upstream(f"\1w/{name}/".encode())
    tensors.members({name: 0})
    aggregation = thread.aggregation
    assert aggregation is not None
    if aggregation.version < 0:
        for i, chunk in enumerate(LAYOUT.chunks):
            tensors.push(name, INITIAL, i, np.zeros(chunk.size, np.float32).tobytes())
        assert aggregation.version == 0
    limit = thread._config.rounds
    before = aggregation.version
    for _ in range(
        3
    ):  # what others sent may make a sum that is not finite: then it is asked for again
        if aggregation.version > before or 0 < limit <= aggregation.version:
            break
        for i, chunk in enumerate(LAYOUT.chunks):
            tensors.push(name, before, i, np.zeros(chunk.size, np.float32).tobytes())
    assert aggregation.version > before or 0 < limit <= aggregation.version, "no round is made"
    tensors.xpub.sent.clear()
    tensors.gets([messages.encode(Fetch(name, -1))])
    tensors.clock.now += 100.0  # whatever was on its way is lost
    tensors.gets([messages.encode(Fetch(name, -1))])
    topics = {bytes(frames[0]) for frames in tensors.xpub.sent}
    assert f"w/{name}/".encode() in topics, "who asks for the model is not sent it"
    tensors.check()


class _Unstarted(TensorThread):
    """A tensor thread that does its work when asked."""

    def start(self) -> None:
        pass

    def work(self) -> None:
        for command in self.inbox.take():
            if isinstance(command, ps_server.Welcomed):
                self._epoch, self._envelope = -1, command.envelope
            elif command is not None:
                self._set_members(command)


def ps_control(data: bytes) -> None:
    """A parameter server's control side after any messages of a state server: no handler has failed, and what it hands
    to the tensor thread does not end that, but for another model."""
    reader = Reader(data)
    clock = Clock()
    sockets: dict[str, Any] = {
        **{name: lambda *options: Socket() for name in ("pull", "xpub", "dealer")},
        "bind": lambda socket, endpoint, insecure: endpoint,
        "take_frames_of": lambda socket, endpoint, max_bytes: None,
    }
    with (
        replaced(clock, ps_server, **sockets),
        _with(ps_server, "TensorThread", _Unstarted),
    ):
        server = ParameterServer(
            "tcp://127.0.0.1:1", PsConfig(push_port=1, model_port=2), name="ps"
        )
        wire = Wire(server._server, server._socket)  # type: ignore[arg-type]
        try:
            for _ in range(EVENTS):
                if not reader.more or server._error is not None or server._left:
                    break
                if reader.chance(0.1):
                    frame: Any = reader.bytes(99)
                elif reader.chance(0.3):
                    config = RunConfig(**reader.pick(TENSORS)).to_wire()
                    frame = messages.encode(Welcome(0, 1, config, [ENDPOINTS], 10.0))
                else:
                    frame = reader.message(
                        likely, (Welcome, Members, Members, Error, Status, Leave)
                    )
                wire.gets(b"", frame)
                thread: Any = server.thread
                if thread is not None:
                    try:
                        thread.work()
                    except ModelError as error:
                        assert "has changed" in str(error), error
                    numbers = thread.numbers()
                    assert numbers.members == len(thread._members)
        finally:
            if server.thread is not None:
                server.thread.inbox.close()


# The worker


class Worker:
    """A worker's link that is not started, with its model and, once it is welcomed, its channel."""

    def __init__(self, role: str, key: bytes) -> None:
        context: Any = None
        self.link = Link(
            "tcp://127.0.0.1:1",
            Join("a", role),
            wait_s=60,
            context=context,
            say=lambda text: None,
        )
        self.key = key
        shared = self.link.shared
        shared.model = Shards(LAYOUT, ENCODINGS["int8"])
        shared.compressors = [Compressor(ENCODINGS["int8"], LAYOUT)]
        shared.session = Session("a", nonblocking=True)
        flat = np.zeros(LAYOUT.size, np.float32)
        shared.initial = Push(flat, (INITIAL,), ("",), 0, 1)
        self.link._join.layout = LAYOUT.to_wire()
        self.control: Any = self.link._control
        self.envelope = Envelope(key, "ps")

    def welcomed(self, **changes: Any) -> None:
        config = {"shared_memory": True}
        welcome = Welcome(0, 1, config, [ENDPOINTS], 10.0, key=self.key)
        self.gets(messages.encode(dataclasses.replace(welcome, **changes)))

    def gets(self, frame: bytes) -> None:
        """A frame of the state server."""
        self.control.arrived.append(frame)
        self.link._control_messages()

    def receives(self, frames: list[bytes]) -> None:
        """Frames of the parameter server."""
        for channel in self.link._channels:
            sub: Any = channel.sub
            sub.arrived.append([Frame(frame) for frame in frames])
            channel.receive()

    def model(self, incarnation: str, version: int, data: bytes) -> None:
        """A whole version, as a parameter server sends it."""
        for i, at in enumerate(LAYOUT.chunks):
            header = messages.encode(Model(incarnation, version, i, LAYOUT.digest))
            part = data[4 * at.start : 4 * at.stop]
            self.receives([b"w/a/", *map(bytes, self.envelope.pack(header, part, b"to workers"))])

    def check(self) -> None:
        assert len(self.link._channels) <= 1
        newest = self.link.shared.model and self.link.shared.model.newest
        if newest is not None:
            assert [part.size for part in newest.parts] == [chunk.size for chunk in LAYOUT.chunks]


def worker(data: bytes) -> None:
    """A worker after any messages of both servers: nothing has failed but by a server's error, and a whole model that
    comes is taken up."""
    reader = Reader(data)
    clock = Clock()
    sockets = {"push": connected, "sub": connected, "dealer": lambda *options: Socket()}
    modules = link_module, channel_module
    with replaced(clock, *modules, **sockets):
        one = Worker(reader.pick(("worker", "worker", "evaluator")), reader.pick((b"", KEY)))
        try:
            for _ in range(EVENTS):
                if not reader.more:
                    break
                _worker_event(reader, one, clock)
                one.check()
            one.welcomed()
            flat = np.arange(LAYOUT.size, dtype=np.float32)
            one.model("another life", 1, flat.tobytes())
            assert one.link.shared.model is not None
            newest = one.link.shared.model.newest
            assert newest is not None
            np.testing.assert_array_equal(np.concatenate(newest.parts), flat)
        finally:
            one.link.inbox.close()


def _worker_event(reader: Reader, one: Worker, clock: Clock) -> None:
    kind, link = reader.byte() % 12, one.link
    if kind == 0:
        one.gets(reader.bytes(99))
    elif kind <= 2:
        one.gets(reader.message(likely, (Welcome, Response, Response, Status, Error, Query)))
    elif kind == 3:
        one.welcomed()
    elif kind == 4:
        one.receives([reader.bytes(60) for _ in range(1 + reader.byte() % 3)])
    elif kind <= 7:
        header = reader.message(likely, (Model, Model, Model, Want, Offer, Error))
        payload = reader.pick((None, b"\0" * 12, b"\1" * 8, b"\x7f" * 7, b"", reader.bytes(30)))
        about = b"to workers" if reader.chance(0.9) else b"to the parameter server"
        topic = () if _is_model(header) else (b"w/a/",)
        frames = one.envelope.pack(header, payload, about, *topic)
        one.receives([b"w/a/", *map(bytes, frames)])
    elif kind == 8:
        flat = bytes(reader.byte() % 64 for _ in range(4 * LAYOUT.size))
        one.model(reader.pick(("one", "two")), reader.byte() % 6, flat)
    elif kind == 9:
        clock.now += reader.pick((0.1, 0.6, 1.5, 30.0))
        if link.shared.awaiting is None or reader.chance(0.5):
            link.shared.awaiting = reader.pick(((-1,), (0,), (1,), (2,)))
        link._on_time(clock.now, clock.now)
    elif kind == 10:
        link._outbound(Ask())
    else:
        model, session = link.shared.model, link.shared.session
        assert model is not None
        assert session is not None
        if (newest := model.newest) is not None:
            model.begin(newest)
            session.begin(newest.version)
            session.finished(0.5, 8)
            flat = np.ones(LAYOUT.size, np.float32)
            push = link.shared.update = Push(flat, newest.versions, newest.lives, 1, 8)
            link._outbound(push)
            if reader.chance(0.5):
                session.pushed()


def _is_model(frame: bytes) -> bool:
    return bool(frame) and msgpack.unpackb(frame).get("msg_type") == "model"


# Parts


@functools.cache
def _sealer(identity: str) -> Sealer:
    return Sealer(KEY, identity)


def seal(data: bytes) -> None:
    """Only what was sealed, unchanged and about the same, opens; whatever else comes is `bad-seal` or `bad-frames`."""
    reader = Reader(data)
    opener, envelope = Opener(KEY, keep=2), Envelope(KEY, "ps")
    if reader.chance(0.3):
        _sealed_by_nobody(reader, opener, envelope)
        return
    payload, about = reader.bytes(40), reader.bytes(10)
    sealed = bytes(_sealer(reader.pick(("a", "ü", "x" * 255))).seal(payload, about))
    changed, other = bytearray(sealed), about
    for _ in range(reader.byte() % 3):
        at, kind = reader.byte() * reader.byte() % len(sealed), reader.byte() % 4
        if kind == 0:
            changed[at % max(1, len(changed)) : at % max(1, len(changed)) + 1] = reader.bytes(2)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed += reader.bytes(4)
        else:
            other = reader.bytes(10)
    try:
        opened = opener.open(changed, other)
    except MessageError as error:
        assert error.code == "bad-seal"
        assert bytes(changed) != sealed or other != about
        return
    assert (bytes(changed), other) == (sealed, about)
    assert bytes(opened) == payload


def _sealed_by_nobody(reader: Reader, opener: Opener, envelope: Envelope) -> None:
    frames = [reader.bytes(120) for _ in range(1 + reader.byte() % 3)]
    for attempt in (
        lambda: opener.open(frames[0]),
        lambda: envelope.unpack(frames, b"about"),
    ):
        try:
            attempt()
        except MessageError as error:
            assert error.code in ("bad-seal", "bad-frames")
        else:
            raise AssertionError("what nobody has sealed was opened")


def layout(data: bytes) -> None:
    """What is no layout is a ModelError; what is one can be cut, and its chunks are all of it."""
    reader = Reader(data)
    if reader.chance(0.5):
        leaves: Any = [_leaf(reader) for _ in range(reader.byte() % 5)]
        raw: Any = {"leaves": leaves if reader.chance(0.9) else reader.value()}
    else:
        raw = {"leaves": reader.value()}
    frame = pack(raw)
    raw = msgpack.unpackb(frame, strict_map_key=False) if frame else {}
    try:
        made = Layout.from_wire(raw)
        cut = made.cut(1 + reader.byte() % 4, 1 + reader.byte() % 64)
    except ModelError as error:
        assert len(str(error)) < 1000
        return
    assert Layout.from_wire(made.to_wire()).digest == made.digest == cut.digest
    messages.encode(Join("a", "worker", layout=made.to_wire()))
    assert all(len(leaf.shape) <= 64 for leaf in made.leaves), "NumPy has no such array"
    cut.difference(LAYOUT)
    if cut.size > 1 << 24:
        return  # it has very many chunks
    at = 0
    for chunk in cut.chunks:
        assert chunk.start == at < chunk.stop
        at = chunk.stop
    assert at == cut.size
    shards = [cut.shard(k) for k in range(cut.shards)]
    assert sum(shard.size for shard in shards) == cut.size
    for k, shard in enumerate(shards):
        assert len(shard.chunks) == len(cut.of_shard(k))


def _leaf(reader: Reader) -> list[Any]:
    kind = reader.pick((DELTA, VALUE, DELTA, reader.value()))
    path = reader.pick(("w", "s/x", reader.text(), reader.value()))
    shape = [reader.pick((*NUMBERS, 1, 2, 3)) for _ in range(reader.byte() % 6)]
    if reader.chance(0.1):
        shape = shape * reader.byte()
    leaf: list[Any] = [kind, path, shape if reader.chance(0.9) else reader.value()]
    return [*leaf, "float32" if reader.chance(0.9) else reader.value()]


def compression(data: bytes) -> None:
    """A chunk of any bytes is a vector of the right size or refused, and what was encoded decodes."""
    reader = Reader(data)
    name = reader.pick(tuple(ENCODINGS))
    encoding = ENCODINGS[name]
    decoder = Decoder(encoding, LAYOUT)
    chunk = reader.byte() % 4 - 1
    said = reader.pick(("f32", encoding.name, encoding.name, "bf16", ""))
    size = reader.pick((12, 8, 6, 7, 16, 0))
    payload = (reader.rest() or b"\0").ljust(size, b"\xff")[:size]
    try:
        x = decoder.decode(said, chunk, memoryview(payload))
    except MessageError as error:
        assert error.code in ("bad-encoding", "bad-chunk", "bad-length", "bad-index")
        return
    assert x.dtype == np.float32
    assert x.shape == (LAYOUT.chunks[chunk].size,)
    encoder = Compressor(encoding, LAYOUT)
    with np.errstate(over="ignore", invalid="ignore"):
        used, encoded = encoder.encode(chunk, x, 3)
    again = decoder.decode(used, chunk, memoryview(encoded))
    assert again.shape == x.shape
    if np.isfinite(x).all() and used in ("f32", "bf16") and said == used:
        np.testing.assert_array_equal(again, x)


@functools.cache
def _directory() -> Path:
    """Where files are made. A fuzzer ends its process at once: then who started it removes them."""
    directory = Path(tempfile.mkdtemp(prefix="esync-fuzz-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def checkpoint(data: bytes) -> None:
    """A file that is no checkpoint is passed over, and from one that is a server goes on, or refuses it as another
    model's; a file that is no shard of a model is an EsyncError."""
    reader = Reader(data)
    where = _directory()
    for path in where.iterdir():
        path.unlink()
    kind = reader.byte() % 3
    about = _about(reader) if kind else b""
    contents = _safetensors(reader, about) if kind else reader.rest()
    if kind == 2:
        (where / "model-1-of-2.safetensors").write_bytes(contents)
        try:
            join(where)
        except EsyncError:
            pass
        return
    part = where / "x.part"
    part.write_bytes(contents)
    part.rename(where / f"shard0-version0000000001-{checkpoints._checksum(part)}.safetensors")
    said: list[str] = []
    snapshot = Checkpoints(where, 3).latest(said.append)
    if snapshot is None:
        assert said
        return
    try:
        snapshot = checkpoints.cut_anew(snapshot, reader.pick((2, 1, 64)))
    except ModelError:
        return
    _go_on(snapshot)


def _about(reader: Reader) -> bytes:
    about: dict[str, Any] = {
        "format": 1,
        "version": 3,
        "shard": 0,
        "shards": 1,
        "digest": LAYOUT.digest,
        "counts": {"model": 2, "outer.m": 2},
        "members": ["a"],
        "config": RunConfig().to_wire(),
        **LAYOUT.to_wire(),
    }
    for _ in range(reader.byte() % 3):
        key = reader.pick((*about, "counts", "shards", "shard", "chunk_mib"))
        about[key] = reader.value() if reader.chance(0.5) else {"model": reader.number()}
    value: Any = about if reader.chance(0.9) else reader.value()
    try:
        return json.dumps(value, default=str).encode()
    except TypeError:  # keys of a kind that JSON has not
        return b"{}"


def _safetensors(reader: Reader, about: bytes) -> bytes:
    """A file by hand: its own writer makes no wrong ones."""
    names = [
        reader.pick(("model/0", "model/1", "outer.m/0", "model/9", "model/-1", "x", "model/x"))
    ]
    names = ["model/0", "model/1"] if reader.chance(0.7) else names
    header: dict[str, Any] = {"__metadata__": {ABOUT: about.decode()}}
    at, body = 0, b""
    for i, name in enumerate(names):
        count = (3, 2)[i % 2] if reader.chance(0.8) else reader.byte() % 5
        kind = reader.pick(("F32", "F32", "F32", "I64"))
        size = count * (4 if kind == "F32" else 8)
        header[name] = {"dtype": kind, "shape": [count], "data_offsets": [at, at + size]}
        at += size
        body += (reader.bytes(4) * size)[:size].ljust(size, b"\0")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _go_on(snapshot: Snapshot) -> None:
    """A parameter server begins from a checkpoint."""
    clock = Clock()
    with replaced(clock, ps_server):
        socket: Any = Socket()
        thread = TensorThread(
            *(socket, socket), NumpyBackend(), RunConfig(), lambda told: None, resume=snapshot
        )
        try:
            thread._set_members(Members(1, {"a": 0}, LAYOUT.to_wire()))
        except ModelError:
            return
        finally:
            thread.inbox.close()
        assert thread.aggregation is not None
        assert thread.aggregation.version >= 0
        assert all(chunk.dtype == np.float32 for chunk in thread.aggregation.chunks)


def offer(data: bytes) -> None:
    """Memory that is offered is mapped if it is what it is said to be; else SharedMemoryError."""
    reader = Reader(data)
    true = region().offer("a", "one")
    fields = dataclasses.asdict(true)
    for _ in range(reader.byte() % 4):
        field = reader.pick(tuple(fields))
        fields[field] = reader.pick((*likely("offer", field), reader.value()))
    try:
        said = messages.decode(pack({"v": 1, "msg_type": "offer", **fields}))
    except MessageError:
        return
    assert isinstance(said, Offer)
    slots = reader.pick((UPDATE_SLOTS, UPDATE_SLOTS, MODEL_SLOTS))
    try:
        mapped = opened(LAYOUT, slots, said, None)
    except SharedMemoryError:
        return
    # (Under another descriptor it may be the same memory.)
    assert (said.boot, said.pid, said.token) == (true.boot, true.pid, true.token)
    assert slots == UPDATE_SLOTS
    assert mapped.stamps.shape == (UPDATE_SLOTS, len(LAYOUT.chunks))


def inquiry(data: bytes) -> None:
    """Who asks for the table gets one or a ProtocolError, whatever a state server answers."""
    asks = Inquiry.__new__(Inquiry)
    reader = Reader(data)
    frame = reader.message(likely, (Status, Status, Error, Welcome))
    for answer in (frame, reader.rest()):
        try:
            asks._take(answer)
        except ProtocolError:
            pass


def config(data: bytes) -> None:
    """A configuration that a state server tells is one or a ConfigError."""
    reader = Reader(data)
    raw: Any = RunConfig(**reader.pick([*STATES, *TENSORS])).to_wire()
    for _ in range(reader.byte() % 4):
        raw[reader.pick((*raw, reader.text()))] = reader.value()
    raw = raw if reader.chance(0.95) else reader.value()
    try:
        made = ps_server.build(RunConfig, raw, "run")
    except ConfigError as error:
        assert len(str(error)) < 10_000
        return
    assert ps_server.build(RunConfig, made.to_wire(), "run") == made


class _with:
    """An attribute of a module replaced for a while."""

    def __init__(self, module: Any, name: str, value: Any) -> None:
        self._module, self._name, self._value = module, name, value

    def __enter__(self) -> None:
        self._before = getattr(self._module, self._name)
        setattr(self._module, self._name, self._value)

    def __exit__(self, *error: object) -> None:
        setattr(self._module, self._name, self._before)


Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {
    "codec": codec,
    "codec-fields": codec_fields,
    "state": state,
    "ps": ps,
    "ps-control": ps_control,
    "worker": worker,
    "seal": seal,
    "layout": layout,
    "compression": compression,
    "checkpoint": checkpoint,
    "offer": offer,
    "inquiry": inquiry,
    "config": config,
}


def seeds(name: str) -> list[bytes]:
    """Inputs to begin from: messages for the codec, and for the others as many choices as take them somewhere."""
    if name == "codec":
        sent = [
            Query("a", 1, 2),
            Join("a", "worker", layout=LAYOUT.to_wire()),
            Update("a", 1, 0, "x"),
        ]
        sent += [Members(1, {"a": 0}, LAYOUT.to_wire()), Status({"x": 1.5}), Leave("a")]
        sent += [Welcome(0, 1, RunConfig().to_wire(), [ENDPOINTS], 10.0, key=KEY)]
        return [messages.encode(message) for message in sent]
    source = random.Random(name)
    return [source.randbytes(length) for length in (8, 32, 100, 300, 600) for _ in range(4)]


def mutated(source: random.Random, pool: Sequence[bytes]) -> bytes:
    """An input made up of one or two others, or of nothing."""
    data = bytearray(source.choice(pool) if source.random() < 0.7 else source.randbytes(200))
    for _ in range(source.randint(0, 8)):
        at, kind = source.randrange(len(data) + 1), source.randrange(4)
        if kind == 0:
            data[at : at + 1] = source.randbytes(1)
        elif kind == 1:
            del data[at : at + source.randint(1, 8)]
        elif kind == 2:
            data[at:at] = source.randbytes(source.randint(1, 8))
        else:
            other = source.choice(pool)
            data[at:] = other[source.randrange(len(other) + 1) :]
    return bytes(data)
