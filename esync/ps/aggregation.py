"""Aggregations: what becomes of an update. Pure decisions and arithmetic; no socket, no task, no clock.

The model is kept as chunks (see `esync.tensors.Layout.chunks`). An update arrives chunk by chunk, and each chunk
is accounted for on its own: **a chunk's average is taken over exactly those workers whose chunk arrived.** A worker
that dies in the middle of its update thus takes part in the chunks that it delivered, with the weight that it would
have had, and in no others; every chunk stays a true weighted mean, nothing has to be kept back or undone,
and a chunk can be added up when it arrives and published when its last contribution is in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from esync.config import RunConfig
from esync.ps.backend import Array, Backend
from esync.tensors import DELTA, Layout

INITIAL = -1
"""The round of the update that brings the initial model."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One chunk of one worker's update.

    Attributes:
        round: the version of the model that the update was computed from, or `INITIAL`.
        data: the chunk, float32; deltas or values, as the layout says.
        steps, samples: what the whole update was computed from.
    """

    worker: str
    round: int
    chunk: int
    data: Array
    steps: int = 1
    samples: int = 1


@dataclass(frozen=True, slots=True)
class Published:
    """A chunk of a version is final; for one worker, or for everybody (None)."""

    version: int
    chunk: int
    data: Array
    worker: str | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """All chunks of a version are final; `members` are the workers whose updates are in it."""

    version: int
    members: frozenset[str]


@dataclass(frozen=True, slots=True)
class Refused:
    """A contribution that changed nothing, and why: `late`, `double`, `early` or `overflow`."""

    reason: str


Event = Published | Completed | Refused


class Aggregation(ABC):
    """The model and what is added to it.

    Attributes:
        version: the last complete version (-1: there is no model yet).
        chunks: that version's chunks.
    """

    def __init__(self, layout: Layout, backend: Backend, config: RunConfig) -> None:
        self.layout = layout
        self.backend = backend
        self.config = config
        self.version = -1
        self.chunks: list[Array] = [None] * len(layout.chunks)
        self._initial: dict[str, list[Array]] = {}  # who brings it -> chunks; never mixed

    def receive(self, update: Contribution) -> list[Event]:
        """Take one chunk; returns what follows from it.

        Each (worker, round, chunk) counts once; what comes twice or too late is `Refused`.
        """
        if self.version < 0:
            return self._receive_initial(update)
        if update.round < 0:
            return [Refused("late")]  # a second copy of the initial model is not an update
        return self._receive(update)

    def _receive_initial(self, update: Contribution) -> list[Event]:
        if update.round != INITIAL:
            return [Refused("early")]
        chunks = self._initial.setdefault(update.worker, [None] * len(self.chunks))
        if chunks[update.chunk] is not None:
            return [Refused("double")]
        chunks[update.chunk] = self.backend.scaled(update.data, 1.0)
        if any(chunk is None for chunk in chunks):
            return []
        self.chunks, self.version, self._initial = chunks, 0, {}
        events: list[Event] = [Published(0, i, x) for i, x in enumerate(self.chunks)]
        return [*events, Completed(0, frozenset())]

    @abstractmethod
    def _receive(self, update: Contribution) -> list[Event]:
        """`receive`, once there is a model."""

    def set_members(self, ranks: Mapping[str, int]) -> list[Event]:
        """Say who is expected at the barrier; may complete a round."""
        return []

    def missing(self, worker: str, round: int) -> list[int]:
        """The chunks of a worker's update of `round` that have not arrived and are still wanted."""
        if self.version < 0:
            mine = self._initial.get(worker, self.chunks)
            wanted = [i for i, chunk in enumerate(mine) if chunk is None]
            return wanted if round == INITIAL else []
        return self._missing(worker, round)

    @abstractmethod
    def _missing(self, worker: str, round: int) -> list[int]:
        """`missing`, once there is a model."""

    def sent_to(self, worker: str) -> None:  # noqa: B027 - most aggregations need not know
        """The current model is being sent to one worker."""

    def in_progress(self) -> list[Published]:
        """The chunks of the next version that are final already."""
        return []


class Mean(Aggregation):
    """The barrier: version t+1 is t plus the global learning rate times the weighted mean of the deltas.

    `w[t+1] = w[t] + global_lr * sum_i(weight_i * delta_i) / sum_i(weight_i)` (Li et al. 2019); values are
    averaged with the same weights, without the learning rate. A worker that is not (yet) expected
    is included if its update comes in time.

    Args:
        ordered: add up in the order of ranks instead of arrival, so that the result does not depend on it; keeps
            a round's chunks until the last one is there.
    """

    def __init__(
        self, layout: Layout, backend: Backend, config: RunConfig, *, ordered: bool = False
    ) -> None:
        super().__init__(layout, backend, config)
        self._ordered = ordered
        self._expected: dict[str, int] = {}
        self._begin()

    def _begin(self) -> None:
        self._arrived: list[set[str]] = [set() for _ in self.chunks]
        self._totals: list[Array] = [None] * len(self.chunks)
        self._weights = [0.0] * len(self.chunks)
        self._kept: list[list[Contribution]] = [[] for _ in self.chunks]
        self._next: list[Array] = [None] * len(self.chunks)

    def _receive(self, update: Contribution) -> list[Event]:
        if update.round != self.version or self._next[update.chunk] is not None:
            return [Refused("early" if update.round > self.version else "late")]
        if update.worker in self._arrived[update.chunk]:
            return [Refused("double")]
        self._arrived[update.chunk].add(update.worker)
        if self._ordered:
            self._kept[update.chunk].append(update)
        else:
            self._add(update)
        return self._finish([update.chunk])

    def _add(self, update: Contribution) -> None:
        weight = float(update.samples) if self.config.weights == "samples" else 1.0
        chunk = update.chunk
        if self._totals[chunk] is None:
            self._totals[chunk] = self.backend.scaled(update.data, weight)
        else:
            self.backend.add_scaled(self._totals[chunk], update.data, weight)
        self._weights[chunk] += weight

    def set_members(self, ranks: Mapping[str, int]) -> list[Event]:
        self._expected = dict(ranks)
        return self._finish(range(len(self.chunks))) if self.version >= 0 else []

    def _finish(self, candidates: list[int] | range) -> list[Event]:
        """Make final whichever of the chunks nobody is awaited for any more."""
        events: list[Event] = []
        for chunk in candidates:
            arrived = self._arrived[chunk]
            if self._next[chunk] is None and arrived and arrived >= self._expected.keys():
                self._next[chunk] = self._new_value(chunk)
                if not self.backend.is_finite(self._next[chunk]):
                    self._next[chunk] = self.chunks[chunk]  # finite updates, but their sum is not
                    events.append(Refused("overflow"))
                events.append(Published(self.version + 1, chunk, self._next[chunk]))
        if events and all(x is not None for x in self._next):
            members = frozenset[str]().union(*self._arrived)
            self.chunks, self.version = self._next, self.version + 1
            self._begin()
            events.append(Completed(self.version, members))
        return events

    def _new_value(self, chunk: int) -> Array:
        last = (len(self._expected), "")
        for update in sorted(
            self._kept[chunk], key=lambda u: (self._expected.get(u.worker, last[0]), u.worker)
        ):
            self._add(update)
        self._kept[chunk] = []
        total, weight = self._totals[chunk], self._weights[chunk]
        self._totals[chunk] = None
        if self.layout.chunks[chunk].kind == DELTA:
            scale = self.config.global_lr / weight
            return self.backend.blend(self.chunks[chunk], 1.0, total, scale)
        return self.backend.scaled(total, 1.0 / weight)

    def _missing(self, worker: str, round: int) -> list[int]:
        if round != self.version:
            return []
        return [
            i
            for i, arrived in enumerate(self._arrived)
            if worker not in arrived and self._next[i] is None
        ]

    def in_progress(self) -> list[Published]:
        return [
            Published(self.version + 1, i, x) for i, x in enumerate(self._next) if x is not None
        ]


@dataclass(slots=True)
class _Progress:
    """How much of a worker's latest update has arrived, and the model that it was computed from."""

    round: int = -2
    arrived: set[int] = field(default_factory=set)
    sent: list[Array] | None = None


class Immediate(Aggregation):
    """No barrier: each delta is applied when it arrives, and its sender alone gets the new model.

    `w <- w + global_lr * delta` (ASGD, Dean et al. 2012). With `dcasgd` (Zheng et al. 2017, equation 10) the
    gradient g = -delta / lr is corrected by `lambda * g * g * (w - w_sent)`, where w_sent is the model
    that the worker had; for each worker the chunks of that model are kept.
    Values move by 1/p towards the sender's, p being the number of workers.
    """

    def __init__(self, layout: Layout, backend: Backend, config: RunConfig) -> None:
        super().__init__(layout, backend, config)
        self._members: frozenset[str] = frozenset()
        self._progress: dict[str, _Progress] = {}

    def set_members(self, ranks: Mapping[str, int]) -> list[Event]:
        self._members = frozenset(ranks)
        for worker in self._progress.keys() - ranks.keys():
            self._progress[worker].sent = None  # its round stays known: an update counts once
        return []

    def _receive(self, update: Contribution) -> list[Event]:
        if update.round > self.version:
            return [Refused("early")]
        progress = self._progress.setdefault(update.worker, _Progress())
        if update.round < progress.round:
            return [Refused("late")]
        if update.round > progress.round:
            progress.round, progress.arrived = update.round, set()
        elif update.chunk in progress.arrived:
            return [Refused("double")]
        progress.arrived.add(update.chunk)
        applied = self._applied(update, progress)
        if self.backend.is_finite(applied):
            self.chunks[update.chunk] = applied
        if len(progress.arrived) < len(self.chunks):
            return []
        self.version += 1
        self.sent_to(update.worker)
        events: list[Event] = [
            Published(self.version, i, x, update.worker) for i, x in enumerate(self.chunks)
        ]
        return [*events, Completed(self.version, frozenset([update.worker]))]

    def sent_to(self, worker: str) -> None:
        if self.config.dcasgd and worker in self._members:
            self._progress.setdefault(worker, _Progress()).sent = list(self.chunks)

    def _applied(self, update: Contribution, progress: _Progress) -> Array:
        base = self.chunks[update.chunk]
        if self.layout.chunks[update.chunk].kind != DELTA:
            share = 1.0 / max(1, len(self._members))
            return self.backend.blend(base, 1.0 - share, update.data, share)
        scale = self.config.global_lr
        if not self.config.dcasgd or progress.sent is None:
            return self.backend.blend(base, 1.0, update.data, scale)
        drift = self.backend.blend(base, 1.0, progress.sent[update.chunk], -1.0)
        strength = self.config.dc_lambda / self.config.lr
        return self.backend.compensated(base, update.data, drift, strength, scale)

    def _missing(self, worker: str, round: int) -> list[int]:
        progress = self._progress.get(worker)
        if progress is None or round > progress.round:
            return list(range(len(self.chunks)))
        if round < progress.round:
            return []
        return [i for i in range(len(self.chunks)) if i not in progress.arrived]


AGGREGATIONS: dict[str, Callable[..., Aggregation]] = {"mean": Mean, "immediate": Immediate}
"""Name in `esync.algorithms` -> aggregation."""
