"""A worker's input and output, in a thread beside its training: heartbeats and answers never wait for a step.

The training thread and this one share a `Session` and a few flags under one lock; the training thread waits on
`changed`. Everything to be sent goes through a mailbox.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from esync import messages, transport
from esync.compression import Compressor, Payload
from esync.errors import EsyncError, ProtocolError, TransportError
from esync.mailbox import Mailbox
from esync.messages import (
    HERE,
    INITIAL,
    NO_SHARED_MEMORY,
    WIRE,
    Error,
    Fetch,
    Have,
    Join,
    Leave,
    Message,
    MessageError,
    Model,
    Offer,
    Report,
    Response,
    Status,
    Update,
    Want,
    Welcome,
)
from esync.shared_memory import MODEL_SLOTS, UPDATE_SLOTS, WRITING, Region, SharedMemoryError
from esync.tensors import Layout, Vector
from esync.worker.assembly import Assembly
from esync.worker.session import Session

log = logging.getLogger("esync.worker")
POLL_MS = 250
NAME_TAKEN_S = 8.0
"""How long to try for a name that somebody else seems to have."""
RETRY_S = 1.0
"""After so long without progress what was asked for is asked for again."""


@dataclass(slots=True)
class Push:
    """To this thread: send an update.

    Attributes:
        payloads: chunk -> its encoding and bytes, once they have been sent: what is lost is sent again as it was.
    """

    flat: Vector
    round: int
    steps: int
    samples: int
    payloads: dict[int, tuple[str, Payload]] = field(default_factory=dict)


@dataclass(slots=True)
class Shared:
    """What both threads see, under `changed`'s lock."""

    welcome: Welcome | None = None
    session: Session | None = None
    assembly: Assembly | None = None
    compressor: Compressor | None = None
    error: EsyncError | None = None
    phase: str = "loading"
    awaiting: int | None = None  # the training thread waits for a model newer than this
    initial: Push | None = None
    accepted: bool = False  # the layout was accepted
    update: Push | None = None
    resumed: float | None = None  # when the running local step began; None between two steps
    changed: threading.Condition = field(default_factory=threading.Condition)


class Link(threading.Thread):
    """One worker's connections.

    Args:
        state: the state server's endpoint.
        join: what to register as; sent again whenever the state server does not know us.
        wait_s: how long to wait for the state server's first answer.
        say: tells the user what is being waited for.
    """

    def __init__(
        self,
        state: str,
        join: Join,
        *,
        wait_s: float,
        context: zmq.Context[Any],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(name="esync-link", daemon=True)
        transport.check_endpoint(state)
        self.shared = Shared()
        self.inbox: Mailbox[Message | Push | Layout | None] = Mailbox()
        self._state, self._join, self._wait_s = state, join, wait_s
        self._context, self._say = context, say
        self._control = transport.dealer(context, join.worker, state)
        self._push: zmq.Socket[bytes] | None = None
        self._sub: zmq.Socket[bytes] | None = None
        self._outgoing: deque[list[Any]] = deque()
        self._memory: Region | None = None  # of ours, where updates are put for the server
        self._offered_to = ""  # the incarnation of the server
        self._offered_at: float | None = None  # until there is an answer
        self._puts = False  # updates into it: the server has mapped it
        self._listens_to: list[bytes] = []  # topics besides our own
        self._poller = zmq.Poller()
        self._lost_at: float | None = None
        self._monitor = self._control.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._last_said = ""
        self._answered = False
        self._began = 0.0
        self._joined_at = 0.0
        self.progress_at = 0.0
        self._beat_at = 0.0

    def run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            log.exception("the worker's link failed")
            self._fail(EsyncError(f"the worker's input/output failed: {error}"))
        finally:
            self._monitor.close(0)
            self._control.close()
            for socket in (self._push, self._sub):
                if socket is not None:
                    socket.close()
            self.inbox.close()

    def _serve(self) -> None:
        poller = self._poller
        poller.register(self.inbox.fileno(), zmq.POLLIN)
        poller.register(self._control, zmq.POLLIN)
        monitor = self._monitor
        poller.register(monitor, zmq.POLLIN)
        self._began = time.monotonic()
        self._send_join()
        while True:
            ready = dict(poller.poll(self._poll_ms()))
            if self.inbox.fileno() in ready:
                for item in self.inbox.take():
                    if item is None:
                        return
                    self._outbound(item)
            if monitor in ready:
                up = recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
                self._lost_at = None if up else self._lost_at or time.monotonic()
            if self._control in ready:
                self._drain(self._control, self._on_control)
            if self._sub is not None and self._sub in ready:
                self._drain(self._sub, self._on_data)
            if self._outgoing:
                self._flush()
            self._on_time(time.monotonic(), self._began)

    def _poll_ms(self) -> int:
        if self.shared.welcome is None:
            return POLL_MS
        until_beat = int((self._beat_at - time.monotonic()) * 1000)
        return min(POLL_MS, max(1, until_beat))

    # To the servers

    def _outbound(self, item: Message | Push | Layout) -> None:
        if isinstance(item, Push):
            self.progress_at = time.monotonic()
            self._queue_update(item)
        elif isinstance(item, Layout):
            self._join.layout = item.to_wire()
            self._send_join()
        elif isinstance(item, Fetch | Have | Offer):
            if self._push is not None:
                self._outgoing.append([messages.encode(item)])
                self._flush()
        else:
            self._send(item)

    def _send(self, message: Message) -> None:
        try:
            self._control.send(messages.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.warning("the state server takes no messages: a %s was dropped", message.TYPE)

    def _send_join(self) -> None:
        self._joined_at = time.monotonic()
        self._send(self._join)

    def _queue_update(self, item: Push, chunks: list[int] | None = None) -> None:
        """Send these chunks of an update, or all of them, each as soon as it is encoded."""
        assembly, compressor = self.shared.assembly, self.shared.compressor
        assert assembly is not None
        assert compressor is not None
        layout = assembly.layout
        for i in range(len(layout.chunks)) if chunks is None else chunks:
            header = Update(
                self._join.worker,
                item.round,
                i,
                layout.digest,
                item.steps,
                item.samples,
                incarnation=assembly.incarnation,
            )
            part = item.flat[layout.chunks[i].start : layout.chunks[i].stop]
            if self._puts and self._memory is not None:
                in_place = item.flat is self._memory.whole(0)
                self._put(self._memory, i, part, item.round, in_place=in_place)
                header.slot = 0
                self._outgoing.append([messages.encode(header)])
            else:
                if i not in item.payloads:
                    item.payloads[i] = compressor.encode(i, part, item.round)
                header.encoding, payload = item.payloads[i]
                self._outgoing.append([messages.encode(header), payload])
            self._flush()

    def _put(self, memory: Region, chunk: int, part: Vector, round: int, *, in_place: bool) -> None:
        """Put a chunk of an update where the parameter server reads it, unless it is there."""
        if memory.stamps[0, chunk] != round:
            if not in_place:
                np.copyto(memory.begin(0, chunk), part)
            memory.finish(0, chunk, round)

    def buffer(self) -> Vector:
        """Where to put the next update, from any thread: memory that the parameter server reads, or of our own."""
        memory, assembly = self._memory, self.shared.assembly
        assert assembly is not None
        if self._puts and memory is not None:
            memory.stamps[:] = WRITING
            return memory.whole(0)
        return assembly.vectors.take()

    def _flush(self) -> None:
        """Send what the data socket takes; it says when it takes more."""
        push = self._push
        assert push is not None
        while self._outgoing:
            try:
                push.send_multipart(self._outgoing[0], zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self._poller.register(push, zmq.POLLOUT)
                return
            self._outgoing.popleft()
        self._poller.register(push, 0)

    # From the servers

    def _drain(self, socket: zmq.Socket[bytes], handle: Callable[[list[zmq.Frame]], None]) -> None:
        for _ in range(64):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                handle(frames)
            except MessageError as error:
                log.warning("a server sent something unusable: %s: %s", error.code, error.text)
                if error.code == "version-mismatch":
                    self._fail(ProtocolError(error.code, error.text))

    def _on_control(self, frames: list[zmq.Frame]) -> None:
        message = messages.decode(frames[0].buffer)
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
        with shared.changed:
            shared.welcome = message
            if self._join.layout is not None:
                shared.accepted = True
                if shared.session is not None:
                    shared.session.ask_again()
            shared.changed.notify_all()
        self._last_said = ""
        if self._join.layout is not None and self._sub is None:
            self._connect_data(message)

    def _connect_data(self, message: Welcome) -> None:
        push, model = message.endpoints.get("push"), message.endpoints.get("model")
        if not isinstance(push, str) or not isinstance(model, str):
            raise MessageError("bad-field", "welcome.endpoints need push and model")
        push, model = (transport.resolved(x, self._state) for x in (push, model))
        self._push = transport.push(self._context, push)
        evaluator = self._join.role == "evaluator"
        own = f"{'e' if evaluator else 'w'}/{self._join.worker}/".encode()
        # Before our own: when the server sees that, word of what lies in shared memory is heard already.
        self._listens_to = [] if evaluator else [WIRE, HERE]
        self._sub = transport.sub(self._context, model, [*self._listens_to, own])
        self._poller.register(self._sub, zmq.POLLIN)
        self.progress_at = time.monotonic()

    def _on_error(self, message: Error) -> None:
        if message.code == "unknown-worker":
            log.info("the state server does not know us (any more): joining again")
            if time.monotonic() - self._joined_at > RETRY_S:
                self._send_join()
            return
        if message.code == "name-taken" and time.monotonic() - self._began < NAME_TAKEN_S:
            self._tell(message.text)  # the one that was killed is soon forgotten
            return
        if message.code == NO_SHARED_MEMORY:
            log.info("the exchange goes over sockets: %s", message.text)
            again = self._puts  # it had been mapped: offer it once more, with the next model
            self._share(None)
            if again:
                self._offered_to = ""
            else:
                self._listen_to(WIRE)
            return
        self._fail(ProtocolError(message.code, message.text))

    def _on_data(self, frames: list[zmq.Frame]) -> None:
        if len(frames) < 2:
            raise MessageError("bad-frames", "a model message has a topic and a header")
        message = messages.decode(frames[1].buffer)
        shared = self.shared
        if isinstance(message, Model):
            if len(frames) != (3 if message.slot < 0 else 2):
                raise MessageError("bad-frames", "a model message has one payload or a slot")
            assert shared.assembly is not None
            if frames[0].buffer == HERE and self._puts:
                self._listen_to(HERE)  # everything that came as WIRE before this is here
            self.progress_at = time.monotonic()
            self._meet(message.incarnation)
            payload = frames[2].buffer if message.slot < 0 else None
            complete = shared.assembly.add(
                message, payload
            )  # only this thread does; no lock for a copy
            if complete:
                with shared.changed:
                    self._begin_if_away()
                    shared.changed.notify_all()
            welcome = shared.welcome
            if complete and welcome is not None and welcome.config.get("slowest_first"):
                self._outbound(Have(self._join.worker, message.version))
        elif isinstance(message, Want):
            self._meet(message.incarnation)
            self._on_want(message)
        elif isinstance(message, Offer):
            self._on_offer(message)
        elif isinstance(message, Error):
            self._on_error(message)

    # Shared memory

    def _meet(self, incarnation: str) -> None:
        """Offer memory to a parameter server that we have not met yet; until it takes it, sockets carry everything."""
        welcome, assembly = self.shared.welcome, self.shared.assembly
        if incarnation in ("", self._offered_to) or welcome is None or assembly is None:
            return
        self._offered_to = incarnation
        self._share(None)
        if not welcome.config.get("shared_memory") or self._join.role != "worker":
            return
        try:
            self._memory = self._memory or Region.create(assembly.layout, UPDATE_SLOTS)
        except SharedMemoryError as error:
            log.info("the exchange goes over sockets: %s", error)
            return
        self._offer()

    def _offer(self) -> None:
        assert self._memory is not None
        self._offered_at = time.monotonic()
        self._outbound(self._memory.offer(self._join.worker, self._offered_to))

    def _on_offer(self, offer: Offer) -> None:
        """The parameter server has mapped our memory, and offers its own."""
        assembly = self.shared.assembly
        if assembly is None or offer.incarnation != self._offered_to:
            return
        self._offered_at = None
        try:
            if offer.fd >= 0:  # else only updates go through shared memory
                self._share(Region.open(assembly.layout, MODEL_SLOTS, offer))
            self._puts = True
        except SharedMemoryError as error:
            log.info("the exchange goes over sockets: %s", error)
            self._outbound(Offer(self._join.worker, "", 0, -1, "", offer.incarnation))

    def _share(self, region: Region | None) -> None:
        """Have models in this memory of the parameter server from now on; None: over the socket, and updates too."""
        self._puts, self._offered_at = False, None
        assert self.shared.assembly is not None
        with self.shared.changed:
            self.shared.assembly.share(region)
        if self._listens_to:
            self._listen_to(WIRE, HERE)

    def _listen_to(self, *topics: bytes) -> None:
        """Subscribe to these broadcasts and no others; the new ones first, so that nothing is missed."""
        assert self._sub is not None
        for topic in topics:
            if topic not in self._listens_to:
                self._sub.subscribe(topic)
        for topic in self._listens_to:
            if topic not in topics:
                self._sub.unsubscribe(topic)
        self._listens_to = list(topics)

    def _begin_if_away(self) -> None:
        """A worker that overlaps is in the new round from now on, in the middle of a step."""
        session, assembly = self.shared.session, self.shared.assembly
        assert assembly is not None
        if session is not None and session.away and assembly.version > session.round:
            session.begin(assembly.version)
            self.shared.awaiting = None
            resumed = self.shared.resumed
            self._send(session.query(running_s=time.perf_counter() - resumed if resumed else 0.0))

    def _on_want(self, message: Want) -> None:
        """The parameter server lacks something of ours."""
        shared = self.shared
        with shared.changed:
            assert shared.assembly is not None
            welcome, update, initial = shared.welcome, shared.update, shared.initial
            count = len(shared.assembly.layout.chunks)
            shared.assembly.served_by(message.incarnation)
        chunks = [i for i in message.chunks if type(i) is int and 0 <= i < count]
        if message.round == INITIAL:
            mine = welcome is not None and welcome.rank == 0
            if initial is not None and (chunks or mine):
                self._queue_update(initial, chunks or None)
        elif update is not None and update.round == message.round:
            self._queue_update(update, chunks)

    # As time goes by

    def _on_time(self, now: float, began: float) -> None:
        shared = self.shared
        if not self._answered:
            if now - began > 2.0:
                self._tell(f"waiting for the state server at {self._state}")
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
            self._beat_at = now + min(2.0, shared.welcome.heartbeat_s / 4)
            self._beat()
        if self._offered_at is not None and now - self._offered_at > RETRY_S:
            self._offer()
        if shared.awaiting is not None and now - self.progress_at > RETRY_S:
            self.progress_at = now
            self.fetch()

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

    def fetch(self) -> None:
        """Ask the parameter server for whatever the training thread waits for."""
        shared = self.shared
        with shared.changed:
            if shared.assembly is None or shared.awaiting is None:
                return
            version, missing = shared.assembly.missing()
            update = shared.update
            pushed = update.round if update and update.round == shared.awaiting else -1
            message = Fetch(self._join.worker, shared.awaiting, pushed, version, missing)
        self._outbound(message)

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
            self.inbox.put(Leave(self._join.worker, reason, self._join.life))
            self.inbox.put(None)
            self.join(timeout=5)
