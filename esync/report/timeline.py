"""The timeline: what every worker did from when to when, and which part of it a figure shows."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from esync.errors import ConfigError
from esync.report.logs import Published, WorkerRound
from esync.report.runs import Run
from esync.report.series import time_label

COMPUTING, QUERYING, SYNCHRONISING = "computing", "querying", "synchronising"
WAITING, EVALUATING = "waiting", "evaluating"
KINDS = (COMPUTING, QUERYING, SYNCHRONISING, WAITING, EVALUATING)

ROUNDS = 6
"""Rounds that a window shows unless it is told otherwise."""
UPDATES = 3
"""The same without a barrier, in rounds of the slowest worker."""
MANY = 24
"""So many workers get a row each."""
FEW = 8
"""Of more, so many of the fastest and of the slowest do."""
MARGIN = 0.02
"""Share of the window to each side of the rounds in it."""
SHORTEST_S = 1e-9
"""What is shorter comes from rounding."""
MANY_BOUNDARIES = 40
"""More round boundaries than so many would hide what is between them."""


@dataclass(frozen=True, slots=True)
class Interval:
    """One worker did one thing, in seconds since the run's start. `steps`: local steps, if it was computing."""

    worker: str
    kind: str
    begin_s: float
    end_s: float
    round: int
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One worker's row of a timeline; `share`: of the time in the window that is accounted for, what it computed
    (None for an evaluator)."""

    worker: str
    device: str
    intervals: list[Interval]
    share: float | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a timeline figure shows.

    Attributes:
        rows: workers, the fastest first, then evaluators.
        gap: how many rows are above the place where workers are left out; None if none are.
        boundaries: (seconds, version) of the versions published in the window.
        note: what is left out, in words.
    """

    title: str
    xlabel: str
    begin_s: float
    end_s: float
    rows: list[Row]
    gap: int | None
    boundaries: list[tuple[float, int]]
    note: str


def intervals(
    run: Run,
    workers: Iterable[str] | None = None,
    begin_s: float = -math.inf,
    end_s: float = math.inf,
) -> list[Interval]:
    """What the workers and evaluators did, worker by worker and in order of time.

    A worker's round is one row of its log: it ended at the row's time and lasted as long as its parts. In it the
    worker computes, asks, sends its update, waits until the version is published, and receives that. How long it
    waited is the parameter server's `early_s`; what remains of the synchronisation is split into sending and
    receiving by the time at which the version was published, as far as the two clocks agree. A round that the run's end
    cut off has no version: in what is left of it the worker waited. Where workers wait for
    their turn before a round (`asks_first`), what receiving takes is taken for the time of sending too, and the rest
    was that wait. Asking is drawn in one piece, though it happens between steps.

    Args:
        workers: whose; default everybody's.
        begin_s, end_s: those that reach into this window, whole.

    Returns:
        intervals longer than nothing; those of one worker do not overlap.
    """
    names = [*run.log.rounds, *run.log.evaluations] if workers is None else list(workers)
    updates = _Updates(run)
    made = []
    for name in names:
        made += _rounds(run, name, updates, begin_s, end_s)
        made += _evaluations(run, name, begin_s, end_s)
    return made


class _Updates:
    """Finds when a worker's update was published, and how early it was there."""

    def __init__(self, run: Run) -> None:
        self._barrier = run.algorithm.barrier
        self._of_version: dict[int, Published] = {}
        self._of_worker: dict[str, list[float]] = {}
        for row in run.log.published:
            self._of_version.setdefault(row.version, row)
            if not self._barrier:
                for name in row.early_s:
                    self._of_worker.setdefault(name, []).append(row.t)

    def cuts_off(self, row: WorkerRound) -> bool:
        """Whether the run ended before this round did: its version was never published, nor a later one."""
        newest = max(self._of_version, default=math.inf)
        return self._barrier and not row.late and row.round + 1 > newest

    def of(self, worker: str, row: WorkerRound) -> tuple[float, float] | None:
        """(when, how early in seconds). With a barrier that is the next version; without one, of the versions that the
        worker has a part in, the nearest to the round's end, and nobody is early."""
        if self._barrier:
            found = self._of_version.get(row.round + 1)
            if found is None or worker not in found.early_s:
                return None
            return found.t, found.early_s[worker]
        mine = self._of_worker.get(worker, [])
        at = bisect.bisect_right(mine, row.t)
        near = min(mine[max(0, at - 1) : at + 1], key=lambda t: abs(t - row.t), default=None)
        return (near, 0.0) if near is not None and near > row.t - row.total_s else None


def _rounds(
    run: Run, worker: str, updates: _Updates, begin_s: float, end_s: float
) -> list[Interval]:
    made: list[Interval] = []
    free = -math.inf  # where the round before ended: a clock that was set back makes no overlap
    unfinished = run.log.unfinished.get(worker, [])
    for row in sorted([*run.log.rounds.get(worker, []), *unfinished], key=lambda row: row.t):
        end = run.log.run_s(row.t)
        at = end - row.total_s
        if end > begin_s and at < end_s:
            if row in unfinished:
                parts = _cut_off(row, waited_first=run.algorithm.asks_first)
            elif updates.cuts_off(row) and not run.config.get("overlap"):
                parts = _cut_off(row)
            else:
                parts = _parts(run, row, updates.of(worker, row))
            for kind, lasted_s in parts:
                until = at + lasted_s
                begin = max(at, free)
                if until - begin > SHORTEST_S:
                    steps = row.steps if kind == COMPUTING else 0
                    made.append(Interval(worker, kind, begin, until, row.round, steps))
                    free = until
                at = until
        free = max(free, end)
    return made


def _parts(
    run: Run, row: WorkerRound, update: tuple[float, float] | None
) -> list[tuple[str, float]]:
    """A round's kinds in order with their seconds, which add up to the round's."""
    before = waiting = 0.0
    receiving = row.sync_s / 2
    if update is not None and not row.late and not run.config.get("overlap"):
        published, early_s = update
        waiting = min(early_s, row.sync_s)
        moving = row.sync_s - waiting
        receiving = min(max(0.0, row.t - published), moving)
        if run.algorithm.asks_first:
            before = max(0.0, moving - 2 * receiving)
    sending = row.sync_s - before - waiting - receiving
    parts = [(WAITING, before), (COMPUTING, row.compute_s), (QUERYING, row.query_s)]
    if waiting:
        parts += [(SYNCHRONISING, sending), (WAITING, waiting), (SYNCHRONISING, receiving)]
    else:
        parts += [(SYNCHRONISING, sending + receiving)]
    return parts


def _cut_off(row: WorkerRound, *, waited_first: bool = False) -> list[tuple[str, float]]:
    """The same of a round that the run's end cut off: from its last step on the worker waited, or for its turn."""
    trained = [(COMPUTING, row.compute_s), (QUERYING, row.query_s)]
    waited = [(WAITING, row.sync_s)]
    return waited + trained if waited_first else trained + waited


def _evaluations(run: Run, name: str, begin_s: float, end_s: float) -> list[Interval]:
    made: list[Interval] = []
    free = -math.inf
    for row in run.log.evaluations.get(name, []):
        end = run.log.run_s(row.t)
        begin = max(end - row.eval_s, free)
        if end > begin_s and begin < end_s and end - begin > SHORTEST_S:
            made.append(Interval(name, EVALUATING, begin, end, row.version))
        free = max(free, end)
    return made


def slowness(run: Run) -> dict[str, float]:
    """Worker -> seconds a local step, the fastest first; those of whom the log has rounds."""
    found = {}
    for name, rows in run.log.rounds.items():
        steps = sum(row.steps for row in rows)
        found[name] = sum(row.compute_s for row in rows) / steps if steps else math.inf
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def window(run: Run) -> tuple[float, float] | None:
    """(begin, end) in seconds of a few rounds in the middle of the run; None if there are none."""
    if run.algorithm.barrier:
        edges = sorted(run.log.run_s(row.t) for row in run.log.published)
        if len(edges) < 2:
            edges = _edges(run)
        count = ROUNDS
    else:
        edges, count = _edges(run), UPDATES
    if len(edges) < 2:
        return None
    first = max(0, (len(edges) - 1 - count) // 2)
    begin, end = edges[first], edges[min(first + count, len(edges) - 1)]
    margin = MARGIN * (end - begin)
    return begin - margin, end + margin


def _edges(run: Run) -> list[float]:
    """Where the slowest worker's rounds begin, and where the last one ends."""
    spans = {n: median(r.total_s for r in rows) for n, rows in run.log.rounds.items() if rows}
    if not spans:
        return []
    rows = run.log.rounds[max(spans, key=lambda name: spans[name])]
    ends = [run.log.run_s(row.t) for row in rows]
    return [end - row.total_s for end, row in zip(ends, rows, strict=True)] + ends[-1:]


def chosen_window(
    run: Run, begin_s: float | None, end_s: float | None
) -> tuple[float, float] | None:
    """The window asked for; of what was not asked for, one like `window`'s.

    Raises:
        ConfigError: it ends before it begins.
    """
    usual = window(run)
    if begin_s is not None and end_s is not None:
        if end_s <= begin_s:
            raise ConfigError(f"--from {begin_s:g} --to {end_s:g}: a window ends after it begins")
        return begin_s, end_s
    if usual is None:
        return None
    length = usual[1] - usual[0]
    if begin_s is not None:
        return begin_s, begin_s + length
    if end_s is not None:
        return end_s - length, end_s
    return usual


def timeline(
    run: Run, title: str, begin_s: float | None = None, end_s: float | None = None
) -> Timeline | None:
    """What the figure of a run shows; None if the log has nothing in the window.

    Args:
        title: what the run is called.
        begin_s, end_s: the window in seconds since the run's start; default: a few rounds in the middle.

    Raises:
        ConfigError: the window ends before it begins.
    """
    shown = chosen_window(run, begin_s, end_s)
    if shown is None:
        return None
    names, gap, note = _selection(list(slowness(run)))
    devices = {row["name"]: row["device"] for row in run.summary["workers"]}
    names += run.log.evaluations
    found: dict[str, list[Interval]] = {name: [] for name in names}
    for item in intervals(run, names, *shown):
        found[item.worker].append(item)
    if not any(found.values()):
        return None
    rows = [_row(run, name, devices.get(name, ""), found[name], shown) for name in names]
    boundaries = _boundaries(run, shown)
    if len(boundaries) > MANY_BOUNDARIES:
        boundaries = []
    return Timeline(title, time_label([run]), *shown, rows, gap, boundaries, note)


def _selection(names: list[str]) -> tuple[list[str], int | None, str]:
    """(whose rows are shown, where the gap is, what is left out) of workers in order of speed."""
    if len(names) <= MANY:
        return names, None, ""
    note = f"the {FEW} fastest and the {FEW} slowest of {len(names)} workers"
    return names[:FEW] + names[-FEW:], FEW, note


def _row(
    run: Run, name: str, device: str, found: list[Interval], shown: tuple[float, float]
) -> Row:
    spent = {kind: 0.0 for kind in KINDS}
    for item in found:
        spent[item.kind] += max(0.0, min(item.end_s, shown[1]) - max(item.begin_s, shown[0]))
    whole = sum(spent.values())
    trains = name in run.log.rounds
    return Row(name, device, found, spent[COMPUTING] / whole if trains and whole else None)


def _boundaries(run: Run, shown: tuple[float, float]) -> list[tuple[float, int]]:
    if not run.algorithm.barrier:
        return []
    found = {row.version: run.log.run_s(row.t) for row in reversed(run.log.published)}
    return sorted((t, version) for version, t in found.items() if shown[0] <= t <= shown[1])
