"""The asyncio message server: receiver -> FIFO queue -> router -> handlers -> sender.

The receiver drains the socket into the queue and does nothing else. The router, one task, takes messages off in
order of arrival, checks them, and calls the one handler registered for the type. Handlers answer through the
sender. Only the router's task runs handlers, so what they share needs no lock.

A server is a socket and its handlers:

    server = MessageServer(socket)
    server.on(messages.Query, answer)       # answer(peer: bytes, message: Query) -> None
    await server.run()

It serves a ROUTER (many peers, told apart by their identity) and a DEALER (one peer, called b"") alike.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, TypeVar

import zmq

from esync import handshake, messages
from esync.fault_log import FaultLog
from esync.messages import Error, Message, MessageError

log = logging.getLogger("esync.messaging")
M = TypeVar("M")
LOCAL = b"\0local"
"""The peer of events that this process put on the queue itself."""
INTERNAL = "internal"
"""The code of an error that is this side's own defect."""
DRAIN = 256
"""Messages taken off the socket before the router gets a turn."""
# Plain integers: combining pyzmq's enumerations takes longer than sending a message.
NOBLOCK = int(zmq.NOBLOCK)
NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
POLLIN = int(zmq.POLLIN)


class MessageServer:
    """Receives, queues, routes and answers messages on one socket; see the module's docstring.

    Args:
        socket: a bound ROUTER or a connected DEALER; used only from the loop's thread.
        queue_limit: when so many messages wait, no more are taken off the socket, so that its
            high-water mark holds the senders back.
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
        queue_limit: int = 100_000,
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
        self._queue: deque[tuple[bytes, Any, str]] = deque()
        self._outbox: deque[tuple[bytes, bytes]] = deque()
        self._limit = queue_limit
        self._wake: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._routing = False

    def on(self, kind: type[M], handler: Callable[[bytes, M], None]) -> None:
        """Register the one handler for a message type (or for a local event's class)."""
        self._handlers[kind] = handler

    def post(self, event: object) -> None:
        """Put a local event on the queue: its handler runs in turn, like any message's."""
        self._queue.append((LOCAL, event, ""))
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
            if self._queue:
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
        queue, socket = self._queue, self.socket
        for _ in range(DRAIN):
            if len(queue) >= self._limit:
                break
            try:
                peer = socket.recv(NOBLOCK) if self._routed else b""
                frame = socket.recv(NOBLOCK, copy=False)
            except zmq.Again:
                break
            key = handshake.user_of(frame) if self._check is not None else ""
            if frame.more:
                queue.append((peer, [frame.bytes, *socket.recv_multipart(NOBLOCK)], key))
            else:
                queue.append((peer, frame.bytes, key))
        if queue and self._wake is not None:
            self._wake.set()

    async def _route(self) -> None:
        """Router: take messages off the queue in order and call their handlers."""
        assert self._wake is not None
        while True:
            self._flush()  # what was not sent by a handler
            self._routing = True
            for _ in range(min(len(self._queue), DRAIN)):
                self._handle(*self._queue.popleft())
                self._flush()
            self._routing = False
            if int(self.socket.get(zmq.EVENTS)) & POLLIN:
                self._receive()
            if self._queue:
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
                raise MessageError("bad-frames", f"expected one frame, got {len(frame)}")
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
    return peer or "the server"  # a DEALER's one peer
