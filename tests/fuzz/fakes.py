"""In place of sockets and clocks."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import zmq

from esync import messages, transport
from esync.errors import TransportError
from esync.messages import Message
from esync.messaging import MessageServer


class Clock:
    """Stands still unless it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def module(self) -> Any:
        """In place of the module `time`."""
        return types.SimpleNamespace(monotonic=self, perf_counter=self, time=self)


class Frame:
    """A frame as it is received without a copy."""

    def __init__(self, data: bytes) -> None:
        self.buffer = memoryview(data)


class Socket:
    """Keeps what is sent, in messages of frames, and hands out what is put into `arrived`."""

    def __init__(self, kind: int = zmq.DEALER) -> None:
        self.sent: list[list[bytes]] = []
        self.arrived: deque[Any] = deque()
        self._kind, self._begun = kind, False

    def getsockopt(self, option: int) -> int:
        return self._kind if option == zmq.TYPE else 0

    def send(self, frame: Any, flags: int = 0, **options: Any) -> None:
        if not self._begun:
            self.sent.append([])
        self.sent[-1].append(bytes(frame))
        self._begun = bool(flags & zmq.SNDMORE)

    def send_multipart(self, frames: Any, *flags: int, **options: Any) -> None:
        self.sent.append([bytes(frame) for frame in frames])

    def recv(self, flags: int = 0) -> Any:
        if not self.arrived:
            raise zmq.Again
        return self.arrived.popleft()

    def recv_multipart(self, flags: int = 0, copy: bool = True) -> Any:
        return self.recv()

    def close(self, linger: int = 0) -> None:
        pass


def connected(context: Any, endpoint: str, *options: Any) -> Socket:
    """In place of `transport.push` and `transport.sub`.

    Raises:
        TransportError: as there, and where ZeroMQ does not connect to what looks like an endpoint.
    """
    transport.check_endpoint(endpoint)
    port = endpoint.rpartition(":")[2]
    if endpoint.startswith("tcp://") and not (port.isdecimal() and int(port) < 65536):
        raise TransportError(f"cannot connect to {endpoint}")
    return Socket()


@contextmanager
def replaced(clock: Clock, *modules: Any, **transports: Callable[..., Any]) -> Iterator[None]:
    """Without a clock in these modules, and with these functions in place of `esync.transport`'s."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "time", clock.module()))
        for name, function in transports.items():
            stack.enter_context(mock.patch.object(transport, name, function))
        yield


class Wire:
    """A message server whose socket is none: what comes is handled at once, what is answered is kept.

    Attributes:
        answers: (peer, message), of what left since `take` was called.
    """

    def __init__(self, server: MessageServer, socket: Socket) -> None:
        self.server, self._socket = server, socket

    def gets(self, peer: bytes, frame: Any) -> None:
        """Handle a frame, frames, or a local event.

        Raises:
            AssertionError: the handler failed.
        """
        self.server._handle(peer, frame, "")
        self.server._flush()
        failed = self.server.counters["internal"]
        assert not failed, f"a handler failed with {frame!r:.300} of {peer!r}"

    def take(self) -> list[tuple[bytes, Message]]:
        """What was answered; whatever that is, it can be read."""
        sent, self._socket.sent = self._socket.sent, []
        return [(frames[0], messages.decode(frames[-1])) for frames in sent]
