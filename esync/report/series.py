"""The curves of a report: accuracy and loss over time, rounds and bytes; several seeds as a mean with its band."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esync.report.runs import Entry, Run

Array = NDArray[np.float64]
WIDE = 8
"""Curves of which one is this many times longer than another are drawn over a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: y over x; `low` and `high` bound the band around a mean, else they are y."""

    label: str
    style: int
    x: Array
    y: Array
    low: Array
    high: Array


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes."""

    xlabel: str
    ylabel: str
    curves: list[Curve]
    wide: bool


def panels(entries: list[Entry]) -> list[Panel]:
    """Accuracy over time, over rounds and over bytes, and loss over time; those for which there are figures."""
    every_run = [run for entry in entries for run in entry.runs]
    clock = time_label(every_run)
    rounds = "rounds"
    if not all(run.algorithm.barrier for run in every_run):
        rounds += " (updates where there is no barrier)"
    made = [
        _panel(entries, clock, "test accuracy", _over_time, "accuracy"),
        _panel(entries, rounds, "test accuracy", _over_rounds, "accuracy", may_be_wide=True),
        _panel(entries, "MB moved", "test accuracy", _over_bytes, "accuracy", may_be_wide=True),
        _panel(entries, clock, "test loss", _over_time, "loss"),
    ]
    return [panel for panel in made if panel.curves]


def time_label(runs: list[Run]) -> str:
    """The time axis: whose seconds they are."""
    virtual = [run.virtual for run in runs]
    if all(virtual):
        return "virtual time (s)"
    return "time, real or virtual (s)" if any(virtual) else "time (s)"


def bytes_at(run: Run, version: Array) -> Array | None:
    """Tensor bytes moved, up and down together, by the time each version was published.

    From the parameter servers' logs; if they have no counts, the run's total in proportion to the rounds; None if
    nobody counted.
    """
    servers: dict[str, dict[int, int]] = {}
    for row in run.log.published:
        if row.bytes_up is not None and row.bytes_down is not None:  # of one made again the last
            servers.setdefault(row.server, {})[row.version] = row.bytes_up + row.bytes_down
    if servers:
        total = np.zeros(len(version))
        for counts in servers.values():
            known = sorted(counts)
            total += np.interp(version, known, [counts[v] for v in known])
        return total
    up, down, rounds = (run.summary[key] for key in ("bytes_up", "bytes_down", "rounds"))
    if up is None or down is None or not rounds:
        return None
    return np.asarray(np.clip(version / rounds, 0.0, 1.0) * (up + down), dtype=np.float64)


def mean_and_band(curves: list[tuple[Array, Array]]) -> tuple[Array, Array, Array, Array]:
    """x, mean, least and greatest of several curves, over the range that all of them have.

    Between its points a curve is a straight line.
    """
    begin, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    x = np.unique(np.concatenate([x for x, _ in curves]))
    x = x[(x >= begin) & (x <= end)]
    rows = np.stack([np.interp(x, *curve) for curve in curves])
    return x, rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0)


def _panel(
    entries: list[Entry],
    xlabel: str,
    ylabel: str,
    over: Callable[[Run, Array, Array], Array | None],
    key: str,
    *,
    may_be_wide: bool = False,
) -> Panel:
    curves = []
    for style, entry in enumerate(entries):
        found = [curve for run in entry.runs if (curve := _curve(run, over, key)) is not None]
        if found:
            curves.append(Curve(entry.label, style, *mean_and_band(found)))
    ends = [float(curve.x[-1]) for curve in curves if curve.x.size and curve.x[-1] > 0]
    wide = may_be_wide and len(ends) > 1 and max(ends) > WIDE * min(ends)
    if wide:
        curves = [_without_zero(curve) for curve in curves]
    return Panel(xlabel, ylabel, curves, wide)


def _without_zero(curve: Curve) -> Curve:
    """A curve for a logarithmic axis."""
    keep = curve.x > 0
    return replace(
        curve, x=curve.x[keep], y=curve.y[keep], low=curve.low[keep], high=curve.high[keep]
    )


def _curve(
    run: Run, over: Callable[[Run, Array, Array], Array | None], key: str
) -> tuple[Array, Array] | None:
    rows: list[dict[str, Any]] = [r for r in run.summary["accuracy"] if r.get(key) is not None]
    if not rows:
        return None
    versions = np.array([row["round"] for row in rows], dtype=np.float64)
    x = over(run, versions, np.array([row["t"] for row in rows], dtype=np.float64))
    if x is None:
        return None
    order = np.argsort(x, kind="stable")
    return x[order], np.array([row[key] for row in rows], dtype=np.float64)[order]


def _over_time(run: Run, versions: Array, times: Array) -> Array:
    return times


def _over_rounds(run: Run, versions: Array, times: Array) -> Array:
    return versions


def _over_bytes(run: Run, versions: Array, times: Array) -> Array | None:
    moved = bytes_at(run, versions)
    return None if moved is None else moved / 1e6
