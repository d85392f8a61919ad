"""Aggregations: what becomes of an update. Pure decisions and arithmetic; no socket, no task, no clock.

The model is kept as chunks (see `esync.tensors.Layout.chunks`). An update arrives chunk by chunk, and each chunk
is accounted for on its own: **a chunk's average is taken over exactly those workers whose chunk arrived.** A worker
that dies in the middle of its update thus takes part in the chunks that it delivered, with the weight that it would
have had, and in no others; every chunk stays a true weighted mean, nothing has to be kept back or undone,
and a chunk can be added up when it arrives and published when its last contribution is in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from esync.compression import Compressor, Decoder, Payload
from esync.config import RunConfig
from esync.errors import ModelError
from esync.messages import INITIAL
from esync.ps.backend import Array, Backend
from esync.ps.outer import OUTER, Step
from esync.tensors import DELTA, Layout


@dataclass(frozen=True, slots=True)
class Contribution:
    """One chunk of one worker's update.

    Attributes:
        round: the version of the model that the update was computed from, or `INITIAL`.
        data: the chunk, float32; deltas or values, as the layout says.
        steps, samples: what the whole update was computed from.
        lasts: the data is its sender's memory, which keeps it as long as the round does.
    """

    worker: str
    round: int
    chunk: int
    data: Array
    steps: int = 1
    samples: int = 1
    lasts: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk as the difference from the version before: the encoding's name and the bytes to send."""

    encoding: str
    payload: Payload


@dataclass(frozen=True, slots=True)
class Published:
    """A chunk of a version is final; for one worker, or for everybody (None).

    Whoever has the version before can make the chunk of it from `encoded`, where that is given. `as_word`: it lies in
    shared memory, for as long as that holds this version, and only word of it is sent.
    """

    version: int
    chunk: int
    data: Array
    worker: str | None = None
    encoded: Encoded | None = None
    as_word: bool = False


@dataclass(frozen=True, slots=True)
class Completed:
    """All chunks of a version are final; `members` are the workers whose updates are in it."""

    version: int
    members: frozenset[str]


NOT_FINITE = "not-finite"
TOO_LONG = "too-long"
ROUNDING = 1 + 2**-10
"""What float32 may add to the norm of a delta that was scaled down to `clip_update`, and to spare."""
MODEL, NEXT, AVERAGE, LOST, OUTER_STATE = "model", "next", "average", "lost", "outer."
"""Names in a snapshot; `NEXT` is what is final already of the version after the model's, and the last is what names of
the outer optimiser's state begin with."""
MOST_ALONE = 6
"""Contributions that wait for a second one to begin a sum with; they are memory besides the model."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A contribution that changed nothing, and why: `late`, `double`, `early`, `overflow`, `NOT_FINITE` or `TOO_LONG`.
    Where a worker is named, that is to be told."""

    reason: str
    worker: str = ""


@dataclass(slots=True)
class _Length:
    """How long the deltas of a worker's update of one round are as far as they have arrived; `beyond`: why nothing more
    of it is taken, if so."""

    round: int
    squares: dict[int, float] = field(default_factory=dict)
    total: float = 0.0
    beyond: str = ""


@dataclass(frozen=True, slots=True)
class Doubted:
    """A sum is not finite, and it is not known whose fault that is: it begins anew. These workers' chunk is wanted
    again, and will be looked at before it is added."""

    round: int
    chunk: int
    workers: frozenset[str]


Event = Published | Completed | Refused | Doubted
Room = Callable[[int, int], Array]
"""(version, chunk) -> where to write that chunk of that version, when it begins to be made. What was there before, the
same chunk two versions ago, is nobody's any more."""


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
        self._room: Room | None = None
        self._lengths: dict[str, _Length] = {}  # worker -> of its latest update, with clip_update
        deltas = [chunk.size for chunk in layout.chunks if chunk.kind == DELTA]
        growth = max((config.encoding.growth(size) for size in deltas), default=1.0)
        self._longest = config.clip_update * growth * ROUNDING

    def receive(self, update: Contribution) -> list[Event]:
        """Take one chunk; returns what follows from it.

        Each (worker, round, chunk) counts once; what comes twice or too late is `Refused`.
        """
        return self.take(update) + self.settle()

    def take(self, update: Contribution) -> list[Event]:
        """`receive`, but what becomes final may be looked at later, together with what others make final: when `settle`
        is called, which must be soon. A GPU adds up meanwhile."""
        if self.version < 0:
            return self._receive_initial(update)
        if update.round < 0:
            return [Refused("late")]  # a second copy of the initial model is not an update
        return self._take(update)

    def settle(self) -> list[Event]:
        """What follows from all that was taken."""
        return []

    def _beyond(self, update: Contribution) -> Refused | None:
        """With `clip_update`: why a chunk, which would be counted now, is refused. None: it may be.

        From the chunk on with which the deltas of an update are longer than `clip_update`, with what compression may
        add, nothing of it is taken. So what gets in of any is no longer than that.
        """
        known = self._lengths.get(update.worker)
        if known is None or known.round != update.round:
            known = self._lengths[update.worker] = _Length(update.round)
        if known.beyond:
            return Refused(TOO_LONG)  # which its sender has been told
        if self.layout.chunks[update.chunk].kind != DELTA:
            return None
        square = self.backend.squared_norm(update.data)
        if known.total + square <= self._longest * self._longest:
            known.total += square
            known.squares[update.chunk] = square
            return None
        known.beyond = TOO_LONG if self.backend.is_finite(update.data) else NOT_FINITE
        return Refused(known.beyond, update.worker)

    def beyond(self, worker: str, round: int) -> str:
        """Why nothing more is taken of a worker's update, with `clip_update`; empty if it is."""
        known = self._lengths.get(worker)
        return known.beyond if known is not None and known.round == round else ""

    def _forget_lengths(self, gone: Iterable[str]) -> None:
        """Who comes back in the round in which its update was refused brings another one."""
        for worker in gone:
            if worker in self._lengths and self._lengths[worker].beyond:
                del self._lengths[worker]

    def _receive_initial(self, update: Contribution) -> list[Event]:
        if update.round != INITIAL:
            return [Refused("early")]
        if not self.backend.is_finite(update.data):
            return [Refused(NOT_FINITE, update.worker)]
        chunks = self._initial.setdefault(update.worker, [None] * len(self.chunks))
        if chunks[update.chunk] is not None:
            return [Refused("double")]
        chunks[update.chunk] = self.backend.scaled(update.data, 1.0)
        if any(chunk is None for chunk in chunks):
            return []
        self.chunks = [self._settled(0, i, x) for i, x in enumerate(chunks)]
        self.version, self._initial = 0, {}
        events: list[Event] = [Published(0, i, x) for i, x in enumerate(self.chunks)]
        return [*events, Completed(0, frozenset())]

    @abstractmethod
    def _take(self, update: Contribution) -> list[Event]:
        """`take`, once there is a model."""

    def set_members(self, ranks: Mapping[str, int]) -> list[Event]:
        """Say who is expected at the barrier; may complete a round."""
        return []

    def missing(self, worker: str, round: int) -> list[int]:
        """The chunks of a worker's update of `round` that have not arrived and are still wanted."""
        if self.version < 0:
            mine = self._initial.get(worker, self.chunks)
            wanted = [i for i, chunk in enumerate(mine) if chunk is None]
            return wanted if round == INITIAL else []
        return [] if self.beyond(worker, round) else self._missing(worker, round)

    def averaged(self) -> list[Array]:
        """The chunks that are evaluated and saved: the last complete version's, or an average of versions."""
        return self.chunks

    @abstractmethod
    def _missing(self, worker: str, round: int) -> list[int]:
        """`missing`, once there is a model."""

    def move_to(self, room: Room) -> bool:
        """Keep the model in memory that is given for it from now on, arrays of the backend, if this aggregation can.

        Then True, and every chunk of `chunks` and of what is published lies there."""
        return False

    def _settled(self, version: int, chunk: int, data: Array) -> Array:
        """The chunk, in the memory that is given for it if there is any."""
        if self._room is None:
            return data
        return self.backend.copied(data, self._room(version, chunk))

    def snapshot(self) -> dict[str, list[Array]]:
        """Everything that the next versions depend on: name -> one vector per chunk, or None. What was returned is not
        written to again (a model that was moved: not before the version after the next begins)."""
        return {MODEL: list(self.chunks)}

    def restore(self, version: int, arrays: dict[str, list[Array]]) -> None:
        """Go on from what `snapshot` returned at `version`.

        Raises:
            ModelError: it is of another model, or of another kind of run.
        """
        count = len(self.layout.chunks)
        for name, chunks in arrays.items():
            sizes = [None if x is None else x.size for x in chunks]
            fits = len(chunks) == count and all(
                size in (None, at.size) for size, at in zip(sizes, self.layout.chunks, strict=True)
            )
            if not fits or (name == MODEL and None in sizes):
                raise ModelError(f"the {name} that was saved is not of this model")
        self.version, self.chunks = version, list(arrays[MODEL])

    def sent_to(  # noqa: B027 - most aggregations need not know
        self, worker: str, chunks: Collection[int] | None = None
    ) -> None:
        """The current model is being sent to one worker; or chunks of it, which of the same version it lacked."""

    def in_progress(self) -> list[Published]:
        """The chunks of the next version that are final already."""
        return []


class Mean(Aggregation):
    """The barrier: version t+1 is t plus the outer optimiser's step on the weighted mean of the deltas.

    `D = sum_i(weight_i * delta_i) / sum_i(weight_i)`, the weights equal or by samples (FedAvg, McMahan et al.
    2017), and `w[t+1] = w[t] + global_lr * D` (Li et al. 2019), or what another outer optimiser makes of D
    (`esync.ps.outer`). Values are averaged with the same weights, without learning rate and outer optimiser.

    FedNova (Wang et al. 2020) keeps unequal numbers of local steps tau_i from shifting the optimum:
    `D = tau_eff * sum_i(p_i * delta_i / tau_i)` with `tau_eff = sum_i(p_i * tau_i)` and `p_i = 1/n`, n the number of
    workers whose chunk arrived. That is its form for plain local SGD, where the norm of a_i is tau_i; an update of no
    step counts as one of one step. Values are averaged plainly.

    A worker that is not (yet) expected is included if its update comes in time.

    To look at every chunk that comes would cost as much as to add it. So only the result is looked at; if that is not
    finite, the chunk is asked for again, and then each worker's is looked at before it is added.

    With `clip_update` each delta is looked at when it comes. An update that is too long is not waited for any more.

    With compression, what is published of a chunk of deltas is how it moves, encoded.

    Attributes:
        outer: the outer optimiser.

    Args:
        ordered: add up in the order of ranks instead of arrival, so that the result does not depend on it; keeps
            a round's chunks until those of all lower ranks are there.
    """

    def __init__(
        self, layout: Layout, backend: Backend, config: RunConfig, *, ordered: bool = False
    ) -> None:
        super().__init__(layout, backend, config)
        self.outer = OUTER[config.outer](backend, config, len(layout.chunks))
        self._compressor = Compressor(config.encoding, layout, (config.seed,))
        self._decoder = Decoder(config.encoding, layout)
        self._ordered = ordered
        largest = max(chunk.size for chunk in layout.chunks)
        self._together = max(1, backend.at_once // (4 * largest))  # chunks that are looked at
        self._average: list[Array] = []
        self._expected: dict[str, int] = {}
        self._begin()

    def averaged(self) -> list[Array]:
        return self._average or self.chunks

    def snapshot(self) -> dict[str, list[Array]]:
        arrays = super().snapshot()
        arrays |= {OUTER_STATE + name: chunks for name, chunks in self.outer.state().items()}
        if any(x is not None for x in self._next):
            arrays[NEXT] = list(self._next)  # for these chunks the outer optimiser has stepped
        if self._average:
            arrays[AVERAGE] = list(self._average)
        if lost := self._compressor.lost():
            arrays[LOST] = [lost.get(i) for i in range(len(self.chunks))]
        return arrays

    def restore(self, version: int, arrays: dict[str, list[Array]]) -> None:
        super().restore(version, arrays)
        begin = len(OUTER_STATE)
        self.outer.load({n[begin:]: x for n, x in arrays.items() if n.startswith(OUTER_STATE)})
        self._average = list(arrays.get(AVERAGE, [])) if self.config.ema else []
        self._compressor.load({i: x for i, x in enumerate(arrays.get(LOST, [])) if x is not None})
        self._begin()
        self._next[:] = arrays.get(NEXT, self._next)

    def _average_in(self, before: list[Array]) -> None:
        """`a[t] = d * a[t-1] + (1 - d) * w[t]`, with `d = ema`, but no more than t / (t + 2) at first: the initial
        model is soon forgotten."""
        keep = min(self.config.ema, self.version / (self.version + 2))
        self._average = [
            self.backend.blend(old, keep, new, 1.0 - keep)
            for old, new in zip(before, self.chunks, strict=True)
        ]

    def _begin(self) -> None:
        self._arrived: list[set[str]] = [set() for _ in self.chunks]
        # (data, factor) of what is in no sum yet
        self._waiting: list[list[tuple[Array, float]]] = [[] for _ in self.chunks]
        self._alone: dict[
            int, None
        ] = {}  # chunks with one that waits for a second, the oldest first
        self._totals: list[Array] = [None] * len(self.chunks)
        self._rooms: list[Array] = [None] * len(self.chunks)  # where those are that have one
        self._weights = [0.0] * len(self.chunks)
        self._steps = [0] * len(self.chunks)
        self._kept: list[dict[str, Contribution]] = [{} for _ in self.chunks]
        self._added: list[set[str]] = [set() for _ in self.chunks]  # of whom it is in the sum
        self._next: list[Array] = [None] * len(self.chunks)
        self._encoded: list[Encoded | None] = [None] * len(self.chunks)
        self._steps_made: dict[int, Step] = {}  # of chunks that are not looked at yet
        self._doubted: set[int] = set()
        self._excused: set[str] = set()  # who is not waited for in this round
        self._lengths.clear()

    def _take(self, update: Contribution) -> list[Event]:
        if update.round != self.version:
            return [Refused("early" if update.round > self.version else "late")]
        chunk, arrived = update.chunk, self._arrived[update.chunk]
        if self._next[chunk] is not None or chunk in self._steps_made:
            return [Refused("late")]
        if update.worker in arrived:
            return [Refused("double")]
        if chunk in self._doubted and not self.backend.is_finite(update.data):
            return [Refused(NOT_FINITE, update.worker)]
        if self.config.clip_update and (refused := self._beyond(update)):
            if update.worker in self._excused:
                return [refused]
            self._excused.add(update.worker)
            return [refused, *self._finish(range(len(self.chunks)))]
        arrived.add(update.worker)
        if self._ordered:
            self._kept[chunk][update.worker] = update
            self._add_in_order(chunk)
        else:
            self._add(update)
        fewest = len(self._expected) - len(self._excused)  # that a step waits for
        return self._step_on([chunk]) if len(arrived) >= fewest else []

    def _add_in_order(self, chunk: int) -> None:
        """Add what does not have to wait for a lower rank's."""
        kept, added = self._kept[chunk], self._added[chunk]
        for worker in self._expected:
            if worker not in added:
                if worker not in kept:
                    if worker in self._excused:
                        continue
                    return
                added.add(worker)
                self._add(kept.pop(worker))

    def _add(self, update: Contribution) -> None:
        chunk, weight = update.chunk, 1.0
        if self.config.weights == "samples":
            weight = float(update.samples)
        factor = weight
        if self._normalised(chunk):
            steps = max(1, update.steps)
            factor = weight / steps
            self._steps[chunk] += steps
        self._waiting[chunk].append((update.data, factor))
        self._weights[chunk] += weight
        if update.lasts and self.backend.cuda is not None:
            return  # a GPU adds all of them up in one pass, once they are there
        if self._totals[chunk] is None and len(self._waiting[chunk]) == 1:
            self._alone[chunk] = None  # the sum begins with the second one
            if len(self._alone) > MOST_ALONE:
                self._add_up(next(iter(self._alone)))
        else:
            self._add_up(chunk)

    def _add_up(self, chunk: int) -> None:
        """Add what waits to a chunk's sum; its memory is free then."""
        data, factors = self._no_longer_waiting(chunk)
        total = self._totals[chunk]
        if total is None:
            self._totals[chunk] = self.backend.weighted_sum(data, factors, self._new_room(chunk))
        elif len(data) == 1:
            self.backend.add_scaled(total, data[0], factors[0])
        else:
            self.backend.weighted_sum([total, *data], [1.0, *factors], total)

    def _no_longer_waiting(self, chunk: int) -> tuple[list[Array], list[float]]:
        """(vectors, factors) of what waits to be added."""
        waiting, self._waiting[chunk] = self._waiting[chunk], []
        self._alone.pop(chunk, None)
        return [data for data, _ in waiting], [factor for _, factor in waiting]

    def _new_room(self, chunk: int) -> Array | None:
        """Where the next version's chunk is made, if that is given."""
        if self._room is not None:
            self._rooms[chunk] = self._room(self.version + 1, chunk)
        return self._rooms[chunk]

    def _normalised(self, chunk: int) -> bool:
        """Whether the chunk's deltas count per local step."""
        return self.config.weights == "fednova" and self.layout.chunks[chunk].kind == DELTA

    def set_members(self, ranks: Mapping[str, int]) -> list[Event]:
        gone = self._expected.keys() - ranks.keys()
        self._forget_lengths(gone)
        self._excused -= gone
        self._expected = dict(sorted(ranks.items(), key=lambda item: (item[1], item[0])))
        return self._finish(range(len(self.chunks))) if self.version >= 0 else []

    def _finish(self, candidates: Collection[int]) -> list[Event]:
        """Make final whichever of the chunks nobody is awaited for any more."""
        return self._step_on(candidates) + self.settle()

    def _step_on(self, candidates: Collection[int]) -> list[Event]:
        """Make the step of whichever of the chunks nobody is awaited for any more. As many as are looked at together
        become final; the others when `settle` is called."""
        events: list[Event] = []
        awaited = self._expected.keys() - self._excused if self._excused else self._expected.keys()
        for chunk in candidates:
            if (
                self._next[chunk] is None
                and self._arrived[chunk]
                and self._arrived[chunk] >= awaited
                and chunk not in self._steps_made
            ):
                self._steps_made[chunk] = self._step(chunk)
                if len(self._steps_made) == self._together:
                    events += self.settle()
        return events

    def settle(self) -> list[Event]:
        """Look at the steps that were made, and make them final; the last of a round completes it."""
        if not self._steps_made:
            return []
        events: list[Event] = []
        made, self._steps_made = self._steps_made, {}
        finite = self._are_finite(list(made.values()))
        for (chunk, step), is_finite in zip(made.items(), finite, strict=True):
            events += self._make_final(chunk, step if is_finite else None)
        if all(x is not None for x in self._next):
            members = frozenset[str]().union(*self._arrived)
            before = self.averaged()
            self.chunks, self.version = self._next, self.version + 1
            if self.config.ema:
                self._average_in(before)
            self._begin()
            events.append(Completed(self.version, members))
        return events

    def _are_finite(self, steps: list[Step]) -> list[bool]:
        """Of each step whether all that it makes is finite."""
        looks = iter(self.backend.are_finite([x for step in steps for x in step.looks]))
        return [all([next(looks) for _ in step.looks]) for step in steps]

    def _make_final(self, chunk: int, step: Step | None) -> list[Event]:
        """A chunk is final; or it begins anew, if its step is not finite (None)."""
        events: list[Event] = []
        if step is None and chunk not in self._doubted:
            return [self._begin_anew(chunk)]
        if step is None:
            new = self.chunks[chunk]  # finite updates, but their sum is not
            events.append(Refused("overflow"))
        else:
            new = step.value
            self.outer.take(chunk, step)
        new = self._encode(chunk, new)
        if new is not self._rooms[chunk]:
            new = self._settled(self.version + 1, chunk, new)
        self._next[chunk] = new
        return [*events, self._published(chunk)]

    def _begin_anew(self, chunk: int) -> Doubted:
        """Forget what came of a chunk, and look at what comes."""
        workers = frozenset(self._arrived[chunk])
        for worker in workers & self._lengths.keys():
            known = self._lengths[worker]
            known.total -= known.squares.pop(chunk, 0.0)
        self._doubted.add(chunk)
        self._arrived[chunk], self._weights[chunk], self._steps[chunk] = set(), 0.0, 0
        self._kept[chunk], self._added[chunk] = {}, set()
        return Doubted(self.version, chunk, workers)

    def _step(self, chunk: int) -> Step:
        """What the updates make of a chunk; not looked at yet."""
        self._add_in_order(chunk)
        for _, update in sorted(self._kept[chunk].items()):  # of workers that are not expected
            self._add(update)
        self._kept[chunk] = {}
        weight, delta = self._weights[chunk], self.layout.chunks[chunk].kind == DELTA
        scale = 1.0 / weight
        if self._normalised(chunk):
            scale *= self._steps[chunk] / weight  # tau_eff
        if delta and self._totals[chunk] is None:
            data, factors = self._no_longer_waiting(chunk)
            room = self._new_room(chunk)
            return self.outer.step_on(chunk, self.chunks[chunk], data, factors, scale, room)
        if self._waiting[chunk]:
            self._add_up(chunk)
        total, self._totals[chunk] = self._totals[chunk], None
        if delta:
            return self.outer.step(chunk, self.chunks[chunk], total, scale)
        mean = self.backend.scaled(total, scale, total)
        return Step(mean, {}, [mean])

    def _encode(self, chunk: int, new: Array) -> Array:
        """Encode how a chunk moves, where the run compresses; returns where that really moves it.

        The next version is what its receivers make of it: their models and this one stay the same to the bit.
        """
        old, backend = self.chunks[chunk], self.backend
        if self.layout.chunks[chunk].kind != DELTA or not self._compressor.compresses:
            return new
        moved = backend.host(backend.blend(new, 1.0, old, -1.0))
        name, payload = self._compressor.encode(chunk, moved, self.version)
        step = self._decoder.decode(name, chunk, memoryview(payload))
        decoded = backend.blend(old, 1.0, backend.load(step), 1.0)
        if not backend.is_finite(decoded):  # numbers near the largest float32: the chunk goes whole
            self._compressor.forget(chunk)
            return new
        self._encoded[chunk] = Encoded(name, payload)
        return decoded

    def _published(self, chunk: int) -> Published:
        version, data = self.version + 1, self._next[chunk]
        return Published(version, chunk, data, encoded=self._encoded[chunk])

    def move_to(self, room: Room) -> bool:
        self._room = room
        if self.version >= 0:
            self.chunks = [self._settled(self.version, i, x) for i, x in enumerate(self.chunks)]
            for i, x in enumerate(self._next):
                if x is not None:
                    self._next[i] = self._settled(self.version + 1, i, x)
        return True

    def _missing(self, worker: str, round: int) -> list[int]:
        if round != self.version:
            return []
        return [
            i
            for i, arrived in enumerate(self._arrived)
            if worker not in arrived and self._next[i] is None
        ]

    def in_progress(self) -> list[Published]:
        return [self._published(i) for i, x in enumerate(self._next) if x is not None]


@dataclass(slots=True)
class _Progress:
    """How much of a worker's latest update has arrived, and what it was computed from.

    Attributes:
        staleness: versions made between the model of the update and its first chunk.
        base: the model that the update was computed from, while it arrives; None if it is not known.
        sent: the model that was last sent to the worker, and its version.
    """

    round: int = -2
    arrived: set[int] = field(default_factory=set)
    staleness: int = 0
    base: list[Array] | None = None
    sent: list[Array] | None = None
    sent_version: int = -1


class OnArrival(Aggregation):
    """No barrier: each chunk counts when it arrives, and the sender of an update alone gets the new model.

    An update's staleness and the model that it was computed from are settled when its first chunk arrives, and hold
    for all of its chunks, whatever arrives between them. The model is kept for each member if `keeps_sent`
    (published chunks never change: they are shared, not copied). It is not known for the first update of a worker that
    joined later, to which it was sent before it became a member, and if another version was sent meanwhile.
    """

    keeps_sent = False

    def __init__(self, layout: Layout, backend: Backend, config: RunConfig) -> None:
        super().__init__(layout, backend, config)
        self._members: frozenset[str] = frozenset()
        self._progress: dict[str, _Progress] = {}

    @abstractmethod
    def _applied(self, update: Contribution, progress: _Progress) -> Array:
        """The chunk with the update in it, a new vector."""

    def _receive_initial(self, update: Contribution) -> list[Event]:
        events = super()._receive_initial(update)
        for worker in self._members if self.version == 0 else ():
            self.sent_to(worker)
        return events

    def set_members(self, ranks: Mapping[str, int]) -> list[Event]:
        new = ranks.keys() - self._members
        self._forget_lengths(self._members - ranks.keys())
        self._members = frozenset(ranks)
        for worker in self._progress.keys() - ranks.keys():
            # Its round stays known: an update counts once.
            self._progress[worker].base = self._progress[worker].sent = None
        for worker in new if self.version == 0 else ():
            self.sent_to(worker)  # the initial model went to everybody, before there were members
        return []

    def sent_to(self, worker: str, chunks: Collection[int] | None = None) -> None:
        if not self.keeps_sent or worker not in self._members:
            return
        progress = self._progress.setdefault(worker, _Progress())
        if chunks is None:
            progress.sent, progress.sent_version = list(self.chunks), self.version
        elif progress.sent is not None and progress.sent_version == self.version:
            for i in chunks:  # the others have not moved for it, though the model's may have since
                progress.sent[i] = self.chunks[i]

    def _take(self, update: Contribution) -> list[Event]:
        if update.round > self.version:
            return [Refused("early")]
        progress = self._progress.setdefault(update.worker, _Progress())
        if update.round < progress.round:
            return [Refused("late")]
        if not self.backend.is_finite(update.data):
            return [Refused(NOT_FINITE, update.worker)]
        if update.round > progress.round:
            progress.round, progress.arrived = update.round, set()
            progress.staleness = self.version - update.round
            progress.base = progress.sent if progress.sent_version == update.round else None
        elif update.chunk in progress.arrived:
            return [Refused("double")]
        if self.config.clip_update and (refused := self._beyond(update)):
            return [refused]
        progress.arrived.add(update.chunk)
        applied = self._applied(update, progress)
        events: list[Event] = []
        if self.backend.is_finite(applied):
            self.chunks[update.chunk] = applied
        else:
            events.append(Refused("overflow"))
        if len(progress.arrived) < len(self.chunks):
            return events
        self.version += 1
        progress.base = None
        self.sent_to(update.worker)
        events += [Published(self.version, i, x, update.worker) for i, x in enumerate(self.chunks)]
        return [*events, Completed(self.version, frozenset([update.worker]))]

    def _missing(self, worker: str, round: int) -> list[int]:
        progress = self._progress.get(worker)
        if progress is None or round > progress.round:
            return list(range(len(self.chunks)))
        if round < progress.round:
            return []
        return [i for i in range(len(self.chunks)) if i not in progress.arrived]


class Immediate(OnArrival):
    """Each delta is added to the model: `w <- w + global_lr * delta` (ASGD, Dean et al. 2012).

    With `dcasgd` (Zheng et al. 2017, equation 10) the gradient g = -delta / lr is corrected by
    `lambda * g * g * (w - w_sent)`, where w_sent is the model that the worker had; if that is not known,
    the delta is added as it is. Values move by 1/p towards the sender's, p being the number of workers.
    """

    def __init__(self, layout: Layout, backend: Backend, config: RunConfig) -> None:
        super().__init__(layout, backend, config)
        self.keeps_sent = config.dcasgd

    def _applied(self, update: Contribution, progress: _Progress) -> Array:
        now = self.chunks[update.chunk]
        if self.layout.chunks[update.chunk].kind != DELTA:
            share = 1.0 / max(1, len(self._members))
            return self.backend.blend(now, 1.0 - share, update.data, share)
        scale = self.config.outer_lr
        if not self.config.dcasgd or progress.base is None:
            return self.backend.blend(now, 1.0, update.data, scale)
        drift = self.backend.blend(now, 1.0, progress.base[update.chunk], -1.0)
        strength = self.config.dc_lambda / self.config.lr
        return self.backend.compensated(now, update.data, drift, strength, scale)


STALENESS: dict[str, Callable[[int, float, float], float]] = {
    "constant": lambda staleness, a, b: 1.0,
    "hinge": lambda staleness, a, b: 1.0 / (a * max(0.0, staleness - b) + 1.0),
    "polynomial": lambda staleness, a, b: (staleness + 1.0) ** -a,
}
"""Name -> s(staleness, a, b): 1 for a fresh update, and falling (Xie et al. 2019)."""
PUBLISHED_A = {"hinge": 10.0, "polynomial": 0.5}
"""The a of their experiments."""


class FedAsync(OnArrival):
    """The sender's model is mixed into the model, the less the staler it is (FedAsync, Xie et al. 2019).

    `w <- (1 - a_t) * w + a_t * w_i` with `a_t = mixing * s(staleness)`. The worker's model w_i is the one that was
    sent to it plus its delta; if the former is not known, w takes its place: `w <- w + a_t * delta`. Values are mixed
    with the same a_t. The staleness is the number of versions since the one that the worker had. The global learning
    rate has no part in it.
    """

    keeps_sent = True

    def _applied(self, update: Contribution, progress: _Progress) -> Array:
        config, now = self.config, self.chunks[update.chunk]
        s = STALENESS[config.staleness_weight]
        a = config.staleness_a or PUBLISHED_A.get(config.staleness_weight, 0.0)
        share = config.mixing * s(progress.staleness, a, config.staleness_b)
        if self.layout.chunks[update.chunk].kind != DELTA:
            return self.backend.blend(now, 1.0 - share, update.data, share)
        sent = now if progress.base is None else progress.base[update.chunk]
        if sent is now:
            return self.backend.blend(now, 1.0, update.data, share)
        mixed = self.backend.blend(now, 1.0 - share, sent, share)
        self.backend.add_scaled(mixed, update.data, share)
        return mixed


AGGREGATIONS: dict[str, Callable[..., Aggregation]] = {
    "mean": Mean,
    "immediate": Immediate,
    "fedasync": FedAsync,
}
"""Name in `esync.algorithms` -> aggregation."""
