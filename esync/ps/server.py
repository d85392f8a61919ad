"""The parameter server: updates come in by PULL, models go out by XPUB, in a thread of their own; the control
channel to the state server stays on the event loop, so that no tensor ever delays a message.

The thread translates between frames and the aggregation's decisions. Rules of the data channel:

- A worker that subscribes to its topic `w/<id>/` is sent the current model on it (an evaluator on `e/<id>/` the
  one that is to be evaluated). That one rule serves late
  joiners, workers that come back, and connections that dropped.
- A version goes to each worker on its topic, and no faster than the worker says that it arrives (`have`).
- Nothing is assumed to arrive. A waiting worker sends `fetch` now and then; the answer is the model it lacks, or
  `want` for chunks of its own update that did not arrive.
- Whatever is refused is counted, and its sender is told on its topic.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from prometheus_client.core import Metric

from esync import device_memory, messages, transport
from esync.algorithms import algorithm
from esync.compression import Decoder
from esync.config import PsConfig, RunConfig, build
from esync.errors import ConfigError, EsyncError, ModelError, ProtocolError, TransportError
from esync.fault_log import FaultLog
from esync.handshake import Gate
from esync.journal import Journal, rounded
from esync.keys import ServerKeys, load_server
from esync.mailbox import Mailbox
from esync.messages import (
    INITIAL,
    NO_SHARED_MEMORY,
    Error,
    Fetch,
    Have,
    Join,
    Leave,
    Lost,
    Members,
    Message,
    MessageError,
    Model,
    Offer,
    Report,
    Reset,
    Status,
    Update,
    Want,
    Welcome,
)
from esync.messaging import LOCAL, MessageServer
from esync.metrics import Health, MetricsPage, showing
from esync.ps import metrics
from esync.ps.aggregation import (
    AGGREGATIONS,
    MODEL,
    NEXT,
    NOT_FINITE,
    Aggregation,
    Completed,
    Contribution,
    Doubted,
    Event,
    Published,
    Refused,
)
from esync.ps.backend import Array, Backend, backend_for
from esync.ps.checkpoint import (
    CHECKPOINTS,
    Checkpoints,
    Snapshot,
    Writer,
    cut_anew,
    model_name,
    save_model,
)
from esync.ps.delivery import Delivery
from esync.ps.turns import Turns
from esync.seal import TO_SERVER, TO_WORKERS, Envelope
from esync.shared_memory import MODEL_SLOTS, UPDATE_SLOTS, Region, SharedMemoryError
from esync.tensors import Layout

log = logging.getLogger("esync.ps")
INITIAL_PATIENCE_S = 5.0
"""How long the worker of rank 0 has for the initial model before somebody else is asked for it."""
MOST_PATIENCE_S = 60.0
"""Twice as long each time, but no longer than this."""
RECV_BURST = 32
UPSTREAM_BURST = 128
PLACE_TAKEN = ("name-taken", "second-ps")
"""Codes of errors that say that another process is in this one's place: one that died is soon noticed."""
EVALUATOR = "e/"
"""What the names of evaluators begin with among subscribers, and their topics."""
SOMEBODY = "somebody"
"""Whose message it was that does not say so."""
DIVERGED = "the update holds NaN or infinity: the training diverged. Lower the learning rate, or look at the data"
TOO_LONG_BY = (
    "the update's deltas are longer than clip_update, so the rest of it is refused. esync.Worker scales them down "
    "itself: run the same esync version everywhere, or do so in your own program"
)


@dataclass(frozen=True, slots=True)
class NewVersion:
    """From the tensor thread to the control side: this version is out."""

    version: int
    early_s: dict[str, float]
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True)
class Welcomed:
    """To the tensor thread: another life of the state server counts its epochs afresh, and may have another key."""

    envelope: Envelope


@dataclass(frozen=True, slots=True)
class Failure:
    """From the tensor thread to the control side: it cannot go on."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Ended:
    """To the control side itself: all that the tensor thread has told is dealt with.

    `reason` is why that was ended, `farewell` what the state server is told.
    """

    reason: str
    farewell: str


@dataclass(frozen=True, slots=True)
class Numbers:
    """What goes up and down in the tensor thread."""

    members: int  # expected at the barrier
    subscribers: int
    in_shared_memory: int  # workers whose updates come through it
    stuck: int  # subscribers that take nothing for long
    waiting_chunks: int
    bytes_on_the_way: int
    checkpoint: int  # the last version that was written; -1: none


class TensorThread(threading.Thread):
    """Owns the data sockets and the aggregation. Everything else talks to it through `inbox`.

    Args:
        pull, xpub: bound sockets, handed over to this thread.
        shard: which of the model's shards is this server's.
        envelope: seals and opens what goes over the sockets, if the run does.
        resume: the checkpoint to go on from.
        checkpoints: where to write more, every `checkpoint_s` seconds (0: only at the end).
        tell: called from this thread with what the control side is to know.
    """

    def __init__(
        self,
        pull: zmq.Socket[bytes],
        xpub: zmq.Socket[bytes],
        backend: Backend,
        config: RunConfig,
        tell: Callable[[NewVersion | Members | Lost | Failure], None],
        shard: int = 0,
        envelope: Envelope | None = None,
        resume: Snapshot | None = None,
        checkpoints: Checkpoints | None = None,
        checkpoint_s: float = 0.0,
    ) -> None:
        super().__init__(name="esync-tensors", daemon=True)
        self.shard = shard
        self._resume = resume
        self._writer = Writer(checkpoints) if checkpoints is not None else None
        self._checkpoint_s, self._checkpoint_at = checkpoint_s, time.monotonic()
        self._envelope = envelope or Envelope(b"", "")
        self.inbox: Mailbox[Members | Welcomed | None] = Mailbox()
        self.aggregation: Aggregation | None = None
        self.layout: Layout | None = None  # of this shard
        self.whole: Layout | None = None  # of the model
        self.counters: Counter[str] = Counter()
        self.bytes_up = 0
        self.bytes_down = 0
        self.bytes_shared = 0  # of both, what went through shared memory
        self.wanted = 0  # chunks of updates that were asked for again; some may come twice then
        self.incarnation = secrets.token_hex(4)
        self.alive_at = time.monotonic()  # when it last gave a sign of life
        self._faults = FaultLog(log)
        self._pull, self._xpub = pull, xpub
        self._backend, self._config = backend, config
        self._tell = tell
        # id -> by how many connections, in order of arrival; evaluators under e/ID
        self._subscribers: Counter[str] = Counter()
        self._delivery = Delivery()
        # (version, chunk) -> what is on its way of it, where the model itself is overwritten
        self._copies: weakref.WeakValueDictionary[tuple[int, int], Array]
        self._copies = weakref.WeakValueDictionary()
        self._packed: tuple[Published, list[Any], int] | None = None  # what was sent last
        self._members: frozenset[str] = frozenset()
        self._memories: dict[str, Region] = {}  # of workers here, where their updates are
        self._models: dict[bool, Region] = {}  # where the model is, for them: on a device or not
        self._in_place: Region | None = None  # the one in which the aggregation itself keeps it
        self._mode = algorithm(config.mode)
        self._epoch = -1
        self._last = config.rounds or None  # the version after which none is made
        self._arrival: dict[str, float] = {}
        self._turns = Turns()
        self._held: list[Published] = []  # chunks for those whose turn has not come
        self._asked_at = 0.0
        self._asked = 0
        self._initial_patience_s = INITIAL_PATIENCE_S

    def run(self) -> None:
        try:
            if self._writer is not None:
                self._writer.start()
            self._serve()
        except BaseException as error:
            if not isinstance(error, EsyncError):
                log.exception("the tensor thread failed")
            self._tell(Failure(error))
        finally:
            self._pull.close()
            self._xpub.close()
            self.inbox.close()
            if self._writer is not None:
                self._writer.finish()
            self._faults.close()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self.inbox.fileno(), zmq.POLLIN)
        poller.register(self._xpub, zmq.POLLIN)
        while True:
            self.alive_at = time.monotonic()
            ready = dict(poller.poll(50 if self._turns.waiting else 1000))
            if self.inbox.fileno() in ready:
                for command in self.inbox.take():
                    if command is None:
                        return
                    if isinstance(command, Welcomed):
                        self._welcomed(command)
                    else:
                        self._set_members(command)
                if self.aggregation is not None:
                    # Updates wait in their socket until there is a layout to check them against.
                    poller.register(self._pull, zmq.POLLIN)
            if self._xpub in ready:
                self._upstream()
            if self._pull in ready:
                self._updates()
            self._ask_for_initial_model()
            if self._turns.waiting:
                self._send_held(self._turns.look(self._subscribers, time.monotonic()))

    def _welcomed(self, command: Welcomed) -> None:
        self._epoch, self._envelope = -1, command.envelope
        self._packed = None  # it is sealed with the key of the life before

    # Members and subscribers

    def _set_members(self, message: Members) -> None:
        if message.epoch < self._epoch:
            return
        self._epoch = message.epoch
        self._turns.first = frozenset(x for x in message.first if isinstance(x, str))
        had_ended = self._is_last
        self._last = self._config.rounds or None if message.last is None else message.last
        if message.layout is not None:
            whole = self._config.cut(Layout.from_wire(message.layout))
            if self._untrained():
                self._set_layout(whole)
            elif self.whole is not None and whole.digest != self.whole.digest:
                raise ModelError(f"the run's model has changed: {whole.difference(self.whole)}")
        gone = self._members - message.workers.keys()
        self._members = frozenset(message.workers)
        for worker in gone - self._subscribers.keys():
            self._delivery.forget(worker)
        if self.aggregation is not None and not self._is_last:
            self._emit(self.aggregation.set_members(message.workers))
            for worker in self._arrival.keys() - message.workers.keys() - self._subscribers.keys():
                del self._arrival[worker]
            if had_ended:
                self._ask_for_refused()
        self._tell(Members(message.epoch, {}))

    def _ask_for_refused(self) -> None:
        """Another parameter server has made one more version: ask for the updates that came here when all was over."""
        assert self.aggregation is not None
        for worker in sorted(self._members):
            wanted = self.aggregation.missing(worker, self.version)
            if wanted and worker in self._subscribers:
                self.wanted += len(wanted)
                self._send_to(worker, Want(self.version, wanted, self.incarnation))

    @property
    def _is_last(self) -> bool:
        """Whether no more versions are made after the one that there is."""
        return self._last is not None and self.version >= self._last

    def _untrained(self) -> bool:
        return self.aggregation is None or self.aggregation.version <= 0

    def _set_layout(self, whole: Layout) -> None:
        """Begin anew, unless this is the model that we have."""
        if self.whole is None or whole.digest != self.whole.digest:
            self.whole, self.layout = whole, whole.shard(self.shard)
            self._decoder = Decoder(self._config.encoding, self.layout)
            extra = {"ordered": True} if self._mode.ordered else {}
            self._memories, self._models, self._in_place = {}, {}, None
            self.aggregation = AGGREGATIONS[self._mode.aggregation](
                self.layout, self._backend, self._config, **extra
            )
            self._asked_at = time.monotonic()
            if self._resume is not None:
                self._go_on_from(self._resume)
            for worker in self._subscribers:
                self._greet(worker)

    def _go_on_from(self, snapshot: Snapshot) -> None:
        """Have the model of a checkpoint.

        Raises:
            ModelError: it is another model's.
        """
        assert self.aggregation is not None
        assert self.whole is not None
        self._resume = None
        if snapshot.whole.digest != self.whole.digest:
            raise ModelError(
                f"the checkpoint is of another model: {self.whole.difference(snapshot.whole)}"
            )
        arrays = {
            name: [None if x is None else self._backend.load(x) for x in chunks]
            for name, chunks in snapshot.arrays.items()
        }
        self.aggregation.restore(snapshot.version, arrays)
        up, down = snapshot.moved
        self.bytes_up, self.bytes_down = self.bytes_up + up, self.bytes_down + down

    def _write_checkpoint(self) -> None:
        """Hand the present version over to be written, unless the last one still is."""
        aggregation, writer = self.aggregation, self._writer
        if aggregation is None or writer is None or not writer.is_free:
            return
        assert self.whole is not None
        self._checkpoint_at = time.monotonic()
        arrays = {
            name: [None if x is None else self._backend.host(x) for x in chunks]
            for name, chunks in aggregation.snapshot().items()
        }
        if self._in_place is not None and self._backend.cuda is None:  # it will be overwritten
            for name in arrays.keys() & {MODEL, NEXT}:
                arrays[name] = [None if x is None else x.copy() for x in arrays[name]]
        writer.put(
            Snapshot(
                aggregation.version,
                self.whole,
                self.shard,
                arrays,
                sorted(self._members),
                self._config.to_wire(),
                (self.bytes_up, self.bytes_down),
            )
        )

    def _upstream(self) -> None:
        """Some of the subscriptions that have come."""
        for _ in range(UPSTREAM_BURST):
            try:
                event: bytes = self._xpub.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            if event[:1] not in (b"\x00", b"\x01"):
                self._faults.say(SOMEBODY, "upstream", "refused: a message where models go out")
                self.counters["unexpected-type"] += 1
                continue
            here, topic = event[:1] == b"\x01", event[1:]
            if topic.startswith((b"w/", b"e/")) and topic.endswith(b"/"):
                worker = topic[:-1].decode("utf-8", "replace").removeprefix("w/")
                if here:
                    self._subscribers[worker] += 1
                    self._delivery.forget(worker)
                    self._greet(worker)
                else:
                    self._unsubscribed(worker)

    def _unsubscribed(self, worker: str) -> None:
        """A connection is gone. A member may be back by another one already, and is sent what it needs anyway."""
        self._subscribers[worker] -= 1
        if self._subscribers[worker] <= 0:
            del self._subscribers[worker]
            if worker in self._members:
                self._tell(Lost("", worker))
            else:
                self._delivery.forget(worker)
                self._arrival.pop(worker, None)

    def _have(self, message: Have) -> None:
        """A subscriber has received something: the next may go, to it or to those whose turn it is then."""
        worker, now = _subscriber(message), time.monotonic()
        self._delivery.have(worker, message.version, message.chunk, now)
        self._deliver(worker, now)
        if message.whole:
            self._send_held(self._turns.have(worker, message.version, now))

    def _greet(self, worker: str) -> None:
        """Send a new subscriber the model, or the word that there is none yet."""
        if self.aggregation is None:
            return
        if self.aggregation.version < 0:
            self._send_to(worker, Want(INITIAL, [], self.incarnation))
        else:
            self._send_model(worker)

    def _receivers(self) -> list[str]:
        """Whom a new version is sent."""
        workers = [w for w in self._subscribers if not w.startswith(EVALUATOR)]
        return workers + [w for w in self._members if w not in self._subscribers]

    def _ask_for_initial_model(self) -> None:
        """If rank 0 does not bring the initial model, ask the subscribers in turn."""
        aggregation = self.aggregation
        if aggregation is None or aggregation.version >= 0 or not self._subscribers:
            return
        now = time.monotonic()
        if now - self._asked_at > self._initial_patience_s:
            self._asked_at = now
            # It may be on its way, over a slow link.
            self._initial_patience_s = min(2 * self._initial_patience_s, MOST_PATIENCE_S)
            workers = list(self._subscribers)
            worker = workers[self._asked % len(workers)]
            self._asked += 1
            wanted = aggregation.missing(worker, INITIAL)
            self._send_to(worker, Want(INITIAL, wanted, self.incarnation))

    # Updates

    def _updates(self) -> None:
        for _ in range(RECV_BURST):
            try:
                frames = self._pull.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            self.handle([frame.buffer for frame in frames])
        self._settle()

    def _opened(self, frames: Sequence[memoryview]) -> tuple[Message, list[memoryview]]:
        """A worker's message, if it speaks for who sealed it, and its payload if it has one."""
        head, payload, sender = self._envelope.unpack(frames, TO_SERVER)
        message = messages.decode(head)
        if self._envelope.is_sealed and getattr(message, "worker", "") != sender:
            raise MessageError("wrong-sender", f"{sender!r:.80} sealed a message of somebody else")
        return message, payload

    def handle(self, frames: Sequence[memoryview]) -> None:
        """One message of the data channel; whatever it holds, the worst that follows is an error to its sender."""
        worker = None
        try:
            message, payload = self._opened(frames)
            if not isinstance(message, Update):
                self._settle()
            if isinstance(message, (Update, Fetch)) and not self._knows(_subscriber(message)):
                self.counters["unknown-worker"] += 1  # it will ask again, once it is here
            elif isinstance(message, Update):
                worker = message.worker
                self._update(message, payload)
            elif isinstance(message, Have):
                self._have(message)
            elif isinstance(message, Fetch):
                worker = message.worker
                self._fetch(message)
            elif isinstance(message, Offer):
                worker = message.worker
                self._offer(message)
            else:
                raise MessageError("unexpected-type", f"{message.TYPE} is not for the data channel")
        except MessageError as error:
            self.counters[error.code] += 1
            usual = error.code == NO_SHARED_MEMORY  # with everybody on another machine
            level = logging.INFO if usual else logging.WARNING
            text = f"refused: {error.code}: {error.text}"
            self._faults.say(worker or SOMEBODY, error.code, text, level=level)
            if worker is not None:
                self._send_to(worker, Error(error.code, error.text))

    def _knows(self, worker: str) -> bool:
        """Whether a name is one that is expected or subscribes: what is kept for each is not kept for made-up ones."""
        if worker not in self._members and worker not in self._subscribers:
            self._upstream()  # it has come on another connection, and may have overtaken
        return worker in self._members or worker in self._subscribers

    def _update(self, message: Update, sent: list[memoryview]) -> None:
        assert self.aggregation is not None
        assert self.layout is not None
        shared = message.slot >= 0
        if len(sent) != (0 if shared else 1):
            raise MessageError(
                "bad-frames",
                f"an update is a header and a chunk or a slot, not {1 + len(sent)} frames",
            )
        if message.digest != self.layout.digest:
            raise MessageError(
                "layout-mismatch",
                f"the update's model has the digest {message.digest:.32}, the run's {self.layout.digest}",
            )
        if message.incarnation and message.incarnation != self.incarnation:
            self.counters["incarnation"] += 1
            return
        payload: Any = self._shared_chunk(message) if shared else sent[0]
        if payload is None:
            self.counters["overwritten"] += 1
            return
        update = payload
        if not shared:
            update = self._decoder.decode(message.encoding, message.chunk, payload)
        if message.steps < 0 or message.samples < 0:
            raise MessageError("bad-field", "steps and samples are not negative")
        if self._is_last:
            # The last version is the last, however fast the workers are.
            self.counters["after-the-end"] += 1
            return
        self.bytes_up += payload.nbytes
        self.bytes_shared += payload.nbytes if shared else 0
        self._arrival[message.worker] = time.monotonic()
        if message.round == INITIAL:
            self._asked_at = time.monotonic()  # it is on its way
        pinned = shared and self._memories[message.worker].pin is not None
        data = self._backend.load(update, pinned=pinned)
        contribution = Contribution(
            message.worker,
            message.round,
            message.chunk,
            data,
            message.steps,
            max(1, message.samples),
            lasts=shared and data is update,  # else it was brought to the device: memory of ours
        )
        together = contribution.lasts and self._backend.at_once  # the device is at it meanwhile
        take = self.aggregation.take if together else self.aggregation.receive
        self._emit(take(contribution))

    def _settle(self) -> None:
        """Look at what has come through a device's memory since the last time, all of it together."""
        if self.aggregation is not None:
            self._emit(self.aggregation.settle())

    # Shared memory

    def _offer(self, message: Offer) -> None:
        """Use a worker's memory, and offer it the model's."""
        assert self.layout is not None
        assert self.whole is not None
        self._knows(message.worker)
        known = message.worker in self._subscribers and message.incarnation == self.incarnation
        if not known or not self._config.shared_memory:
            return
        if message.fd < 0:  # it could not map ours
            self._memories.pop(message.worker, None)
            return
        try:
            memory = device_memory.opened(self.whole, UPDATE_SLOTS, message, self._backend.cuda)
            mine = memory.part(self.whole.of_shard(self.shard))
            self._memories[message.worker] = device_memory.pinned(
                mine, self._backend.cuda, waits=False
            )
            on_device = memory.device is not None
            if on_device not in self._models and self._mode.barrier:
                self._share_model(on_device)
        except SharedMemoryError as error:
            self._memories.pop(message.worker, None)
            why = f"no shared memory: {error}"
            self._faults.say(message.worker, "not mapped", why, level=logging.INFO)
            text = "the parameter server cannot map it"  # why is nothing for the network to know
            raise MessageError(NO_SHARED_MEMORY, text) from error
        region = self._models.get(on_device) or self._memories[message.worker]  # has nothing to map
        self._send_to(message.worker, region.offer(message.worker, self.incarnation))

    def _share_model(self, on_device: bool) -> None:
        """Have the model where workers of this machine can read it."""
        assert self.aggregation is not None
        assert self.layout is not None
        aggregation, index = self.aggregation, self._backend.cuda
        if on_device and index is not None:
            region = device_memory.shared(self.layout, MODEL_SLOTS, index)
        else:
            region = Region.create(self.layout, MODEL_SLOTS)
            device_memory.pinned(region, index, waits=False)

        def room(version: int, chunk: int) -> Array:
            return region.begin(version % MODEL_SLOTS, chunk)

        self._models[on_device] = region
        if on_device == (index is not None) and aggregation.move_to(room):
            self._in_place = region
        if aggregation.version >= 0:
            whole = [
                Published(aggregation.version, i, data) for i, data in enumerate(aggregation.chunks)
            ]
            self._place([*whole, *aggregation.in_progress()])

    def _place(self, events: list[Published]) -> None:
        """Chunks of a version are final: have them in shared memory, if there is any."""
        for region in self._models.values():
            for event in events if region is not self._in_place else ():
                room = region.begin(event.version % MODEL_SLOTS, event.chunk)
                if region.device is None:
                    self._backend.put(event.data, room, pinned=region.pin is not None)
                else:
                    self._backend.copied(event.data, room)
            self._backend.wait()  # a reader waits for nothing but the stamp
            for event in events:
                region.finish(event.version % MODEL_SLOTS, event.chunk, event.version)

    def _is_placed(self, worker: str, event: Published) -> bool:
        """Whether a chunk of a version is in shared memory that a worker reads."""
        memory, slot = self._memories.get(worker), event.version % MODEL_SLOTS
        region = None if memory is None else self._models.get(memory.device is not None)
        return region is not None and bool(region.stamps[slot, event.chunk] == event.version)

    def _shared_chunk(self, message: Update) -> Array | None:
        """A chunk where it lies, in its sender's memory; None if the sender has gone on to another round by now."""
        assert self.layout is not None
        region = self._memories.get(message.worker)
        if region is None:
            raise MessageError(NO_SHARED_MEMORY, "this server has not mapped the worker's memory")
        if not (0 <= message.chunk < len(self.layout.chunks) and message.slot < UPDATE_SLOTS):
            raise MessageError(
                "bad-chunk", f"there is no chunk {message.chunk} in slot {message.slot}"
            )
        if region.stamps[message.slot, message.chunk] != message.round:
            return None
        return region.chunk(message.slot, message.chunk)

    def _fetch(self, message: Fetch) -> None:
        assert self.aggregation is not None
        aggregation, worker = self.aggregation, _subscriber(message)
        if aggregation.version < 0:
            return  # there is nothing yet, and who brings it has been asked
        if reason := aggregation.beyond(worker, message.pushed):  # what said so may be lost
            self._refuse(worker, reason)
            return
        wanted = aggregation.missing(worker, message.pushed) if message.pushed >= 0 else []
        if not wanted and self._turns.holds(worker):
            return  # its turn comes
        if aggregation.version > message.round and not wanted:
            if self._delivery.is_busy(worker, time.monotonic()):
                return
            chunks = None
            if message.version == aggregation.version and message.missing:
                count = len(aggregation.chunks)
                chunks = sorted({i for i in message.missing if type(i) is int and 0 <= i < count})
            self._send_model(worker, chunks)
        elif wanted:
            quiet = time.monotonic() - self._arrival.get(worker, 0.0)
            if quiet > 0.5:  # else its update is still arriving
                self.wanted += len(wanted)
                self._arrival[worker] = (
                    time.monotonic()
                )  # questions that waited are not each answered
                self._send_to(worker, Want(message.pushed, wanted, self.incarnation))

    # Sending

    def _emit(self, events: list[Event]) -> None:
        final = [event for event in events if isinstance(event, Published)]
        if final and self._mode.barrier:
            self._place(final)
        for event in events:
            if isinstance(event, Published):
                self._publish(event)
            elif isinstance(event, Refused):
                self.counters[event.reason] += 1
                if event.worker:
                    self._refuse(event.worker, event.reason)
            elif isinstance(event, Doubted):
                for worker in event.workers:
                    self._send_to(worker, Want(event.round, [event.chunk], self.incarnation))
            elif isinstance(event, Completed):
                now = time.monotonic()
                early = {w: now - self._arrival.get(w, now) for w in event.members}
                self._tell(NewVersion(event.version, early, self.bytes_up, self.bytes_down))
                for worker in self._memories.keys() - self._members - self._subscribers.keys():
                    del self._memories[worker]  # not before its last update has been read
                receivers = None if self._mode.barrier else event.members
                self._delivery.completed(event.version, self._data_events, now, receivers)
                if self._checkpoint_s and now - self._checkpoint_at >= self._checkpoint_s:
                    self._write_checkpoint()

    def _refuse(self, worker: str, reason: str) -> None:
        """Tell a worker that its update is not counted."""
        why = DIVERGED if reason == NOT_FINITE else TOO_LONG_BY
        self._faults.say(worker, reason, f"not counted: {why}")
        self._send_to(worker, Error(reason, why))

    def _publish(self, event: Published) -> None:
        """Send a chunk to whom it is for; where some come first, to them, and to the others later."""
        if event.worker is not None:
            self._send_chunk(event.worker, event)
            return
        turns = self._turns
        if not self._config.slowest_first:
            receivers = self._receivers()
        else:
            if event.version != turns.version:
                self._held = []
                turns.begin(event.version, self._receivers(), time.monotonic())
            if turns.now is not None:
                self._held.append(event)
            receivers = self._receivers() if turns.now is None else turns.now
        for worker in receivers:
            self._send_chunk(worker, event)

    def _send_held(self, workers: list[str]) -> None:
        """It is these workers' turn."""
        if workers:
            held, self._held = self._held, []
            for event in held:
                for worker in workers:
                    self._send_chunk(worker, event)

    def _send_model(self, worker: str, chunks: list[int] | None = None) -> None:
        """The latest complete version, and what is final already of the next."""
        assert self.aggregation is not None
        model = self._model_for(worker)
        self.aggregation.sent_to(worker, chunks)
        self._delivery.withdraw(worker)
        for i in range(len(model)) if chunks is None else chunks:
            self._send_chunk(worker, Published(self.aggregation.version, i, model[i]))
        if chunks is None and not worker.startswith(EVALUATOR):
            for event in self.aggregation.in_progress():
                self._send_chunk(worker, event)

    def _model_for(self, worker: str) -> list[Any]:
        """The chunks of the latest complete version; for an evaluator those that are evaluated."""
        assert self.aggregation is not None
        evaluator = worker.startswith(EVALUATOR)
        return self.aggregation.averaged() if evaluator else self.aggregation.chunks

    def _data_events(self, worker: str) -> list[Published]:
        """The latest complete version, to be sent to a worker as data."""
        assert self.aggregation is not None
        version, chunks = self.aggregation.version, self._model_for(worker)
        return [self._lasting(Published(version, i, data)) for i, data in enumerate(chunks)]

    def _lasting(self, event: Published) -> Published:
        """The event with data that stays as it is until it has been sent."""
        if self._in_place is None or event.encoded is not None:
            return event  # a published array is never written to again
        if not self._in_place.lends(event.version % MODEL_SLOTS, event.chunk, event.data):
            return event  # an average of versions
        copy = self._copies.get((event.version, event.chunk))
        if copy is None:
            copy = self._backend.copied(event.data)
            self._copies[event.version, event.chunk] = copy
        return replace(event, data=copy)

    def _send_chunk(self, worker: str, event: Published) -> None:
        """Send a chunk to a worker: itself, when its connection takes it, or word of where in shared memory it is."""
        now = time.monotonic()
        if self._is_placed(worker, event):
            self._delivery.put(worker, replace(event, as_word=True), now)
        else:
            self._delivery.put(worker, self._lasting(event), now)
        self._deliver(worker, now)

    def _deliver(self, worker: str, now: float) -> None:
        """Send a worker what may go."""
        for event in self._delivery.next(worker):
            if not event.as_word:
                self._delivery.sent(worker, event, self._send_data(worker, event), now)
            elif self._is_placed(worker, event):  # else there is another version by now
                self._send_word(worker, event)
                self._delivery.sent(worker, event, 0, now)

    def _send_word(self, worker: str, event: Published) -> None:
        header = self._header(event)
        header.slot = event.version % MODEL_SLOTS
        frames = self._envelope.pack(messages.encode(header), None, TO_WORKERS)
        self._xpub.send_multipart([self._topic_of(worker), *frames])
        self.bytes_down += event.data.nbytes
        self.bytes_shared += event.data.nbytes

    def _send_data(self, worker: str, event: Published) -> int:
        """Send a chunk itself; returns its size in bytes."""
        last = self._packed[0] if self._packed else None
        if last is None or not (
            last.version == event.version
            and last.data is event.data
            and last.encoded is event.encoded
        ):
            header = self._header(event)
            if event.encoded is not None:
                payload = event.encoded.payload
                header.encoding, header.base = event.encoded.encoding, event.version - 1
            else:
                payload = self._backend.host(event.data).view(np.uint8)
            # No copy, and one frame for everybody whom it is sent.
            head, data = self._envelope.pack(messages.encode(header), payload, TO_WORKERS)
            self._packed = event, [head, zmq.Frame(data, copy=False)], payload.nbytes
        assert self._packed is not None
        _, frames, size = self._packed
        self._xpub.send_multipart([self._topic_of(worker), *frames], copy=False)
        self.bytes_down += size
        return size

    def _header(self, event: Published) -> Model:
        assert self.layout is not None
        return Model(self.incarnation, event.version, event.chunk, self.layout.digest)

    def _send_to(self, worker: str, message: Want | Error | Offer) -> None:
        topic = self._topic_of(worker)
        self._xpub.send_multipart(
            [topic, *self._envelope.pack(messages.encode(message), None, TO_WORKERS, topic)]
        )

    def _topic_of(self, worker: str) -> bytes:
        return f"{worker}/".encode() if worker.startswith(EVALUATOR) else topic_of(worker)

    @property
    def version(self) -> int:
        """Of the model; -1: there is none yet."""
        return -1 if self.aggregation is None else self.aggregation.version

    def numbers(self) -> Numbers:
        """How things stand; from any thread."""
        stuck, waiting, on_the_way = self._delivery.numbers(time.monotonic())
        return Numbers(
            members=len(self._members),
            subscribers=len(self._subscribers),
            in_shared_memory=len(self._memories),
            stuck=stuck,
            waiting_chunks=waiting,
            bytes_on_the_way=on_the_way,
            checkpoint=-1 if self._writer is None else self._writer.written,
        )

    @property
    def shards(self) -> int:
        """How many parameter servers share the model."""
        return self._config.ps

    def save_checkpoint(self) -> None:
        """Write the last version as a checkpoint; only after the thread has ended."""
        aggregation, writer = self.aggregation, self._writer
        if writer is not None:
            writer.finish()  # on a slow disk it may still be at it
        if aggregation is not None and writer is not None and aggregation.version > writer.written:
            self._writer = Writer(writer.checkpoints)
            self._write_checkpoint()
            self._writer.start()
            self._writer.finish()

    def save(self, path: Path) -> bool:
        """Write the latest version to a file; only after the thread has ended. False if there is none."""
        if self.aggregation is None or self.layout is None or self.aggregation.version < 0:
            return False
        assert self.whole is not None
        save_model(
            path,
            self.whole,
            self.aggregation.averaged(),
            self._backend,
            version=self.aggregation.version,
            shard=self.shard,
        )
        return True


def _check_is_new(directory: Path) -> None:
    """Raises ConfigError if there are checkpoints, and nobody said what to do with them."""
    if any(directory.glob("shard*-version*.safetensors")):
        raise ConfigError(
            f"{directory} has checkpoints: --resume goes on from them, also in the place of a parameter server that "
            "died. Remove them only if they are of a run that is over"
        )


def _subscriber(message: Fetch | Have | Update) -> str:
    """Under which name its sender is sent models."""
    evaluator = not isinstance(message, Update) and message.evaluator
    return f"{EVALUATOR}{message.worker}" if evaluator else message.worker


def topic_of(worker: str) -> bytes:
    """The topic that only this worker subscribes to."""
    return f"w/{worker}/".encode()


class ParameterServer:
    """The role: binds the data sockets, joins the state server, and averages until the run is over.

    Args:
        state: the state server's endpoint.
        config: `[ps]` of the cluster file.
        run_dir: where the log and the final model go.
        wait_s: how long to wait for the state server.
        shard: which of the model's shards it asks for.
        resume: go on from the newest checkpoint in `run_dir`, if there is one.
        keys: the servers' keys; by default those that `config` names, if it does.

    Raises:
        KeysError: those cannot be used.
        DeviceError: the device is not there.
        TransportError: an endpoint cannot be bound.
    """

    def __init__(
        self,
        state: str,
        config: PsConfig | None = None,
        *,
        run_dir: str | Path | None = None,
        wait_s: float = 60.0,
        name: str = "",
        shard: int | None = None,
        resume: bool = False,
        keys: ServerKeys | None = None,
        context: zmq.Context[Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.config = config or PsConfig()
        if keys is None and self.config.keys:
            keys = load_server(self.config.keys)
        self._run_dir = Path(run_dir) if run_dir else None
        if self._run_dir is not None and not resume:
            _check_is_new(
                self._run_dir / CHECKPOINTS
            )  # before it takes part, and its failure is the run's
        self.shard = shard
        self.state = state
        self.name = name or f"ps-{transport.hostname()}-{os.getpid()}"
        messages.check_worker_id(self.name)
        self._life = secrets.token_hex(4)
        self._refusal: ProtocolError | None = None
        self.thread: TensorThread | None = None
        self._backend = backend_for(self.config.device)
        self._context = context or zmq.Context.instance(transport.IO_THREADS)
        self._journal = Journal(None, "ps")  # until it is known which shard it has
        self._say = say
        self._wait_s = wait_s
        self._error: BaseException | None = None
        self._left = False
        self._version = -1
        self._resume = resume
        self._welcome: Welcome | None = None
        self._rejoins = False
        self._allowed = keys.allowed if keys is not None else None
        self.page: MetricsPage | None = None
        # (On inproc:// nothing is authenticated, and a gate is a thread.)
        self._gate = None if self.config.bind.startswith("inproc://") else Gate()
        lets_in = keys if keys is not None and self.config.curve else self._gate
        self._pull = transport.pull(self._context, lets_in)
        self._xpub = transport.xpub(self._context, lets_in)
        try:
            if self.config.metrics_port:
                where = self.config.metrics_bind, self.config.metrics_port
                self.page = MetricsPage(*where, self._metrics, self._health)
            insecure = self.config.insecure or keys is not None  # what goes through them is sealed
            self._bound = push = transport.bind(
                self._pull, self._endpoint("push", self.config.push_port), insecure=insecure
            )
            model = transport.bind(
                self._xpub, self._endpoint("model", self.config.model_port), insecure=insecure
            )
            self.endpoints = {
                "push": transport.advertised(push, state),
                "model": transport.advertised(model, state),
                "curve": self.config.curve,
                "token": self._gate.token if self._gate is not None else "",
                "device": device_memory.uuid_of(self._backend.cuda),
            }
            client = keys.client() if keys is not None else None
            identity = messages.peer_of(self.name, self._life)
            self._socket = transport.dealer(self._context, identity, state, client)
        except BaseException:
            self._pull.close(0)
            self._xpub.close(0)
            if self.page is not None:
                self.page.close()
            raise
        self._server = MessageServer(self._socket)
        self._server.on_refused = self._on_refused
        self._server.on(Welcome, self._on_welcome)
        self._server.on(Members, self._on_members)
        self._server.on(Leave, self._on_leave)
        self._server.on(Status, lambda peer, message: None)
        self._server.on(Error, self._on_error)
        self._server.on(NewVersion, self._on_new_version)
        self._server.on(Failure, self._on_failure)
        self._server.on(Ended, self._on_ended)
        self._server.on(Lost, self._on_lost)

    def _endpoint(self, what: str, port: int) -> str:
        bind = self.config.bind
        if bind.startswith(("ipc://", "inproc://")):
            return f"{bind}-{what}"
        host = bind.removeprefix("tcp://")
        return f"tcp://{host}:{port or '*'}"

    def _metrics(self) -> Iterator[Metric]:
        refusals = sum(x.refusals for x in (self._allowed, self._gate) if x is not None)
        return metrics.collect(self.thread, self._server, self._backend.name, refusals)

    def _health(self) -> Health:
        if self._error is not None:
            return Health(False, str(self._error))
        return metrics.health(self.thread, self.state)

    def stop(self) -> None:
        """End, from any thread or a signal handler on the loop."""
        self._server.post_threadsafe(Leave(self.name, "interrupted"))

    async def run(self) -> None:
        """Serve until the state server says that the run is over.

        Raises:
            TransportError: no state server answered.
            ProtocolError: the state server refused.
        """
        self._say(f"parameter server on {self._backend.name}, joining {self.state}")
        if self.page is not None:
            self._say(f"metrics at {self.page.url}")
        joiner = asyncio.create_task(self._join())
        try:
            with showing(self.page):
                await self._server.run()
        finally:
            joiner.cancel()
            self._end_thread()
            self._socket.close()
            self._journal.close()
        if self._error is not None:
            raise self._error

    async def _join(self) -> None:
        """Ask until welcomed; then keep the state server knowing that we are alive."""
        started, told = time.monotonic(), False
        while self.thread is None:
            self._server.send(b"", self._join_message())
            await asyncio.sleep(0.5)
            waited = time.monotonic() - started
            if self.thread is None and (why := transport.refusal(self._socket)):
                self._error = TransportError(f"cannot join {self.state}: {why}")
                self._server.stop()
                return
            if self.thread is None and waited > 2 and not told:
                told = True
                self._say(transport.waiting_for_state(self.state))
            if self.thread is None and waited > self._wait_s:
                silent = TransportError(transport.no_state_server(self.state, self._wait_s))
                self._error = self._refusal or silent
                self._server.stop()
                return
        lost_at: float | None = None
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            lost_at = (lost_at or now) if transport.is_lost(self._socket) else None
            if lost_at is not None and now - lost_at > self._wait_s and not self._left:
                text = f"the state server at {self.state} is gone: no connection for {self._wait_s:g} s"
                self._error = TransportError(text)
                self._server.post(Leave(self.name, text))
            if self._rejoins:
                self._server.send(b"", self._join_message())
            # With the version, so that a reset that was lost does no harm.
            self._server.send(b"", Report(self.name, self._version, 0, "serving"))

    def _join_message(self) -> Join:
        return Join(
            self.name,
            "ps",
            life=self._life,
            rank=self.shard,
            host=transport.hostname(),
            device=self._backend.name,
            endpoints=self.endpoints,
        )

    def _on_welcome(self, peer: bytes, message: Welcome) -> None:
        envelope = Envelope(b"" if self.config.curve else message.key, self.name)
        if self.thread is not None:
            self._welcomed_again(message, envelope)
            return
        self._welcome = message
        try:
            config = build(RunConfig, message.config, "run")
            if not 0 <= message.rank < config.ps:
                raise ConfigError(f"there is no shard {message.rank} of {config.ps}")
            checkpoints, snapshot = self._checkpoints(message.rank, config.mib_per_chunk)
            most = transport.max_chunk_bytes(config.mib_per_chunk)
            transport.take_frames_of(self._pull, self._bound, most)
        except (ConfigError, EsyncError) as error:
            self._fail(error)
            return
        if snapshot is not None:
            self._version = snapshot.version
        self.thread = TensorThread(
            self._pull,
            self._xpub,
            self._backend,
            config,
            self._server.post_threadsafe,
            shard=message.rank,
            envelope=envelope,
            resume=snapshot,
            checkpoints=checkpoints,
            checkpoint_s=self.config.checkpoint_s,
        )
        self.shard = message.rank
        self._journal.close()
        self._journal = self._journal_of(message.rank)
        self.thread.start()
        told = {name: value for name, value in self.endpoints.items() if name != "token"}
        self._journal.write("welcome", endpoints=told, device=self._backend.name)
        self._say(f"averaging for mode {config.mode}; updates at {self.endpoints['push']}")

    def _journal_of(self, shard: int) -> Journal:
        role = f"ps{shard}" if shard else "ps"
        return Journal(self._run_dir / f"{role}.jsonl" if self._run_dir else None, role)

    def _welcomed_again(self, message: Welcome, envelope: Envelope) -> None:
        """The state server did not know us: it is another life of it."""
        assert self.thread is not None
        assert self._welcome is not None
        if not self._rejoins:
            return
        self._rejoins = False
        if message.config != self._welcome.config or message.rank != self._welcome.rank:
            text = "the state server came back with another configuration; start it with the same"
            self._fail(EsyncError(text))
            return
        self.thread.inbox.put(Welcomed(envelope))
        self._say("the state server is back")

    def _checkpoints(
        self, shard: int, chunk_mib: int
    ) -> tuple[Checkpoints | None, Snapshot | None]:
        """Where checkpoints go, and the one to go on from.

        Raises:
            ModelError: it is in other chunks, and cannot be cut anew.
        """
        if self._run_dir is None:
            return None, None
        directory = self._run_dir / CHECKPOINTS
        checkpoints = Checkpoints(directory, self.config.keep_checkpoints, shard)
        if not self._resume:
            return checkpoints, None
        snapshot = checkpoints.latest(self._say)
        if snapshot is None:
            self._say(f"no checkpoint in {directory}: the run begins with a new model")
        else:
            snapshot = cut_anew(snapshot, chunk_mib)
            self._say(f"going on from version {snapshot.version}, in {directory}")
        return checkpoints, snapshot

    def _on_members(self, peer: bytes, message: Members) -> None:
        if peer == LOCAL:  # from the tensor thread: it goes by this epoch now
            self._server.send(b"", message)
            return
        try:
            if message.layout is not None:
                Layout.from_wire(message.layout).cut(self.thread.shards if self.thread else 1)
            if not all(type(rank) is int for rank in message.workers.values()):
                raise ModelError("members: ranks are integers")
        except ModelError as error:
            raise MessageError("bad-layout", str(error)) from error
        if self.thread is not None:
            self.thread.inbox.put(message)

    def _on_new_version(self, peer: bytes, event: NewVersion) -> None:
        self._version = event.version
        self._server.send(
            b"",
            Reset(self.name, event.version, event.early_s, event.bytes_up, event.bytes_down),
        )
        self._journal.write(
            "round",
            round=event.version,
            early_s={w: rounded(s) for w, s in event.early_s.items()},
            bytes_up=event.bytes_up,
            bytes_down=event.bytes_down,
        )

    def _on_lost(self, peer: bytes, event: Lost) -> None:
        if peer == LOCAL:  # from the tensor thread
            self._server.send(b"", Lost(self.name, event.peer))

    def _on_leave(self, peer: bytes, message: Leave) -> None:
        """The run is over (from the state server), or we were told to end (posted here)."""
        if self._left:
            return
        self._left = True
        if self.page is not None:
            self.page.ending("ended: the model is being written")
        self._end_thread()
        farewell = message.reason if peer == LOCAL else "done"
        # After what the thread has told.
        self._server.post_threadsafe(Ended(message.reason, farewell))

    def _on_ended(self, peer: bytes, event: Ended) -> None:
        """The tensor thread has ended, and its last version is in the log."""
        if self.thread is not None and self._run_dir is not None:
            self.thread.save_checkpoint()
            path = self._run_dir / model_name(self.thread.shard, self.thread.shards)
            if self.thread.save(path):
                self._say(f"final model: {path}")
        refused = dict(self.thread.counters) if self.thread else {}
        shared = self.thread.bytes_shared if self.thread else 0
        self._journal.write("leave", reason=event.reason, refused=refused, bytes_shared=shared)
        self._server.send(b"", Leave(self.name, event.farewell[: messages.MAX_TEXT]))
        self._server.stop()

    def _on_error(self, peer: bytes, message: Error) -> None:
        if message.code == "unknown-worker" and self.thread is not None:
            if not self._rejoins:
                self._rejoins = True
                self._say("the state server does not know us: it was restarted. Joining it again")
                self._server.send(b"", self._join_message())
            return
        error = ProtocolError(message.code, message.text)
        if message.code in PLACE_TAKEN and self.thread is None and self._resume:
            if self._refusal is None:
                self._say(f"{message.text}. Waiting, in case that it is gone")
            self._refusal = error
            return
        self._fail(error)

    def _on_refused(self, error: MessageError) -> None:
        if error.code == "version-mismatch":
            self._fail(ProtocolError(error.code, error.text))

    def _on_failure(self, peer: bytes, event: Failure) -> None:
        known = isinstance(event.error, EsyncError)
        self._fail(event.error if known else EsyncError(f"the tensor thread failed: {event.error}"))

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._server.send(b"", Leave(self.name, str(error)[:200]))
        self._server.stop()

    def _end_thread(self) -> None:
        if self.thread is None:
            self._pull.close(0)
            self._xpub.close(0)
        elif self.thread.is_alive():
            self.thread.inbox.put(None)
            self.thread.join(timeout=10)
