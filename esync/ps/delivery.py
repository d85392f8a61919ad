"""What is on its way to each subscriber, and what goes next. A decision: no socket, no clock.

A subscriber says what has arrived (`have`), and no more than a window is handed to its connection before. The rest
waits here, as references to the model that is kept anyway. When a newer version is complete, that takes the place of
older ones: a subscriber that has stopped keeps the window's worth of old chunks alive, and nothing else. One that is
only slow gets the version that it is being sent to its end, else it might never have a whole one, and then the newest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from esync.ps.aggregation import Published
from esync.transport import WINDOW_BYTES, WINDOW_CHUNKS

LOST_S = 2.0
"""After so long without progress what is on its way is taken for lost, if the subscriber asks."""
STUCK_S = 10.0
"""After so long without progress a subscriber gets no older version than the newest."""


@dataclass(slots=True)
class _Line:
    """One subscriber's: what waits, and what is on its way: (version, chunk, bytes), `bytes` of them together."""

    progress_at: float
    waiting: deque[Published] = field(default_factory=deque)
    sent: deque[tuple[int, int, int]] = field(default_factory=deque)
    bytes: int = 0
    patience: float = 1.0  # by how much more this one's slow link needs


class Delivery:
    """The lines of all subscribers. Times are seconds of any one clock."""

    def __init__(self, window_bytes: int = WINDOW_BYTES) -> None:
        self._window = window_bytes
        self._lines: dict[str, _Line] = {}

    def put(self, worker: str, event: Published, now: float) -> None:
        """A chunk is to be sent to a subscriber."""
        self._line(worker, now).waiting.append(event)

    def forget(self, worker: str) -> None:
        """A subscriber is gone, or has a new connection: nothing waits for it, and nothing is on its way."""
        self._lines.pop(worker, None)

    def withdraw(self, worker: str) -> None:
        """What waits for a subscriber is not to be sent."""
        if worker in self._lines:
            self._lines[worker].waiting.clear()

    def next(self, worker: str) -> Iterator[Published]:
        """What may be handed to the subscriber's connection now; to be followed by `sent` for each."""
        line = self._lines.get(worker)
        while (
            line is not None
            and line.waiting
            and line.bytes < self._window
            and len(line.sent) < WINDOW_CHUNKS
        ):
            yield line.waiting.popleft()

    def sent(self, worker: str, event: Published, size: int, now: float) -> None:
        """A chunk has been handed over, in so many bytes."""
        line = self._line(worker, now)
        if not line.sent:
            line.progress_at = now
        line.sent.append((event.version, event.chunk, size))
        line.bytes += size

    def have(self, worker: str, version: int, chunk: int, now: float) -> None:
        """Everything sent to a subscriber up to this has arrived. What was not sent changes nothing."""
        line = self._lines.get(worker)
        if line is None or not any(row[:2] == (version, chunk) for row in line.sent):
            return
        line.progress_at = now
        while True:
            *row, size = line.sent.popleft()
            line.bytes -= size
            if row == [version, chunk]:
                return

    def is_busy(self, worker: str, now: float) -> bool:
        """Whether something is on its way; asked because the subscriber misses something.

        What makes no progress for long is lost, with the connection that took it. On a slow link the next chunk may
        just take long, so each time this needs more patience.
        """
        line = self._lines.get(worker)
        if line is None or not line.sent:
            return False
        if now - line.progress_at <= LOST_S * line.patience:
            return True
        self._lines[worker] = _Line(now, patience=2 * line.patience)
        return False

    def numbers(self, now: float) -> tuple[int, int, int]:
        """(lines without progress for long, chunks that wait in all lines, bytes on their way); from any thread."""
        lines = list(dict(self._lines).values())
        stuck = sum(bool(line.sent) and now - line.progress_at > STUCK_S for line in lines)
        return stuck, sum(len(line.waiting) for line in lines), sum(line.bytes for line in lines)

    def completed(
        self,
        version: int,
        chunks: Callable[[str], list[Published]],
        now: float,
        receivers: Collection[str] | None = None,
    ) -> None:
        """A version is complete, `chunks(worker)`: of older ones only that is sent which is being sent already, and not
        even that to a subscriber that is stuck. So at most two versions wait for anybody.

        Args:
            receivers: whose version it is; None: everybody's. Others train from versions of their own, and get those.
        """
        for worker, line in self._lines.items():
            first = line.waiting[0].version if line.waiting else version
            if first >= version:
                continue
            if now - line.progress_at > STUCK_S:
                line.waiting = deque(chunks(worker))
            elif first < version - 1 and (receivers is None or worker in receivers):
                begun = [event for event in line.waiting if event.version == first]
                line.waiting = deque([*begun, *chunks(worker)])

    def _line(self, worker: str, now: float) -> _Line:
        if worker not in self._lines:
            self._lines[worker] = _Line(now)
        return self._lines[worker]
