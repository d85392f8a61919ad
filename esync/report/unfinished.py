"""What a run without a `summary.json` has done so far, in a summary's form, from its logs."""

from __future__ import annotations

from typing import Any

from esync.report.logs import Log, WorkerRound
from esync.state.history import THRESHOLDS, compute_ratio

UNFINISHED = "unfinished"
"""The `ended` of a run that has no summary: it is running, or was cut off."""


def summary_so_far(log: Log, config: dict[str, Any]) -> dict[str, Any]:
    """A summary, as far as the logs have it.

    Args:
        log: the run's log.
        config: `[run]` of its `cluster.toml`, or nothing.

    Returns:
        the fields of `summary.json`; `bytes_up` and `bytes_down` are None if the log has no byte counts.
    """
    goes_on = max([log.zero, *(t for t, _ in log.resumes)])
    end = min([t for t in log.stops if t > goes_on], default=log.last)
    wall_s = max(0.0, log.run_s(end)) if log.starts else 0.0
    workers = [_worker(log, name) for name in _names(log)]
    samples = sum(row["samples"] for row in workers)
    newest = {row.server: row for row in log.published}.values()
    up, down = [row.bytes_up for row in newest], [row.bytes_down for row in newest]
    accuracy = accuracy_rows(log)
    return {
        "mode": config.get("mode", "unknown mode"),
        "policy": config.get("policy"),
        "model": config.get("model", "?"),
        "dataset": config.get("dataset", "?"),
        "split": config.get("split", "?"),
        "seed": config.get("seed"),
        "ended": UNFINISHED,
        "rounds": max((row.version for row in newest), default=0),
        "wall_s": wall_s,
        "samples": samples,
        "samples_per_s": samples / wall_s if wall_s > 0 else 0.0,
        "bytes_up": _sum(up),
        "bytes_down": _sum(down),
        "workers": workers,
        "accuracy": accuracy,
        "final_accuracy": accuracy[-1]["accuracy"] if accuracy else None,
        "time_to": {f"{x:g}": _time_to(accuracy, x) for x in THRESHOLDS},
        "run": config,
    }


def _sum(counts: list[int | None]) -> int | None:
    """The sum; None if somebody did not count, or nobody is there."""
    known = [n for n in counts if n is not None]
    return sum(known) if known and len(known) == len(counts) else None


def accuracy_rows(log: Log) -> list[dict[str, Any]]:
    """The log's test accuracies as a summary has them, by version."""
    rows = [
        {
            "t": row.run_s if row.run_s is not None else max(0.0, log.run_s(row.t)),
            "round": row.version,
            "accuracy": row.accuracy,
            "loss": row.loss,
        }
        for row in log.accuracy
    ]
    return sorted(rows, key=lambda row: int(row["round"]))


def totals(rows: list[WorkerRound]) -> dict[str, Any]:
    """A worker's totals over these rounds."""
    return {
        "steps": sum(row.steps for row in rows),
        "samples": sum(row.samples for row in rows),
        "compute_s": sum(row.compute_s for row in rows),
        "query_s": sum(row.query_s for row in rows),
        "sync_s": sum(row.sync_s for row in rows),
    }


def _names(log: Log) -> list[str]:
    joined = [name for name, kind in log.joined.items() if kind == "worker"]
    return sorted({*joined, *log.rounds})


def _worker(log: Log, name: str) -> dict[str, Any]:
    spent = totals([*log.rounds.get(name, []), *log.unfinished.get(name, [])])
    ratio = compute_ratio(spent)
    return {"name": name, "device": log.devices.get(name, ""), **spent, "compute_ratio": ratio}


def _time_to(accuracy: list[dict[str, Any]], threshold: float) -> float | None:
    return next((float(row["t"]) for row in accuracy if row["accuracy"] >= threshold), None)
