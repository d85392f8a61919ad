"""Who may send how much to a message server, and whose message is next. A decision: no socket, no task, no clock.

Each peer has a token bucket, and a bound on what of it waits. What is beyond either is dropped, and nobody else's. Of
each member one message at a time stands in the queue, and what else it has sent waits behind that: a message waits for
one of each other member's, however many those have sent. Strangers, who are anybody and may be as many as they like,
have one place in the queue between them.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
RATE = 5000.0
"""Messages a second of one peer, in the long run. A worker with local steps of 1 ms sends 2000: it has one query under
way at a time, reports once a round, and beats once a second."""
BURST_S = 2.0
"""A peer that was silent may send so many seconds' messages at once."""
TOKEN_BYTES = 1024
"""A message counts as one more for each so many bytes: to decode a long one takes longer."""
LARGEST_BYTES = 4 << 20
"""The largest message; a full bucket always has enough for one."""
WAITING, WAITING_BYTES = 256, 2 * LARGEST_BYTES
"""Messages, and bytes, of one peer that may wait. An honest one has a query, a report and a few heartbeats there; this
is four minutes' heartbeats, for a server that was stopped."""
QUEUED, QUEUED_BYTES = 100_000, 256 << 20
"""What may wait in all; a member that has nothing waiting is let in all the same. Of a server of the run as much may
wait too."""
MAX_PEERS = 10_000
"""Ids of members."""
REMEMBERED = 10_000
"""Strangers that are told apart, by how much they have sent; those beyond share a bucket, since ids can be made up."""
SWEEP_AT, SWEEP_S = 256, 1.0
"""So many peers are remembered before it is looked who can be forgotten, and how rarely that is done if few can."""


class Standing(enum.Enum):
    """What a peer is to the server: nobody it knows, a member, or a server of the run, whom no limit holds."""

    STRANGER = 0
    MEMBER = 1
    SERVER = 2


class Verdict(enum.Enum):
    """What becomes of a message: it waits, or is dropped; `TELL`: that is the first time, and the sender is told."""

    TAKEN = 0
    DROPPED = 1
    TELL = 2


@dataclass(frozen=True)
class Limits:
    """How much one peer may send; `rate` 0: as much as it likes."""

    rate: float = RATE
    burst: float = 0.0  # 0: what is sent in BURST_S, and the largest message at least
    waiting: int = WAITING
    waiting_bytes: int = WAITING_BYTES
    queued: int = QUEUED
    queued_bytes: int = QUEUED_BYTES
    remembered: int = REMEMBERED

    @property
    def most(self) -> float:
        """Tokens in a full bucket."""
        return self.burst or max(self.rate * BURST_S, 1.0 + LARGEST_BYTES / TOKEN_BYTES)


@dataclass(slots=True, eq=False)
class _Peer:
    tokens: float
    at: float
    standing: Standing = Standing.STRANGER  # where it stands in line, while something of it waits
    waiting: int = 0
    bytes: int = 0
    told: bool = False


_Entry = tuple[_Peer | None, int, T]


class Queue(Generic[T]):
    """What has arrived and was not looked at.

    Args:
        limits: None: there are none, and what came first is next.
        standing: what a peer is to the server; asked once for each message that is put.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        standing: Callable[[bytes], Standing] = lambda peer: Standing.STRANGER,
    ) -> None:
        self._limits, self._standing = limits, standing
        self._lines: dict[bytes, deque[_Entry[T]]] = {}  # of members
        self._strangers: deque[_Entry[T]] = deque()
        self._turns: deque[tuple[bytes, deque[_Entry[T]]]] = deque()
        self._peers: dict[bytes, _Peer] = {}
        self._others = _Peer(0.0, 0.0)
        self._sweep_at, self._sweep_after = SWEEP_AT, float("-inf")
        self._length = self._bytes = 0

    def __len__(self) -> int:
        return self._length

    @property
    def remembered(self) -> int:
        """Of how many peers something is known."""
        return len(self._peers)

    def post(self, item: T) -> None:
        """Put what no limit holds."""
        self._length += 1
        self._turns.append((b"", deque(((None, 0, item),))))

    def put(self, peer: bytes, size: int, item: T, now: float) -> Verdict:
        """Put a peer's message of so many bytes, unless that is beyond a limit.

        Args:
            now: seconds.
        """
        limits = self._limits
        if limits is None:
            self.post(item)
            return Verdict.TAKEN
        standing = self._standing(peer)
        known = self._peer(peer, standing, limits, now)
        cost = 0.0 if standing is Standing.SERVER or not limits.rate else 1 + size / TOKEN_BYTES
        if known.tokens < cost or self._is_behind(known, standing, size, limits):
            first = not known.told and known is not self._others
            known.told = True
            return Verdict.TELL if first else Verdict.DROPPED
        if self._is_full(known, standing, size, limits):
            return Verdict.DROPPED  # which is not this peer's fault
        known.tokens -= cost
        self._append(peer, known, standing, (known, size, item))
        return Verdict.TAKEN

    def take(self) -> T:
        """The next message.

        Raises:
            IndexError: there is none.
        """
        peer, line = self._turns.popleft()
        known, size, item = line.popleft()
        if line:
            self._turns.append((peer, line))
        elif peer:
            del self._lines[peer]
        self._length -= 1
        if known is not None:
            self._bytes -= size
            known.waiting -= 1
            known.bytes -= size
        return item

    def _append(self, peer: bytes, known: _Peer, standing: Standing, entry: _Entry[T]) -> None:
        """Stand in line. Where a peer stands changes only when nothing of it waits: its messages stay in order."""
        if not known.waiting:
            known.standing = standing
        self._length += 1
        self._bytes += entry[1]
        known.waiting += 1
        known.bytes += entry[1]
        if known.standing is Standing.SERVER:
            self._turns.append((b"", deque((entry,))))
            return
        name, line = b"", self._strangers
        if known.standing is Standing.MEMBER:
            name, line = peer, self._lines.setdefault(peer, deque())
        if not line:
            self._turns.append((name, line))
        line.append(entry)

    def _is_behind(self, known: _Peer, standing: Standing, size: int, limits: Limits) -> bool:
        """Whether so much of this peer waits that no more may."""
        most, most_bytes = limits.waiting, limits.waiting_bytes
        if standing is Standing.SERVER:
            most, most_bytes = limits.queued, limits.queued_bytes
        return known.waiting > 0 and (known.waiting >= most or known.bytes + size > most_bytes)

    def _is_full(self, known: _Peer, standing: Standing, size: int, limits: Limits) -> bool:
        """Whether so much waits that only members are let in, with one message each."""
        if self._length < limits.queued and self._bytes + size <= limits.queued_bytes:
            return False
        return standing is Standing.STRANGER or (standing is Standing.MEMBER and known.waiting > 0)

    def _peer(self, peer: bytes, standing: Standing, limits: Limits, now: float) -> _Peer:
        """What is known of a peer, its bucket filled up."""
        known = self._peers.get(peer)
        if known is None:
            if len(self._peers) >= self._sweep_at and now >= self._sweep_after:
                self._sweep(limits, now)
            if standing is not Standing.STRANGER or len(self._peers) < limits.remembered:
                known = self._peers[peer] = _Peer(limits.most, now)
                return known
            known = self._others
        known.tokens = min(limits.most, known.tokens + (now - known.at) * limits.rate)
        known.at = now
        if known.told and known.tokens == limits.most and not known.waiting:
            known.told = False
        return known

    def _sweep(self, limits: Limits, now: float) -> None:
        """Forget whoever has a full bucket again, and nothing waiting: so does everybody begin."""
        self._peers = {
            peer: known
            for peer, known in self._peers.items()
            if known.waiting or known.tokens + (now - known.at) * limits.rate < limits.most
        }
        left = len(self._peers)
        self._sweep_at = min(limits.remembered, max(SWEEP_AT, 2 * left))
        self._sweep_after = now + SWEEP_S if 2 * left > limits.remembered else now
