"""A run's logs: every `*.jsonl` file of its directory, read once and by role, whichever file a row is in."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATE = "state"
"""The state server's role."""


ROUNDING_S = 0.01
"""What is shorter may come from the rounding of many rows."""


@dataclass(frozen=True, slots=True)
class WorkerRound:
    """One round of one worker; it ended at `t`, and its parts add up to the time since it began."""

    t: float
    round: int
    steps: int
    samples: int
    compute_s: float
    query_s: float
    sync_s: float
    loss: float | None
    late: bool

    @property
    def total_s(self) -> float:
        """How long the round took."""
        return self.compute_s + self.query_s + self.sync_s


@dataclass(frozen=True, slots=True)
class Published:
    """A version of the model, or of one parameter server's shard of it, published at `t`.

    Attributes:
        server: the parameter server's role.
        early_s: by how many seconds each worker's update was complete before that.
        bytes_up, bytes_down: running totals of tensor bytes; None in logs that do not have them.
    """

    t: float
    server: str
    version: int
    early_s: dict[str, float]
    bytes_up: int | None
    bytes_down: int | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluator did in the `eval_s` seconds before `t`."""

    t: float
    version: int
    eval_s: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A version's test accuracy, as the state server heard of it at `t`; `run_s`: when it was published."""

    t: float
    version: int
    accuracy: float
    loss: float | None
    run_s: float | None


@dataclass(slots=True)
class Log:
    """What the rows say. Times `t` are the log's own: Unix seconds, or virtual ones.

    Attributes:
        starts, stops: when the state server said that a run started and stopped.
        stop_reason: what it said last on stopping.
        resumes: when the clock of a run that was gone on with began to run again, and where it stood.
        joined, left: who joined (name -> worker or evaluator) and who left again.
        devices: worker -> the device that it named.
        unfinished: worker -> rounds in which it was when its process ended, with the time until then.
        first, last: times of the first and of the last row.
        skipped: lines that are not rows.
    """

    starts: list[float] = field(default_factory=list)
    stops: list[float] = field(default_factory=list)
    stop_reason: str = ""
    resumes: list[tuple[float, float]] = field(default_factory=list)
    joined: dict[str, str] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    devices: dict[str, str] = field(default_factory=dict)
    rounds: dict[str, list[WorkerRound]] = field(default_factory=dict)
    unfinished: dict[str, list[WorkerRound]] = field(default_factory=dict)
    lives: dict[str, int] = field(default_factory=dict)  # how many rounds there were before
    published: list[Published] = field(default_factory=list)
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    accuracy: list[Accuracy] = field(default_factory=list)
    first: float = math.inf
    last: float = -math.inf
    skipped: int = 0

    @property
    def zero(self) -> float:
        """The run's time zero: its start; before the start was logged, the first row."""
        if self.starts:
            return max(self.starts)
        return self.first if math.isfinite(self.first) else 0.0

    def run_s(self, t: float) -> float:
        """The run's own time at `t`: seconds since its start, without those in which it stood still."""
        zero = self.zero
        for at, stood in self.resumes:
            if t < at:
                return min(t - zero, stood)
            zero = at - stood
        return t - zero

    @property
    def present(self) -> set[str]:
        """Who joined and did not leave."""
        return self.joined.keys() - self.left

    def take(self, line: bytes) -> None:
        """Take up one line; one that is not a row is counted and skipped."""
        try:
            row = json.loads(line)
            t = _seconds(row["t"])
            role, event = str(row["role"]), str(row["event"])
            self._take(t, role, event, row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.skipped += 1
            return
        self.first, self.last = min(self.first, t), max(self.last, t)

    def _take(self, t: float, role: str, event: str, row: dict[str, Any]) -> None:
        if event == "round" and "compute_s" in row:
            self.rounds.setdefault(role, []).append(_worker_round(t, row))
        elif event == "round" and "early_s" in row:
            self.published.append(_published(t, role, row))
        elif event == "accuracy" and role == STATE:
            self.accuracy.append(_accuracy(t, row))
        elif event == "accuracy" and "eval_s" in row:
            done = Evaluation(t, int(row["round"]), _seconds(row["eval_s"]))
            self.evaluations.setdefault(role, []).append(done)
        elif event == "start" and role == STATE:
            self.starts.append(t)
        elif event == "start" and "device" in row:
            self.devices[role] = str(row["device"])
            self.lives[role] = len(self.rounds.get(role, []))
        elif event == "end" and role in self.devices:
            rows = self.rounds.get(role, [])[self.lives[role] :]
            if rest := _rest_of(t, row["totals"], rows):
                self.unfinished.setdefault(role, []).append(rest)
        elif event == "stop" and role == STATE:
            self.stops.append(t)
            self.stop_reason = str(row.get("reason", ""))
        elif event == "goes_on" and role == STATE:
            self.resumes.append((t, _seconds(row["run_s"])))
        elif event == "join" and role == STATE:
            self.joined[str(row["worker"])] = str(row.get("kind", "worker"))
            self.left.discard(str(row["worker"]))
        elif event == "leave" and role == STATE:
            self.left.add(str(row["worker"]))

    def forget_earlier_runs(self) -> None:
        """Logs are appended to: drop what another run left before the last start."""
        if len(self.starts) < 2:
            return
        before, start = sorted(self.starts)[-2:]
        since = max((t for t in self.stops if before < t < start), default=start)
        self.starts = [start]
        self.stops = [t for t in self.stops if t > start]
        self.resumes = [(t, run_s) for t, run_s in self.resumes if t > start]
        self.rounds = {name: _since(since, rows) for name, rows in self.rounds.items()}
        self.rounds = {name: rows for name, rows in self.rounds.items() if rows}
        self.unfinished = {n: _since(since, rows) for n, rows in self.unfinished.items()}
        self.published = _since(since, self.published)
        self.evaluations = {name: _since(since, rows) for name, rows in self.evaluations.items()}
        self.accuracy = _since(since, self.accuracy)


class LogReader:
    """Reads a directory's logs, and what was appended to them since the last time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = Log()
        self._read_up_to: dict[Path, int] = {}

    def read(self) -> Log:
        """The log so far. A last line that is still being written is left for the next time."""
        for path in sorted(self.directory.glob("*.jsonl")):
            try:
                self._read(path)
            except OSError:  # as good as empty: it may be gone already
                continue
        self.log.forget_earlier_runs()
        return self.log

    def _read(self, path: Path) -> None:
        with open(path, "rb") as file:
            file.seek(self._read_up_to.get(path, 0))
            for line in file:
                if not line.endswith(b"\n") and not _is_json(line):
                    break
                self._read_up_to[path] = self._read_up_to.get(path, 0) + len(line)
                if line.strip():
                    self.log.take(line)


def _since(t: float, rows: list[Any]) -> list[Any]:
    return [row for row in rows if row.t > t]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"{value} is no time")
    return seconds


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _worker_round(t: float, row: dict[str, Any]) -> WorkerRound:
    return WorkerRound(
        t,
        int(row["round"]),
        int(row["steps"]),
        int(row["samples"]),
        max(0.0, _seconds(row["compute_s"])),
        max(0.0, _seconds(row["query_s"])),
        max(0.0, _seconds(row["sync_s"])),
        _optional(row.get("loss")),
        bool(row.get("late")),
    )


def _rest_of(t: float, totals: dict[str, Any], rows: list[WorkerRound]) -> WorkerRound | None:
    """What a process did after the last of its rounds that ended, by its totals; None if that is nothing, or unknown
    since it finished no round. It ends where its parts do: what came between that and `t` was its leaving."""
    if not rows:
        return None
    compute_s, query_s, sync_s = (
        max(0.0, _seconds(totals[key]) - sum(getattr(row, key) for row in rows))
        for key in ("compute_s", "query_s", "sync_s")
    )
    steps, samples = (
        max(0, int(totals[key]) - sum(getattr(row, key) for row in rows))
        for key in ("steps", "samples")
    )
    whole_s = min(compute_s + query_s + sync_s, max(0.0, t - rows[-1].t))
    if whole_s < ROUNDING_S:
        return None
    end = rows[-1].t + whole_s
    round = rows[-1].round + 1
    return WorkerRound(end, round, steps, samples, compute_s, query_s, sync_s, None, False)


def _published(t: float, server: str, row: dict[str, Any]) -> Published:
    early_s = {str(name): max(0.0, _seconds(s)) for name, s in row["early_s"].items()}
    up, down = row.get("bytes_up"), row.get("bytes_down")
    if up is None or down is None:
        return Published(t, server, int(row["round"]), early_s, None, None)
    return Published(t, server, int(row["round"]), early_s, int(up), int(down))


def _accuracy(t: float, row: dict[str, Any]) -> Accuracy:
    return Accuracy(
        t,
        int(row["round"]),
        float(row["accuracy"]),
        _optional(row.get("loss")),
        _optional(row.get("run_s")),
    )
