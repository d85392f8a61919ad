"""The asyncio message server: receiver -> FIFO queue -> router -> handlers -> sender.

The receiver drains the socket into the queue and does nothing else. The router, one task, takes messages off in
order of arrival, checks them, and calls the one handler registered for the type. Handlers answer through the
sender. Only the router's task runs handlers, so what they share needs no lock.

With limits (`esync.limits`) what one peer sends beyond them is dropped when it is received, before it is decoded, and
members take turns in the queue, so that one that floods it delays no other.

A server is a socket and its handlers:

    server = MessageServer(socket)
    server.on(messages.Query, answer)       # answer(peer: bytes, message: Query) -> None
    await server.run()

It serves a ROUTER (many peers, told apart by their identity) and a DEALER (one peer, called b"") alike.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, TypeVar

import zmq

from esync import handshake, messages
from esync.fault_log import FaultLog
from esync.limits import Limits, Queue, Standing, Verdict
from esync.messages import Error, Message, MessageError

log = logging.getLogger("esync.messaging")
M = TypeVar("M")
LOCAL = b"\0local"
"""The peer of events that this process put on the queue itself."""
INTERNAL = "internal"
"""The code of an error that is this side's own defect."""
TOO_MANY = "too-many"
"""The code of an error that says that a peer's messages are dropped."""
DRAIN = 256
"""Messages taken off the socket before the router gets a turn."""
DROPS = 16
"""Of these, at most so many are dropped: a flood waits on its own connection meanwhile."""
QUEUED = 100_000
"""When so many messages wait and there are no limits, no more are taken off the socket, so that its high-water mark
holds the sender back."""
NOTHING = messages.encode(messages.Status())
"""A message that says nothing."""
# Plain integers: combining pyzmq's enumerations takes longer than sending a message.
NOBLOCK = int(zmq.NOBLOCK)
NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
POLLIN = int(zmq.POLLIN)


class MessageServer:
    """Receives, queues, routes and answers messages on one socket; see the module's docstring.

    Args:
        socket: a bound ROUTER or a connected DEALER; used only from the loop's thread.
        limits: what one peer may send; None: as much as it likes.
        standing: what a peer is to this server, for the limits.
        check: called before each message's handler with the peer, the message and the public key that it came by (on
            a CURVE server); raises MessageError to refuse it.

    Attributes:
        counters: refused messages by reason.
        unsent: answers whose receiver was gone or did not take them.
        on_refused: called when a DEALER's peer sent something unusable.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        *,
        limits: Limits | None = None,
        standing: Callable[[bytes], Standing] = lambda peer: Standing.STRANGER,
        check: Callable[[bytes, Message, str], None] | None = None,
    ) -> None:
        self.socket = socket
        self.counters: Counter[str] = Counter()
        self.unsent = 0
        self._faults = FaultLog(log)
        self.on_refused: Callable[[MessageError], None] = lambda error: None
        self._routed = socket.getsockopt(zmq.TYPE) == zmq.ROUTER
        self._handlers: dict[type, Callable[[bytes, Any], None]] = {}
        self._check = check
        self._queue: Queue[tuple[bytes, Any, str]] = Queue(limits, standing)
        self._outbox: deque[tuple[bytes, bytes]] = deque()
        self._limits = limits
        self._wake: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._routing = False
        self._left = (
            False  # the socket was not drained, and may say nothing about what is left on it
        )

    def on(self, kind: type[M], handler: Callable[[bytes, M], None]) -> None:
        """Register the one handler for a message type (or for a local event's class)."""
        self._handlers[kind] = handler

    def post(self, event: object) -> None:
        """Put a local event on the queue: its handler runs in turn, like any message's."""
        self._queue.post((LOCAL, event, ""))
        if self._wake is not None:
            self._wake.set()

    def post_threadsafe(self, event: object) -> None:
        """`post` from another thread; dropped once the server has ended."""
        if self._loop is not None and not self._closing:
            try:
                self._loop.call_soon_threadsafe(self.post, event)
            except RuntimeError:  # the loop closed in between
                pass

    def send(self, peer: bytes, message: Message) -> None:
        """Hand a message to the sender; it leaves when the handler at work has returned."""
        self._outbox.append((peer, messages.encode(message)))
        if not self._routing and self._wake is not None:
            self._wake.set()

    def reaches(self, peer: bytes) -> bool:
        """Whether a peer of a ROUTER has a connection; from a handler. Found out by saying nothing to it."""
        try:
            self.socket.send(peer, NOBLOCK_MORE)
            self.socket.send(NOTHING, NOBLOCK)
        except zmq.Again:  # it has, but takes nothing at the moment
            return True
        except zmq.ZMQError:
            return False
        return True

    @property
    def queued(self) -> int:
        """Messages that have arrived and were not looked at yet; from any thread."""
        return len(self._queue)

    def stop(self) -> None:
        """Let `run` return after what is queued has been handled and answered."""
        self._closing = True
        if self._wake is not None:
            self._wake.set()

    async def run(self) -> None:
        """Serve until `stop`."""
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        descriptor = int(self.socket.getsockopt(zmq.FD))
        self._loop.add_reader(descriptor, self._receive)
        try:
            self._receive()
            if self._queue:  # what was posted before
                self._wake.set()
            await self._route()
        finally:
            self._loop.remove_reader(descriptor)
            self._closing = True
            self._faults.close()

    def _receive(self) -> None:
        """Receiver: drain the socket into the queue.

        ZeroMQ's descriptor is edge-triggered: it stays silent about messages that were already there
        when somebody last looked, and sending is looking. So this drains until the socket says that nothing
        is left, and the router asks the socket again after its sends.
        """
        if self._closing:  # or a flood would keep it from that
            return
        queue, socket, drops, now = self._queue, self.socket, 0, time.monotonic()
        for _ in range(DRAIN):
            if drops >= DROPS or (self._limits is None and len(queue) >= QUEUED):
                break
            try:
                peer = socket.recv(NOBLOCK) if self._routed else b""
                frame = socket.recv(NOBLOCK, copy=False)
            except zmq.Again:
                break
            size, frames = len(frame), 1
            more = frame.more
            while more:  # nothing has more than one: they are not kept
                rest = socket.recv(NOBLOCK, copy=False)
                size, frames, more = size + len(rest), frames + 1, rest.more
            key = handshake.user_of(frame) if self._check is not None else ""
            entry = peer, frame.bytes if frames == 1 else frames, key
            verdict = queue.put(peer, size, entry, now)
            if verdict is not Verdict.TAKEN:
                drops += 1
                self._drop(peer, tell=verdict is Verdict.TELL)
        self._left = drops >= DROPS
        if (queue or self._left) and self._wake is not None:
            self._wake.set()

    def _drop(self, peer: bytes, *, tell: bool) -> None:
        assert self._limits is not None
        if not tell:
            self.counters[TOO_MANY] += 1
            return
        text = (
            f"more than {self._limits.rate:g} messages a second, or {self._limits.waiting} at once: what is beyond "
            "that is dropped. Send less, or raise max_rate in [state]"
        )
        self.refuse(peer, MessageError(TOO_MANY, text))

    async def _route(self) -> None:
        """Router: take messages off the queue in order and call their handlers."""
        assert self._wake is not None
        while True:
            self._flush()  # what was not sent by a handler
            self._routing = True
            for _ in range(min(len(self._queue), DRAIN)):
                self._handle(*self._queue.take())
                self._flush()
            self._routing = self._left = False
            if int(self.socket.get(zmq.EVENTS)) & POLLIN:
                self._receive()
            if self._queue or self._left:
                await asyncio.sleep(0)  # timers and other readers get their turn
                continue
            if self._closing:
                return
            self._wake.clear()
            await self._wake.wait()

    def _handle(self, peer: bytes, frame: Any, key: str) -> None:
        try:
            if peer is LOCAL:
                self._handlers[type(frame)](peer, frame)
                return
            if type(frame) is not bytes:
                raise MessageError("bad-frames", f"expected one frame, got {frame}")
            message = messages.decode(frame)
            if self._check is not None:
                self._check(peer, message, key)
            handler = self._handlers.get(type(message))
            if handler is None:
                raise MessageError("unexpected-type", f"{message.TYPE} is not for this server")
            handler(peer, message)
        except MessageError as error:
            self.refuse(peer, error)
        except Exception as error:
            # A handler's defect must cost its sender an answer and nobody else anything.
            reason, text = f"failed with {type(error).__name__}", f"handling {frame!r:.200} failed"
            self._faults.say(_name_of(peer), reason, text, level=logging.ERROR, exc_info=True)
            if peer is not LOCAL:
                self.refuse(peer, MessageError(INTERNAL, "the server failed to handle it"))

    def refuse(self, peer: bytes, error: MessageError) -> None:
        """Answer with an error and count it; a DEALER's one peer is never answered, to avoid echoes."""
        self.counters[error.code] += 1
        if error.code != INTERNAL:  # that has been said, with where it happened
            self._faults.say(_name_of(peer), error.code, f"refused: {error.code}: {error.text}")
        if self._routed:
            self.send(peer, Error(error.code, error.text[: messages.MAX_TEXT]))
        else:
            self.on_refused(error)

    def _flush(self) -> None:
        """Sender: everything in the outbox leaves; a peer that is gone or full costs only its own message."""
        socket, outbox = self.socket, self._outbox
        while outbox:
            peer, frame = outbox.popleft()
            try:
                if self._routed:
                    socket.send(peer, NOBLOCK_MORE)
                socket.send(frame, NOBLOCK)
            except zmq.ZMQError as error:
                self.unsent += 1
                log.debug("no answer to %r: %s", peer, error)


def _name_of(peer: bytes) -> bytes | str:
    """Whose fault it is, for the log: a worker's name, or who else this is."""
    if peer is LOCAL:
        return "this process"
    if not peer:  # a DEALER's one peer
        return "the server"
    return peer if peer.startswith(b"\0") else peer.partition(b"\0")[0]
