"""A worker's input and output, in a thread beside its training: heartbeats and answers never wait for a step.

The training thread and this one share a `Session` and a few flags under one lock; the training thread waits on
`changed`. Everything to be sent goes through a mailbox.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import zmq

from esync import device_memory, messages, transport
from esync.compression import Compressor
from esync.config import RunConfig, build
from esync.device_memory import Array
from esync.errors import ConfigError, EsyncError, ProtocolError, TransportError
from esync.fault_log import FaultLog
from esync.handshake import MAX_TOKEN, Token
from esync.keys import ClientKeys
from esync.mailbox import Mailbox
from esync.messages import (
    INITIAL,
    Error,
    Join,
    Leave,
    Message,
    MessageError,
    Report,
    Response,
    Status,
    Welcome,
)
from esync.seal import Envelope
from esync.shared_memory import UPDATE_SLOTS, WRITING, Region, SharedMemoryError
from esync.tensors import Layout, Vector
from esync.worker.assembly import Shards
from esync.worker.channel import RETRY_S, Address, Channel, Push
from esync.worker.session import Session

log = logging.getLogger("esync.worker")
POLL_MS = 250
ASK_WHERE_S = 10.0
"""After so long without progress a worker joins once more, to be told where the parameter servers are: what told it
that they listen elsewhere, or have another token, may be lost."""
LONG_LOST_S = 3.0
"""After so long without the state server the connections to parameter servers are made anew."""
NAME_TAKEN_S = 8.0
"""How long to try for a name that somebody else seems to have."""


@dataclass(frozen=True, slots=True)
class Ask:
    """To this thread: ask for the model that is awaited, now."""


@dataclass(slots=True)
class Shared:
    """What both threads see, under `changed`'s lock."""

    welcome: Welcome | None = None
    session: Session | None = None
    model: Shards | None = None
    compressors: list[Compressor] = field(default_factory=list)  # of each shard
    error: EsyncError | None = None
    phase: str = "loading"
    awaiting: tuple[int, ...] | None = (
        None  # the training thread waits for newer versions than these
    )
    initial: Push | None = None
    accepted: bool = False  # the layout was accepted
    update: Push | None = None
    cuda: Callable[[], int | None] = lambda: None  # the CUDA device on which models are, if any
    resumed: float | None = None  # when the running local step began; None between two steps
    changed: threading.Condition = field(default_factory=threading.Condition)


class Link(threading.Thread):
    """One worker's connections.

    Args:
        state: the state server's endpoint.
        join: what to register as; sent again whenever the state server does not know us.
        wait_s: how long to wait for the state server's first answer.
        keys: of this worker, if the servers have keys.
        say: tells the user what is being waited for.
    """

    def __init__(
        self,
        state: str,
        join: Join,
        *,
        wait_s: float,
        keys: ClientKeys | None = None,
        context: zmq.Context[Any],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(name="esync-link", daemon=True)
        transport.check_endpoint(state)
        self.shared = Shared()
        self.inbox: Mailbox[Message | Push | Layout | Ask | None] = Mailbox()
        self._state, self._join, self._wait_s = state, join, wait_s
        self._zmq = context  # (from Python 3.14 on threads have a `_context` of their own)
        self._say = say
        self._keys = keys
        identity = messages.peer_of(join.worker, join.life)
        self._control = transport.dealer(context, identity, state, keys)
        self._channels: list[Channel] = []  # to the parameter servers
        # Where updates are put for those on this machine, on a device or not; None: it is not to be had.
        self._memories: dict[bool, Region | None] = {}
        self._poller = zmq.Poller()
        self._lost_at: float | None = None
        self._last_said = ""
        self._faults = FaultLog(log)
        self._answered = False
        self._taken_at: float | None = None  # since when our name is another's
        self._began = 0.0
        self._joined_at = 0.0
        self._beat_at = 0.0

    def run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            log.exception("the worker's link failed")
            self._fail(EsyncError(f"the worker's input/output failed: {error}"))
        finally:
            self._fail(EsyncError("this worker has left the run: it was closed"))
            self._control.close()
            for channel in self._channels:
                channel.close()
            self.inbox.close()
            self._faults.close()

    def _serve(self) -> None:
        poller = self._poller
        poller.register(self.inbox.fileno(), zmq.POLLIN)
        poller.register(self._control, zmq.POLLIN)
        self._began = time.monotonic()
        self._send_join()
        while True:
            ready = dict(poller.poll(self._poll_ms()))
            if self.inbox.fileno() in ready:
                for item in self.inbox.take():
                    if item is None:
                        return
                    self._outbound(item)
            if self._control in ready:
                self._control_messages()
            for channel in self._channels:
                if channel.sub in ready:
                    channel.receive()
                if channel.blocked:
                    channel.flush()
            self._on_time(time.monotonic(), self._began)

    def _poll_ms(self) -> int:
        if self.shared.welcome is None:
            return POLL_MS
        until_beat = int((self._beat_at - time.monotonic()) * 1000)
        return min(POLL_MS, max(1, until_beat))

    # To the servers

    def _outbound(self, item: Message | Push | Layout | Ask) -> None:
        if isinstance(item, Push):
            for channel in self._channels:
                channel.progress_at = time.monotonic()
            self._send_update(item)
        elif isinstance(item, Layout):
            self._join.layout = item.to_wire()
            self._send_join()
        elif isinstance(item, Ask):
            self._fetch(self._channels)
        else:
            self._send(item)

    def _send(self, message: Message) -> None:
        try:
            self._control.send(messages.encode(message), zmq.NOBLOCK)
            self._faults.over(self._join.worker, "dropped")
        except zmq.Again:
            text = f"the state server takes no messages: a {message.TYPE} was dropped"
            self._faults.say(self._join.worker, "dropped", text)

    def _send_join(self) -> None:
        self._joined_at = time.monotonic()
        self._send(self._join)

    def _send_update(self, item: Push) -> None:
        """Send all chunks of an update, each as soon as it is encoded; to all parameter servers in turn, so that no
        link waits for another's."""
        for i in range(max((len(c.chunks) for c in self._channels), default=0)):
            for channel in self._channels:
                if i < len(channel.chunks):
                    self._send_chunk(channel, item, i)

    def _send_chunk(self, channel: Channel, item: Push, chunk: int) -> None:
        model, memory = self.shared.model, channel.whole
        assert model is not None
        at = model.layout.chunks[channel.chunks[chunk]]
        in_place = memory is not None and item.flat is memory.whole(0)
        channel.push_chunk(item, chunk, item.flat[at.start : at.stop], in_place=in_place)

    def buffer(self) -> Vector | Array:
        """Where to put the next update, from any thread: memory that the parameter servers read, or of our own."""
        model = self.shared.model
        assert model is not None
        memory = self._channels[0].whole if self._channels else None
        if memory is not None and all(
            c.puts and c.whole is memory and not c.has_put(model.begun[c.shard])
            for c in self._channels
        ):
            memory.stamps[:] = WRITING
            return memory.whole(0)
        return model.vectors.take()

    def _memories_for(self, shard: int) -> list[Region]:
        """Where our updates can be put for a parameter server if that is on this machine, the best first."""
        welcome = self.shared.welcome
        assert welcome is not None
        if not welcome.config.get("shared_memory") or self._join.role != "worker":
            return []
        known = shard < len(welcome.endpoints)
        device = welcome.endpoints[shard].get("device") if known else ""  # on which it averages
        same = bool(device) and device == device_memory.uuid_of(self.shared.cuda())
        found = [self._memory(on_device=True) if same else None, self._memory(on_device=False)]
        return [memory for memory in found if memory is not None]

    def _memory(self, *, on_device: bool) -> Region | None:
        """Where our updates are put, in memory of the host or of the device on which models are."""
        model, index = self.shared.model, self.shared.cuda() if on_device else None
        assert model is not None
        if on_device not in self._memories:
            self._memories[on_device] = None
            try:
                if index is None:
                    made = device_memory.pinned(
                        Region.create(model.layout, UPDATE_SLOTS), self.shared.cuda()
                    )
                else:
                    made = device_memory.shared(model.layout, UPDATE_SLOTS, index)
                self._memories[on_device] = made
            except SharedMemoryError as error:
                log.info("%s: no shared memory: %s", self._join.worker, error)
        return self._memories[on_device]

    # From the servers

    def _control_messages(self) -> None:
        for _ in range(64):
            try:
                frame = self._control.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._on_control(frame)
            except MessageError as error:
                text = f"the state server sent something unusable: {error.text}"
                self._faults.say(self._join.worker, error.code, text)
                if error.code == "version-mismatch":
                    self._fail(ProtocolError(error.code, error.text))

    def _on_control(self, frame: bytes) -> None:
        message = messages.decode(frame)
        self._answered = True
        shared = self.shared
        if isinstance(message, Response):
            with shared.changed:
                if shared.session is not None:
                    shared.session.on_response(message)
                shared.changed.notify_all()
        elif isinstance(message, Welcome):
            self._on_welcome(message)
        elif isinstance(message, Status):
            if message.waiting_for:
                self._tell(f"waiting for {message.waiting_for}")
        elif isinstance(message, Error):
            self._on_error(message)

    def _on_welcome(self, message: Welcome) -> None:
        shared = self.shared
        if shared.model is not None:
            try:
                theirs = build(RunConfig, message.config, "welcome.config").mib_per_chunk
            except ConfigError as error:
                raise MessageError("bad-field", str(error)) from error
            mine = shared.model.layout.chunk_mib
            if theirs != mine:
                text = (
                    f"the state server came back with chunks of {theirs} MiB, they were of {mine}"
                )
                hint = "start it with the same chunk_mib and workers, or this worker again"
                self._fail(EsyncError(f"{text}; {hint}"))
                return
        doors = [self._door(raw, message) for raw in message.endpoints]
        with shared.changed:
            shared.welcome = message
            if self._join.layout is not None:
                shared.accepted = True
                if shared.session is not None:
                    shared.session.ask_again()
            shared.changed.notify_all()
        self._last_said = ""
        self._join.rank = message.rank  # also if the state server does not know us any more
        self._faults.over(self._join.worker, "unknown-worker")
        if self._join.layout is not None and not self._channels:
            self._connect(doors)
        elif len(doors) == len(self._channels):
            # A parameter server may have come back elsewhere, and a state server with another key.
            for channel, (address, envelope) in zip(self._channels, doors, strict=True):
                channel.connect(address, envelope)

    def _connect(self, doors: list[tuple[Address, Envelope]]) -> None:
        """Connect to the parameter servers."""
        model = self.shared.model
        assert model is not None
        if len(doors) != model.layout.shards:
            text = f"{len(doors)} endpoints for {model.layout.shards} parameter servers"
            raise MessageError("bad-field", f"welcome: {text}")
        for shard, (address, envelope) in enumerate(doors):
            self._channels.append(
                Channel(
                    shard,
                    address,
                    model.assemblies[shard],
                    self.shared.compressors[shard],
                    model.layout.of_shard(shard),
                    worker=self._join.worker,
                    role=self._join.role,
                    memories=partial(self._memories_for, shard),
                    cuda=self.shared.cuda,
                    on_complete=self._on_complete,
                    on_error=self._on_error,
                    on_want=self._on_want,
                    envelope=envelope,
                    context=self._zmq,
                    poller=self._poller,
                )
            )

    def _door(self, raw: Any, welcome: Welcome) -> tuple[Address, Envelope]:
        """Where a parameter server is, as it is reached from here, and how messages with it are sealed."""
        told = raw if isinstance(raw, dict) else {}
        push, model, token = told.get("push"), told.get("model"), told.get("token", "")
        if not (isinstance(push, str) and isinstance(model, str) and isinstance(token, str)):
            raise MessageError("bad-field", "welcome.endpoints need push and model")
        if len(token.encode()) > MAX_TOKEN:
            raise MessageError("bad-field", f"a token has at most {MAX_TOKEN} bytes")
        curve = self._keys if told.get("curve") else None
        address = Address(
            transport.resolved(push, self._state),
            transport.resolved(model, self._state),
            curve or (Token(token) if token else None),
        )
        return address, Envelope(b"" if curve else welcome.key, self._join.worker)

    def _on_error(self, message: Error) -> None:
        if message.code == "unknown-worker":
            text = "the state server does not know us (any more): joining again"
            self._faults.say(self._join.worker, message.code, text)
            if time.monotonic() - self._joined_at > RETRY_S:
                self._send_join()
            return
        if message.code == "name-taken" and not self.shared.accepted:
            now = time.monotonic()
            self._taken_at = self._taken_at or now
            if now - self._taken_at < NAME_TAKEN_S:
                self._tell(message.text)  # the one that was killed is soon forgotten
                return
        self._fail(ProtocolError(message.code, message.text))

    def _on_complete(self) -> None:
        """A shard of the model is there."""
        with self.shared.changed:
            self._begin_if_away()
            self.shared.changed.notify_all()

    def _begin_if_away(self) -> None:
        """A worker that overlaps is in the new round from now on, in the middle of a step."""
        session, model = self.shared.session, self.shared.model
        assert model is not None
        if session is not None and session.away and model.newer:
            newest = model.newest
            assert newest is not None
            model.begin(newest)
            session.begin(newest.version)
            self.shared.awaiting = None
            resumed = self.shared.resumed
            self._send(session.query(running_s=time.perf_counter() - resumed if resumed else 0.0))

    def _on_want(self, channel: Channel, round: int, chunks: list[int]) -> None:
        """A parameter server lacks something of ours."""
        shared = self.shared
        with shared.changed:
            welcome, update, initial = shared.welcome, shared.update, shared.initial
        if round == INITIAL:
            mine = welcome is not None and welcome.rank == 0
            if initial is not None and (chunks or mine):
                for i in chunks or range(len(channel.chunks)):
                    self._send_chunk(channel, initial, i)
        elif update is not None and update.rounds[channel.shard] == round:
            for i in chunks:
                self._send_chunk(channel, update, i)

    # As time goes by

    def _on_time(self, now: float, began: float) -> None:
        shared = self.shared
        lost = transport.is_lost(self._control)
        if self._lost_at is not None and not lost and now - self._lost_at > LONG_LOST_S:
            for channel in self._channels:
                channel.connect_again()  # the same network was gone: TCP would find out later
        self._lost_at = (self._lost_at or now) if lost else None
        if not self._answered:
            if why := transport.refusal(self._control):
                self._fail(TransportError(f"cannot join {self._state}: {why}"))
            if now - began > 2.0:
                self._say_waiting()
            if now - began > self._wait_s:
                self._fail(TransportError(transport.no_state_server(self._state, self._wait_s)))
        elif self._lost_at is not None and now - self._lost_at > self._wait_s:
            text = (
                f"the state server at {self._state} is gone: no connection for {self._wait_s:g} s"
            )
            self._fail(TransportError(text))
        if not shared.accepted and now - self._joined_at > RETRY_S:
            self._send_join()
        if shared.welcome is not None and now >= self._beat_at:
            self._beat_at = now + transport.beat_s(shared.welcome.heartbeat_s)
            self._beat()
        for channel in self._channels:
            channel.on_time(now)
        if shared.awaiting is not None:
            late = [c for c in self._channels if now - c.progress_at > RETRY_S]
            free = [
                c for c in late if not c.blocked
            ]  # else there is nothing to ask before that is sent
            for channel in free:
                channel.progress_at = now
            self._fetch(free)
            if late and shared.accepted and now - self._joined_at > ASK_WHERE_S:
                self._send_join()

    def _say_waiting(self) -> None:
        if not self._last_said:
            self._tell(transport.waiting_for_state(self._state))

    def _beat(self) -> None:
        with self.shared.changed:
            session, phase = self.shared.session, self.shared.phase
            if session is None:
                report = Report(self._join.worker, -1, 0, phase)
            else:
                totals = session.totals.to_wire()
                report = Report(
                    self._join.worker, session.round, session.step, phase, totals=totals
                )
        self._send(report)

    def _fetch(self, channels: list[Channel]) -> None:
        """Ask these parameter servers for whatever the training thread waits for."""
        with self.shared.changed:
            awaiting, update = self.shared.awaiting, self.shared.update
        for channel in channels if awaiting is not None else ():
            assert awaiting is not None
            awaited = awaiting[channel.shard]
            if channel.assembly.version <= awaited:
                mine = update is not None and update.rounds[channel.shard] == awaited >= 0
                channel.fetch(awaited, awaited if mine else -1)

    def _tell(self, text: str) -> None:
        if text != self._last_said:
            self._last_said = text
            self._say(text)

    def _fail(self, error: EsyncError) -> None:
        with self.shared.changed:
            if self.shared.error is None:
                self.shared.error = error
            self.shared.changed.notify_all()

    def close(self, reason: str) -> None:
        """Say goodbye and end the thread."""
        if self.is_alive():
            self.inbox.put(Leave(self._join.worker, reason))
            self.inbox.put(None)
            self.join(timeout=5)
