"""Asks a state server for the live table of its run."""

from __future__ import annotations

import secrets
import time
from typing import Any

import zmq

from esync import messages, transport
from esync.errors import ProtocolError, TransportError
from esync.keys import SERVER, ClientKeys
from esync.messages import Error, MessageError, Status

ANSWER_S = 0.5
"""How long one question waits for its answer."""


class Inquiry:
    """A connection to a state server, which need not be there yet.

    Args:
        endpoint: the state server's.
        purpose: what the id begins with that this asks under; the rest is random, since an id that two use would be
            taken from one by the other.
        keys: if the servers have keys. A worker's key lets ask under ids that begin with its name alone.

    Attributes:
        table, waiting_for: as they were when last answered; the table is empty before.
    """

    def __init__(
        self,
        endpoint: str,
        purpose: str,
        keys: ClientKeys | None = None,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.table: dict[str, Any] = {}
        self.waiting_for = ""
        name = f"{purpose}-{secrets.token_hex(4)}"
        if keys is not None and keys.name != SERVER:
            name = f"{keys.name}-{name}"
        self._socket = transport.dealer(context or zmq.Context.instance(), name, endpoint, keys)

    def ask(self) -> bool:
        """Fetch the table; False if there was no answer.

        Raises:
            ProtocolError: the state server refused, or is of another version.
        """
        try:
            self._socket.send(messages.encode(Status()), zmq.NOBLOCK)
        except zmq.Again:  # a state server that hangs takes no more questions
            return False
        answered = False
        while self._socket.poll(0 if answered else int(ANSWER_S * 1000)):
            answered = self._take(self._socket.recv()) or answered
        return answered

    def _take(self, frame: bytes) -> bool:
        try:
            message = messages.decode(frame)
        except MessageError as error:
            raise ProtocolError(error.code, error.text) from error
        if isinstance(message, Error):
            raise ProtocolError(message.code, message.text)
        if not isinstance(message, Status) or not message.table:
            return False
        self.table, self.waiting_for = message.table, message.waiting_for
        return True

    def first(self, wait_s: float) -> None:
        """Ask until there is an answer.

        Raises:
            ProtocolError: the state server refused, or is of another version.
            TransportError: there was none for `wait_s` seconds, or the state server does not let these keys in.
        """
        deadline = time.monotonic() + wait_s
        while not self.ask():
            if why := transport.refusal(self._socket):
                raise TransportError(f"cannot ask {self.endpoint}: {why}")
            if time.monotonic() > deadline:
                raise TransportError(transport.no_state_server(self.endpoint, wait_s))

    @property
    def is_lost(self) -> bool:
        """Whether there was a connection, and is none now."""
        return transport.is_lost(self._socket)

    def close(self) -> None:
        self._socket.close(0)
