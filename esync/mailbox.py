"""A queue into a thread that waits in a ZeroMQ poller: items go in from anywhere, a descriptor wakes the thread."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Many senders, one receiver; register `fileno()` in the receiver's poller and `take()` when it is readable."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._open = True
        self._lock = (
            threading.RLock()
        )  # of the descriptor: once it is closed, its number may be another's

    def put(self, item: T) -> None:
        """Add an item and wake the receiver; does nothing once the mailbox is closed."""
        self._items.append(item)
        with self._lock:
            if self._open:
                with contextlib.suppress(BlockingIOError):  # full: the receiver will wake anyway
                    os.write(self._write, b"\0")

    def take(self) -> list[T]:
        """Every item so far, in order."""
        try:
            os.read(self._read, 65536)
        except BlockingIOError:
            pass
        items = []
        while self._items:
            items.append(self._items.popleft())
        return items

    def fileno(self) -> int:
        return self._read

    def close(self) -> None:
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._read)
                os.close(self._write)
