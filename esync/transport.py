"""Endpoints, sockets and their options, the event loop: everything that is decided once about ZeroMQ.

The options follow from measurements: heartbeats on the control channel only (on a back-pressured PULL they
drop live connections), explicit LINGER everywhere (or closing a context can hang), a bound on the size
of every frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import re
import socket as _socket
import time
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

import zmq

from esync import handshake
from esync.errors import TransportError
from esync.handshake import Gate, Token
from esync.keys import ClientKeys, ServerKeys
from esync.seal import MAX_OVERHEAD_BYTES

T = TypeVar("T")
DEFAULT_STATE = "tcp://127.0.0.1:10010"
"""The state server's default endpoint (the port is the one of the 2019 implementation)."""
STATE, NAME, RANK, KEYS = "ESYNC_STATE", "ESYNC_NAME", "ESYNC_RANK", "ESYNC_KEYS"
"""Environment variables by which esync-run tells a program what `esync.Worker()` is to join, and as what."""
MAX_CONTROL_BYTES = 4 << 20
"""Largest frame on the control channel."""
MAX_CHUNK_BYTES = (4 << 20) + MAX_OVERHEAD_BYTES
"""Largest frame on the data channel, unless chunks are larger than 4 MiB: see `max_chunk_bytes`."""
MAX_TOPIC_BYTES = 4096
"""Largest frame that comes in where models go out: a subscription."""
IO_THREADS = 2
"""ZeroMQ's in a parameter server's process: one may copy in while the other copies out."""
CHUNKS_RECEIVED = 1
"""Chunks of each worker that wait at the parameter server to be looked at: they are what its memory grows by."""
CHUNKS_SENT = 64
"""Chunks of an update that wait at the worker to be sent: they are part of the update, and take no memory."""
WINDOW_BYTES, WINDOW_CHUNKS = 32 << 20, 64
"""Of models on the way to one worker at a time: what a link of 10 Gbit/s carries in 25 ms. Where less is on its way,
another chunk may go."""
SUBSCRIBER_HWM = 2 * WINDOW_CHUNKS
"""Messages for one subscriber: a window, and what is said to it besides."""
GIVEN_UP_MS = 15_000
"""After so long without progress a connection that models leave by is given up."""
CONNECT_MS = 3000
"""After so long an attempt to connect is given up for another: the system's own retries get rare."""
HAVE_BYTES, HAVE_CHUNKS = WINDOW_BYTES // 8, WINDOW_CHUNKS // 8
"""A worker says what has arrived at least so often."""
LINGER_MS = 2000
REBIND_S = 5.0
"""So long an address that was let go of is tried again."""


def max_chunk_bytes(chunk_mib: int) -> int:
    """Largest frame on the data channel where chunks have so many MiB: one that is sealed."""
    return max(MAX_CHUNK_BYTES, (chunk_mib << 20) + MAX_OVERHEAD_BYTES)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on uvloop where that is installed, else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def allow_many_connections() -> None:
    """Have this process use as many file descriptors as it may, and not the few that are usual: a worker takes one at
    the state server and three at each parameter server."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def check_endpoint(endpoint: str) -> str:
    """`endpoint` itself, if it is one that esync speaks.

    Raises:
        TransportError: another scheme, or no port.
    """
    url = urlsplit(endpoint)
    if url.scheme in ("ipc", "inproc") and endpoint.split("://", 1)[1]:
        return endpoint
    if url.scheme == "tcp" and re.fullmatch(r"tcp://(\[[^\]]+\]|[^:\[\]]+):(\d+|\*)", endpoint):
        return endpoint
    raise TransportError(
        f"{endpoint!r} is not an endpoint; expected tcp://HOST:PORT, ipc://PATH or inproc://NAME"
    )


def check_reachable(endpoint: str) -> None:
    """Raises TransportError unless `endpoint` is one to connect to: with a port, not `*`."""
    check_endpoint(endpoint)
    port = endpoint.rpartition(":")[2]
    if endpoint.startswith("tcp://") and not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise TransportError(f"{endpoint!r:.80} has no port to connect to")


def is_local(endpoint: str) -> bool:
    """Whether only this machine can reach a socket bound to `endpoint`."""
    if not endpoint.startswith("tcp://"):
        return True
    host = host_of(endpoint)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(endpoint: str) -> str:
    """The host part of a tcp endpoint, without brackets."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")


def check_open(endpoint: str, allowed: bool) -> None:
    """Raises TransportError if other machines reach what is bound to `endpoint`, and that is not `allowed`."""
    check_endpoint(endpoint)
    if not is_local(endpoint) and not allowed:
        raise TransportError(
            f"{endpoint} can be reached from other machines, and nothing on it is encrypted or "
            "authenticated; bind to 127.0.0.1, make keys (esync-keys init) and pass --keys, or pass --insecure "
            "if you trust everyone on that network"
        )


def bind(socket: zmq.Socket[bytes], endpoint: str, *, insecure: bool = False) -> str:
    """Bind and return the actual endpoint (with the port that `*` became).

    Raises:
        TransportError: the address is taken or not ours, or is reachable from other machines and
            the socket has no keys and `insecure` was not said.
    """
    check_open(endpoint, insecure or handshake.encrypts(socket))
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise TransportError(
                f"cannot bind {endpoint}: the address is already in use. Another esync may be running "
                "there: stop it, or choose another port (tcp://HOST:* picks a free one)"
            ) from error
        if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
            raise TransportError(
                f"cannot bind {endpoint}: {host_of(endpoint)} is no address of this machine (nor the name of a network "
                "interface; other names are not looked up)"
            ) from error
        raise TransportError(f"cannot bind {endpoint}: {zmq.strerror(error.errno or 0)}") from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


def take_frames_of(socket: zmq.Socket[bytes], endpoint: str, max_bytes: int) -> None:
    """Have a socket that is bound to `endpoint` take frames of so many bytes.

    libzmq keeps to the limit that there was when an endpoint was bound, so it is bound anew. Who was connected is cut
    off, and connects again by itself.

    Raises:
        TransportError: somebody else has taken the address meanwhile.
    """
    if socket.getsockopt(zmq.MAXMSGSIZE) == max_bytes:
        return
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    if endpoint.startswith("inproc://"):
        return  # nothing is in frames there
    socket.unbind(endpoint)
    until = time.monotonic() + REBIND_S
    while True:
        try:
            socket.bind(endpoint)
            return
        except zmq.ZMQError as error:  # libzmq lets go of it in a thread of its own, soon
            if time.monotonic() > until:
                why = zmq.strerror(error.errno or 0)
                raise TransportError(f"cannot bind {endpoint} again: {why}") from error
            time.sleep(0.001)


def advertised(bound: str, seen_from: str) -> str:
    """The endpoint to be told to others, for a socket bound to `bound`.

    A wildcard host becomes the address from which this machine reaches `seen_from`, the state server. If that
    is on this machine too, the host stays a wildcard, and whoever is told takes the host by which it
    reaches the state server itself: see `resolved`.
    """
    if not _is_wildcard(bound):
        return bound
    port = bound.rpartition(":")[2]
    own = _own_address(host_of(seen_from)) if seen_from.startswith("tcp://") else "127.0.0.1"
    if ipaddress.ip_address(own).is_loopback:
        return f"tcp://*:{port}"
    return f"tcp://[{own}]:{port}" if ":" in own else f"tcp://{own}:{port}"


def resolved(endpoint: str, state: str) -> str:
    """The endpoint to connect to, for one that was told to us by the state server at `state`."""
    if not _is_wildcard(endpoint):
        return endpoint
    host = state.removeprefix("tcp://").rpartition(":")[0] if state.startswith("tcp://") else ""
    return f"tcp://{host or '127.0.0.1'}:{endpoint.rpartition(':')[2]}"


def _is_wildcard(endpoint: str) -> bool:
    return endpoint.startswith("tcp://") and host_of(endpoint) in ("0.0.0.0", "*", "::")


def _own_address(target: str) -> str:
    """This machine's address on the way to `target`."""
    family = _socket.AF_INET6 if ":" in target else _socket.AF_INET
    with _socket.socket(family, _socket.SOCK_DGRAM) as probe:  # a UDP connect sends nothing
        try:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
        except OSError as error:
            raise TransportError(f"cannot find a route to {target}: {error}") from error


def _socket_of(
    context: zmq.Context[Any],
    kind: int,
    max_bytes: int,
    keys: ServerKeys | Gate | ClientKeys | Token | None,
) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes]
    if isinstance(keys, ServerKeys | Gate):
        socket = handshake.server(context, kind, keys)
    elif isinstance(keys, ClientKeys):
        socket = handshake.client(context, kind, keys)
    else:
        socket = context.socket(kind)
        if keys is not None:
            socket.setsockopt(zmq.PLAIN_PASSWORD, keys.text.encode())
    socket.linger = LINGER_MS
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    return socket


def router(context: zmq.Context[Any], keys: ServerKeys | None = None) -> zmq.Socket[bytes]:
    """The state server's socket: unroutable answers are errors, and an id that connects again takes over."""
    socket = _socket_of(context, zmq.ROUTER, MAX_CONTROL_BYTES, keys)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    _heartbeats(socket)
    return socket


def dealer(
    context: zmq.Context[Any], identity: str, endpoint: str, keys: ClientKeys | None = None
) -> zmq.Socket[bytes]:
    """A connected control socket of this identity (`messages.peer_of`); `refusal` and `is_lost` say how it fares."""
    socket = handshake.client(context, zmq.DEALER, keys)
    socket.linger = LINGER_MS
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_CONTROL_BYTES)
    socket.setsockopt(zmq.ROUTING_ID, identity.encode())
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    _heartbeats(socket)
    return _connect(socket, endpoint)


def _connect(socket: zmq.Socket[bytes], endpoint: str) -> zmq.Socket[bytes]:
    try:
        check_endpoint(endpoint)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise TransportError(f"cannot connect to {endpoint}: {error}") from error
    except BaseException:
        socket.close(0)
        raise
    return socket


def _heartbeats(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)


def pull(context: zmq.Context[Any], keys: ServerKeys | Gate | None = None) -> zmq.Socket[bytes]:
    """Where updates arrive. The high-water mark counts chunks, and so bounds memory."""
    socket = _socket_of(context, zmq.PULL, MAX_CHUNK_BYTES, keys)
    # libzmq queues the credentials of a connection with keys as a first message, and never counts it as taken off.
    socket.setsockopt(zmq.RCVHWM, CHUNKS_RECEIVED + isinstance(keys, ServerKeys))
    return socket


def push(
    context: zmq.Context[Any], endpoint: str, keys: ClientKeys | Token | None = None
) -> zmq.Socket[bytes]:
    """Where a worker's updates leave."""
    socket = _socket_of(context, zmq.PUSH, MAX_CHUNK_BYTES, keys)
    socket.setsockopt(zmq.SNDHWM, CHUNKS_SENT)
    return _connect(socket, endpoint)


def xpub(context: zmq.Context[Any], keys: ServerKeys | Gate | None = None) -> zmq.Socket[bytes]:
    """Where models leave; every subscription and unsubscription is seen by the parameter server."""
    socket = _socket_of(context, zmq.XPUB, MAX_TOPIC_BYTES, keys)
    socket.setsockopt(zmq.XPUB_VERBOSER, 1)
    # What is on its way to a subscriber is bounded where it is sent (esync/ps/delivery.py). This is for a connection
    # that a worker has left behind when its network was gone: it takes nothing any more until it is given up.
    socket.setsockopt(zmq.SNDHWM, SUBSCRIBER_HWM)
    socket.setsockopt(zmq.TCP_MAXRT, GIVEN_UP_MS)
    return socket


def sub(
    context: zmq.Context[Any],
    endpoint: str,
    topic: bytes,
    keys: ClientKeys | Token | None = None,
    max_bytes: int = MAX_CHUNK_BYTES,
) -> zmq.Socket[bytes]:
    """Where a worker's models arrive, in frames of at most so many bytes."""
    socket = _socket_of(context, zmq.SUB, max_bytes, keys)
    socket.setsockopt(zmq.RCVHWM, 10_000)
    socket.setsockopt(zmq.SUBSCRIBE, topic)
    return _connect(socket, endpoint)


def beat_s(heartbeat_s: float) -> float:
    """Seconds between two heartbeats, where silence for `heartbeat_s` is death."""
    return min(1.0, heartbeat_s / 4)


def hostname() -> str:
    """This machine's name, for people to read."""
    return _socket.gethostname().partition(".")[0] or f"pid{os.getpid()}"


def refusal(socket: zmq.Socket[bytes]) -> str:
    """Why the server does not let this connected socket in; empty if it does, nothing is known yet, or there are no
    keys."""
    return socket.refusal() if isinstance(socket, handshake.Client) else ""


def is_lost(socket: zmq.Socket[bytes]) -> bool:
    """Whether a `dealer` had a connection, and has none now."""
    return isinstance(socket, handshake.Client) and socket.is_lost()


def waiting_for_state(endpoint: str) -> str:
    """What to tell a user who waits for a state server."""
    return f"waiting for the state server at {endpoint}{_unresolved(endpoint)}"


def no_state_server(endpoint: str, waited_s: float) -> str:
    """What to tell a user whose state server does not answer."""
    return (
        f"no state server answered at {endpoint} within {waited_s:g} s{_unresolved(endpoint)}. Is esync-state running "
        "there, and is the address right? If it has keys, this side needs --keys too. (--wait SECONDS waits longer)"
    )


def _unresolved(endpoint: str) -> str:
    """That the host's name cannot be resolved, in words; empty if it can."""
    if not endpoint.startswith("tcp://"):
        return ""
    try:
        _socket.getaddrinfo(host_of(endpoint), None)
    except OSError as error:
        return f" (its name cannot be resolved: {error.strerror})"
    return ""
