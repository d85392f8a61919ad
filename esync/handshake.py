"""Who is let in by a socket: by CURVE whom an allow-list names, by PLAIN who knows a server's token. And clients that
can say why they were refused.

A token keeps out who has not been told it: what strangers send does not get past the handshake, to where it would take
memory. It is no secret from those who listen on the network.

A context has one ZAP authenticator, a thread, which lives from the first of the context's servers to the close of
the last. Without it nobody is let in: ZeroMQ's default, that a server without an authenticator lets everybody in, is
turned off. Sockets on inproc:// stay within the process, and ZeroMQ neither encrypts nor authenticates them.
"""

from __future__ import annotations

import hmac
import itertools
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from esync.errors import TransportError
from esync.keys import ClientKeys, ServerKeys

_OUTCOMES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_OFTEN = 3
"""Handshakes without an answer, one after the other, that are no coincidence."""
MAX_TOKEN = 100
"""Bytes of a token, at most."""
_numbers = itertools.count()


class Gate:
    """Of a server's sockets: lets in who knows its token.

    Attributes:
        token: a random one.
        domain: the ZAP domain of those sockets.
        refusals: refused connections that did speak PLAIN; others are not heard of.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self.domain = f"esync-gate-{next(_numbers)}"
        self.refusals = 0

    def lets_in(self, token: str) -> bool:
        """Whether this is the token; counts if it is not."""
        if hmac.compare_digest(token.encode(), self.token.encode()):
            return True
        self.refusals += 1
        return False


@dataclass(frozen=True)
class Token:
    """What a client shows at a gate. Not empty."""

    text: str = field(repr=False)


class _Authenticator(ThreadAuthenticator):
    """One that knows gates, and makes room for the next one before `stop` returns: a closed socket keeps its address
    for a while."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        super().__init__(context)
        self.gates: dict[str, Gate] = {}

    def _authenticate_plain(self, domain: str, username: str, password: str) -> tuple[bool, bytes]:
        gate = self.gates.get(domain)
        if gate is not None and gate.lets_in(password):
            return True, b"OK"
        return False, b"Another token"

    def stop(self) -> None:
        if self.pipe:
            self.pipe.send(b"TERMINATE")
            if not sys.is_finalizing():  # its thread stands still by then, and is a daemon
                self.thread.join()
            self.pipe.close()
            self.pipe = None  # type: ignore[assignment]  # as its own `stop` does it
            self.zap_socket.unbind("inproc://zeromq.zap.01")
        super().stop()


@dataclass
class _Running:
    """A context's authenticator, and how many sockets need it."""

    authenticator: _Authenticator
    sockets: int = 0

    def let_in(self, keys: ServerKeys | Gate) -> None:
        """Let in by these."""
        if isinstance(keys, Gate):
            self.authenticator.gates[keys.domain] = keys
        else:
            allowed = keys.allowed
            self.authenticator.configure_curve_callback(allowed.domain, allowed)


_running: dict[int, _Running] = {}
_lock = threading.RLock()  # a forgotten socket is closed by the garbage collector, wherever it runs


class Server(zmq.Socket[bytes]):
    """A socket that not everybody is let in by; made by `server`."""

    _needs: int = 0  # the context whose authenticator this socket needs

    def close(self, linger: int | None = None) -> None:
        super().close(linger)
        if self._needs:
            context, self._needs = self._needs, 0
            _release(context)


class Client(zmq.Socket[bytes]):
    """A connected socket that knows what has become of its connection; made by `client`."""

    _keys: ClientKeys | None = None
    _outcomes: zmq.Socket[bytes] | None = None
    _last: int = 0
    _failed: int = 0
    _silent: int = 0

    def is_lost(self) -> bool:
        """Whether there was a connection, and is none now."""
        self._look()
        return self._last == zmq.EVENT_DISCONNECTED

    def refusal(self) -> str:
        """Why the last attempt to connect failed; empty if it did not, or nothing is known yet.

        A server's refusal is final: ZeroMQ does not try again on this socket.
        """
        self._look()
        if self._failed in (0, zmq.EVENT_HANDSHAKE_SUCCEEDED):
            return ""
        if self._keys is None:
            mismatch = self._failed == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            return "the server has keys: this side needs one too, with --keys" if mismatch else ""
        if self._failed == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return (
                f"the server refused the key of {self._keys.name!r} ({self._keys.public}): it was revoked, or is "
                "not in the server's allowed.toml. There, esync-keys list shows who is; esync-keys add makes a key"
            )
        if self._failed == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return "the server uses no keys: start it with --keys, or leave --keys out here too"
        if self._silent < _OFTEN:
            return ""
        return (
            f"the server ended the handshake: its key is not {self._keys.server}, which the file with the key of "
            f"{self._keys.name!r} was made for, or it is just stopping. Copy the file anew if its keys were"
        )

    def _look(self) -> None:
        outcomes = self._outcomes
        while outcomes is not None and int(outcomes.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            event = recv_monitor_message(outcomes)["event"]
            if event == zmq.EVENT_DISCONNECTED:
                if self._failed == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._last = event
                continue
            self._last = self._failed = event
            silent = event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            self._silent = self._silent + 1 if silent else 0

    def close(self, linger: int | None = None) -> None:
        if self._outcomes is not None and not self.closed:
            with suppress(zmq.ZMQError):  # its context is being terminated
                self.disable_monitor()  # or a socket that has no connection yet loses what it was given to send
        super().close(linger)
        if self._outcomes is not None:
            self._outcomes.close(0)


def server(context: zmq.Context[Any], kind: int, keys: ServerKeys | Gate) -> Server:
    """A socket, not yet bound, that lets in the keys of `keys.allowed`, or who knows the gate's token.

    Raises:
        TransportError: libzmq has no CURVE, or the context has another authenticator.
    """
    if not isinstance(keys, Gate):
        _check_curve()
    address = context.underlying
    _acquire(address, keys)
    try:
        socket: Server = context.socket(kind, socket_class=Server)
    except BaseException:
        _release(address)
        raise
    socket._needs = address
    with _closed_if_it_fails(socket):
        if isinstance(keys, Gate):
            socket.setsockopt(zmq.PLAIN_SERVER, 1)
            socket.setsockopt(zmq.ZAP_DOMAIN, keys.domain.encode())
        else:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
            socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
            socket.setsockopt(zmq.ZAP_DOMAIN, keys.allowed.domain.encode())
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    return socket


def client(context: zmq.Context[Any], kind: int, keys: ClientKeys | None) -> Client:
    """A socket, not yet connected, with these keys or without.

    Raises:
        TransportError: libzmq has no CURVE.
    """
    if keys is not None:
        _check_curve()
    socket: Client = context.socket(kind, socket_class=Client)
    socket._keys = keys
    with _closed_if_it_fails(socket):
        if keys is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server.encode())
            socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
            socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
        address = f"inproc://esync-handshakes-{next(_numbers)}"
        socket.monitor(address, _OUTCOMES | zmq.EVENT_DISCONNECTED)
        outcomes: zmq.Socket[bytes] = context.socket(zmq.PAIR, socket_class=zmq.Socket)
        socket._outcomes = outcomes
        outcomes.setsockopt(zmq.RCVHWM, 0)  # libzmq would wait for its reader
        outcomes.connect(address)
    return socket


@contextmanager
def _closed_if_it_fails(socket: zmq.Socket[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        socket.close(0)
        raise


def encrypts(socket: zmq.Socket[bytes]) -> bool:
    """Whether `socket` is a CURVE server."""
    return zmq.has("curve") and bool(socket.getsockopt(zmq.CURVE_SERVER))


def user_of(frame: zmq.Frame) -> str:
    """The public key of whoever sent this frame to a CURVE server; empty if it did not come through one."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def _check_curve() -> None:
    if not zmq.has("curve"):
        raise TransportError("this libzmq was built without CURVE; install pyzmq from a wheel")


def _acquire(address: int, keys: ServerKeys | Gate) -> None:
    with _lock:
        running = _running.get(address)
        if running is None:
            # (A context object of its own: `Context.destroy` closes sockets that it finds, in whatever thread.)
            authenticator = _Authenticator(zmq.Context.shadow(address))
            try:
                authenticator.start()
            except zmq.ZMQError as error:
                authenticator.stop()
                raise TransportError(
                    f"cannot start an authenticator: {error}. This ZeroMQ context has one of its own; use another "
                    "context for esync"
                ) from error
            running = _running[address] = _Running(authenticator)
        running.let_in(keys)
        running.sockets += 1


def _release(address: int) -> None:
    with _lock:
        running = _running[address]
        running.sockets -= 1
        if not running.sockets:
            del _running[address]
            running.authenticator.stop()
