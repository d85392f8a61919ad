"""What happened in a run: versions, accuracies, comings and goings, and the summary made of them.

No socket, no clock: times are seconds since the run's start and come in as arguments.
"""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from esync.config import RunConfig
from esync.state.database import Record

THRESHOLDS = (0.7, 0.8, 0.85, 0.9)
"""Accuracies whose times a summary names."""
TOTALS = ("steps", "samples", "compute_s", "query_s", "sync_s", "eval_s")
"""A worker's running totals: local steps, samples, and seconds by what they were spent on."""
ABOUT = ("worker", "rank", "role", "host", "device", "life")
"""What is kept of who a worker is."""
SAVED = 1000
"""Of so many versions it is saved when they were published: the others have been evaluated, or never are. Of the stays
that have ended so many are saved, and what the others came to."""
VERSIONS = 50_000
"""Of so many it is known when they were published, and of up to as many more."""
STAYS = 10_000
"""Stays that have ended are kept one by one, the last so many and a quarter more; what came before is summed up."""
EVALUATIONS = 50_000
"""When there are more, every second one is given up, but the last: the curve stays."""
RESTARTED = "the state server was started again"
"""Why those left who were in the run when it died, and did not come back."""
EVICTED, REPLACED, SPEECHLESS = "evicted", "came back as a new process", "never said goodbye"
"""How the reasons begin for which the state server itself removes a worker."""


@dataclass(slots=True)
class Passage:
    """One worker's time in the run, from joining to leaving.

    `before` are the totals that it came with: a worker that was evicted and joins again goes on counting.
    """

    record: Record
    joined_s: float
    left_s: float | None = None
    reason: str = ""
    before: dict[str, Any] = field(default_factory=dict)

    def total(self, key: str) -> float:
        """What of one of its totals belongs to this stay."""
        count: float = self.record.totals.get(key, 0) - self.before.get(key, 0)
        return max(count, 0)  # nothing has been reported yet

    @property
    def process(self) -> tuple[str, str] | None:
        """Which process it is, if that is known."""
        return (self.record.worker, self.record.life) if self.record.life else None

    def saved(self) -> dict[str, Any]:
        """What `restored` makes it of."""
        record = self.record
        return {
            **{key: getattr(record, key) for key in ABOUT},
            "totals": record.totals,
            "before": self.before,
            "joined_s": self.joined_s,
            "left_s": self.left_s,
            "reason": self.reason,
        }

    @classmethod
    def restored(cls, saved: dict[str, Any], t: float) -> Passage:
        """What `saved` returned; who had not left then did at the time `t`, when the state server died."""
        record = Record(
            str(saved["worker"]),
            int(saved["rank"]),
            role=str(saved["role"]),
            host=str(saved["host"]),
            device=str(saved["device"]),
            life=str(saved["life"]),
            totals=dict(saved["totals"]),
        )
        stay = cls(record, float(saved["joined_s"]), t, RESTARTED, dict(saved["before"]))
        if saved["left_s"] is not None:
            stay.left_s, stay.reason = float(saved["left_s"]), str(saved["reason"])
        return stay


@dataclass(slots=True)
class History:
    """Everything that a summary needs."""

    version: int = 0
    version_s: dict[int, float] = field(default_factory=lambda: {0: 0.0})
    accuracy: list[dict[str, Any]] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    split_digest: str = ""
    begun: int = 0  # the version that this state server went on from
    rolled_back: int = 0  # rounds that were done again
    ended: int = 0  # of the passages
    summed: Counter[str] = field(
        default_factory=Counter
    )  # totals of workers' stays that are not kept
    gone: Counter[tuple[str, str]] = field(default_factory=Counter)  # these stays: (role, why)

    @property
    def rounds(self) -> int:
        """Versions that were published since this state server began, those done again included."""
        return self.version - self.begun + self.rolled_back

    def joined(self, record: Record, t: float) -> None:
        """A worker was registered."""
        new = Passage(record, t)
        for stay in self.passages if new.process else ():
            if stay.process == new.process and stay.reason == RESTARTED:  # it was here all along
                record.totals = stay.record.totals
                stay.record, stay.left_s, stay.reason = record, None, ""
                self.ended -= 1
                return
            if stay.process == new.process:
                new.before |= stay.record.totals
        self.passages.append(new)

    def left(self, record: Record, t: float, reason: str) -> None:
        """A worker went, or was evicted."""
        for passage in self.passages:
            if passage.record is record and passage.left_s is None:
                passage.left_s, passage.reason = t, reason
                self.ended += 1
        if self.ended > STAYS + STAYS // 4:
            self.passages, self.summed, self.gone = self._summed_up(STAYS)
            self.ended = STAYS

    def _summed_up(self, most: int) -> tuple[list[Passage], Counter[str], Counter[tuple[str, str]]]:
        """The stays with at most so many that have ended; what the older ones came to, and how they ended."""
        kept, summed, gone = [], self.summed.copy(), self.gone.copy()
        count = self.ended - most
        for stay in self.passages:
            if stay.left_s is None or count <= 0:
                kept.append(stay)
                continue
            count -= 1
            gone[stay.record.role, reason_class(stay.reason)] += 1
            if stay.record.role == "worker":
                summed.update({key: stay.total(key) for key in TOTALS})
        return kept, summed, gone

    def published(self, version: int, t: float, bytes_up: int, bytes_down: int) -> None:
        """The parameter server published a version."""
        self.version = max(self.version, version)
        self.version_s.setdefault(version, t)
        if len(self.version_s) > 2 * VERSIONS:
            self.version_s = {v: t for v, t in self.version_s.items() if v > version - VERSIONS}
        self.bytes_up, self.bytes_down = bytes_up, bytes_down

    def saved(self) -> dict[str, Any]:
        """What `restore` goes on from."""
        stays, summed, gone = self._summed_up(SAVED)
        return {
            "version": self.version,
            "version_s": [[v, t] for v, t in self.version_s.items() if v > self.version - SAVED],
            "accuracy": self.accuracy,
            "bytes": [self.bytes_up, self.bytes_down],
            "split_digest": self.split_digest,
            "stays": [stay.saved() for stay in stays],
            "summed": dict(summed),
            "gone": [[role, why, count] for (role, why), count in gone.items()],
        }

    def restore(self, saved: dict[str, Any], t: float) -> None:
        """Go on, at the time `t`, from what `saved` returned."""
        self.version = self.begun = int(saved["version"])
        self.version_s = {int(version): float(t) for version, t in saved["version_s"]}
        self.accuracy = [dict(row) for row in saved["accuracy"]]
        self.bytes_up, self.bytes_down = (int(n) for n in saved["bytes"])
        self.split_digest = str(saved["split_digest"])
        self.passages = [Passage.restored(stay, t) for stay in saved.get("stays", [])]
        self.ended = len(self.passages)
        self.summed = Counter(saved.get("summed", {}))
        self.gone = Counter(
            {(str(role), str(why)): int(n) for role, why, n in saved.get("gone", [])}
        )

    def roll_back(self, version: int) -> None:
        """The run goes on from this version: what came after it does not count."""
        self.rolled_back += max(0, self.version - version)
        self.version = version
        self.version_s = {v: t for v, t in self.version_s.items() if v <= version}
        self.accuracy = [row for row in self.accuracy if row["round"] <= version]

    def evaluated(self, version: int, accuracy: float, loss: float | None, t: float) -> None:
        """A version was evaluated, perhaps once more; it counts at the time at which it was published."""
        at = self.version_s.get(version, t)
        row = {"t": round(at, 4), "round": version, "accuracy": accuracy, "loss": loss}
        i = bisect.bisect_left(self.accuracy, version, key=lambda row: int(row["round"]))
        again = i < len(self.accuracy) and self.accuracy[i]["round"] == version
        self.accuracy[i : i + again] = [row]
        if len(self.accuracy) > EVALUATIONS:
            self.accuracy = self.accuracy[::-2][::-1]

    def total(self, key: str) -> float:
        """The sum of one of the workers' totals, over everybody who ever took part."""
        stays = [p for p in list(self.passages) if p.record.role == "worker"]
        return float(self.summed[key] + sum(stay.total(key) for stay in stays))

    def time_to(self, threshold: float) -> float | None:
        """Seconds from the start until a published model had this test accuracy."""
        for row in self.accuracy:
            if row["accuracy"] >= threshold:
                return float(row["t"])
        return None

    def summary(self, config: RunConfig, wall_s: float, reason: str) -> dict[str, Any]:
        """The contents of `summary.json` (docs/operations.md describes the fields)."""
        passages = sorted(self.passages, key=lambda p: (p.record.rank, p.joined_s))
        workers = [_worker_row(p) for p in passages if p.record.role == "worker"]
        evaluators = [_worker_row(p) for p in passages if p.record.role == "evaluator"]
        samples = self.summed["samples"] + sum(row["samples"] for row in workers)
        return {
            "mode": config.mode,
            "policy": config.policy if config.mode == "esync" else None,
            "model": config.model,
            "dataset": config.dataset,
            "split": config.split,
            "split_digest": self.split_digest,
            "seed": config.seed,
            "ended": reason,
            "rounds": self.version,
            "wall_s": round(wall_s, 4),
            "samples": samples,
            "samples_per_s": round(samples / wall_s, 3) if wall_s > 0 else 0.0,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "workers": workers,
            "evaluators": [{"name": row["name"], "eval_s": row["eval_s"]} for row in evaluators],
            "accuracy": self.accuracy,
            "final_accuracy": self.accuracy[-1]["accuracy"] if self.accuracy else None,
            "time_to": {f"{x:g}": self.time_to(x) for x in THRESHOLDS},
            "run": config.to_wire(),
        }


def reason_class(reason: str) -> str:
    """Why a worker left, as one of few words."""
    for beginning, word in (
        (EVICTED, "evicted"),
        (REPLACED, "replaced"),
        (SPEECHLESS, "no-goodbye"),
        ("done", "done"),
        ("interrupted", "interrupted"),
    ):
        if reason.startswith(beginning):
            return word
    return "other"


def compute_ratio(totals: dict[str, Any]) -> float:
    """Share of a worker's time spent computing, evaluation left out."""
    busy = totals.get("compute_s", 0.0)
    spent = busy + totals.get("query_s", 0.0) + totals.get("sync_s", 0.0)
    return float(busy / spent) if spent > 0 else 0.0


def _worker_row(passage: Passage) -> dict[str, Any]:
    record = passage.record
    totals = {key: passage.total(key) for key in TOTALS}
    return {
        "rank": record.rank,
        "name": record.worker,
        "device": record.device,
        "host": record.host,
        **{key: round(value, 4) for key, value in totals.items()},
        "compute_ratio": round(compute_ratio(totals), 4),
        "joined_s": round(passage.joined_s, 3),
        "left_s": None if passage.left_s is None else round(passage.left_s, 3),
        "left_why": passage.reason,
    }
