"""Runs side by side, from their summaries: the rows of the comparison, and the table that a terminal shows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from esync.algorithms import algorithm
from esync.errors import DataError
from esync.state.history import TOTALS, compute_ratio

UNEQUAL = 20
"""Steps of one worker for each of another's from which on it is said that both count the same."""
MANY = 24
"""Workers that get a row each; of more than so many the least, the mean and the greatest are told."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the comparison: what it is, and a cell for each run."""

    label: str
    cells: list[str]


def read_summary(directory: str | Path) -> dict[str, Any]:
    """A run's summary.

    Raises:
        DataError: there is none, or it is not readable.
    """
    path = Path(directory) / "summary.json" if Path(directory).is_dir() else Path(directory)
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}. Give the directory of a finished run, such as runs/NAME"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not a summary: {error}") from error
    if not isinstance(summary, dict) or "time_to" not in summary:
        raise DataError(f"{path} is not a run's summary")
    return {"name": path.resolve().parent.name, **summary}


def mode_text(summary: dict[str, Any]) -> str:
    """The algorithm in a word or two."""
    config = summary.get("run", {})
    extras = []
    if summary["mode"] == "esync" and summary.get("policy") == "paper":
        extras.append("as published")
    extras += [word for word in ("overlap", "dcasgd") if config.get(word)]
    if config.get("outer", "sgd") != "sgd":
        extras.append(config["outer"])
    return str(summary["mode"]) + (f" ({', '.join(extras)})" if extras else "")


def title(summary: dict[str, Any]) -> str:
    """What a run is called in a table."""
    lines = [str(summary["name"]), mode_text(summary)]
    members = summary.get("members", [summary])
    if len(members) > 1:
        lines.append(f"mean of {len(members)} seeds")
    if summary.get("virtual"):
        lines.append("virtual time")
    if any(s["ended"] == "unfinished" for s in members):
        lines.append("unfinished")
    return "\n".join(lines)


def seconds(value: float | None, wall_s: float) -> str:
    """A time to an accuracy; one that was not reached is longer than the run."""
    return f"{value:.1f} s" if value is not None else f"> {wall_s:.0f} s"


def known_s(summary: dict[str, Any]) -> float:
    """Up to which second of a run its accuracies are known: evaluations lag behind in one that goes on."""
    if summary["ended"] != "unfinished":
        return float(summary["wall_s"])
    return float(summary["accuracy"][-1]["t"]) if summary["accuracy"] else 0.0


def speed_up(summary: dict[str, Any], base: dict[str, Any], threshold: str) -> str:
    """How many times sooner than `base`; a lower bound where `base` never got there."""
    mine, other = summary["time_to"].get(threshold), base["time_to"].get(threshold)
    if mine is None:
        return ""
    if other is None:
        least = known_s(base) / mine if mine > 0 else 0.0
        return f"> {least:.1f}x" if least > 1 else ""
    return f"{other / mine:.1f}x" if mine > 0 else ""


def sections(summaries: list[dict[str, Any]]) -> list[list[Row]]:
    """The comparison's rows in groups: time to each accuracy, what the whole run did, and every worker's share of
    time computing. The last run is the one that the others' speed-ups are measured against."""
    groups = [_times(summaries), _whole(summaries), _computing(summaries)]
    return [group for group in groups if group]


def comparison(summaries: list[dict[str, Any]]) -> Table:
    """The same for a terminal."""
    title_text = "side by side" if len(summaries) > 1 else "summary"
    table = Table(title=title_text, title_justify="left", header_style="bold")
    table.add_column("")
    for summary in summaries:
        table.add_column(title(summary), justify="right")
    for group in sections(summaries):
        table.add_section()
        for row in group:
            table.add_row(row.label, *row.cells)
    return table


def advice(summary: dict[str, Any]) -> str:
    """What to try after a run in which one worker stepped far more often than another, and each update counted the
    same; empty where there is nothing to say. (By class, counting by samples would leave a class to who is slow.)"""
    equal = summary.get("run", {}).get("weights") == "equal"
    if not equal or summary.get("split") != "iid" or not algorithm(summary["mode"]).barrier:
        return ""
    steps, present_s = Counter[str](), Counter[str]()
    for stay in summary["workers"]:
        until = summary["wall_s"] if stay["left_s"] is None else stay["left_s"]  # it is there still
        steps[stay["name"]] += stay["steps"]
        present_s[stay["name"]] += until - stay["joined_s"]
    paces = sorted((steps[x] / present_s[x], x) for x in steps if steps[x] and present_s[x] > 0)
    if not paces or paces[-1][0] < UNEQUAL * paces[0][0]:
        return ""
    (least, slowest), (most, fastest) = paces[0], paces[-1]
    return (
        f"{fastest} made {most / least:.0f} local steps for each of {slowest}'s, and their updates counted the same: "
        f"try --weights samples, or go without {slowest}"
    )


def _times(summaries: list[dict[str, Any]]) -> list[Row]:
    base = summaries[-1]
    rows = []
    for threshold in base["time_to"]:
        if any(_reached(s, threshold) for s in summaries):
            cells = [_time(s, threshold) for s in summaries]
            rows.append(Row(f"time to accuracy {float(threshold):.2f}", cells))
    for threshold in base["time_to"]:
        cells = [speed_up(s, base, threshold) for s in summaries[:-1]]
        if any(cells):
            rows.append(Row(f"speed-up to {float(threshold):.2f}", [*cells, "1x"]))
    return rows


def _reached(summary: dict[str, Any], threshold: str) -> int:
    """How many of the runs behind a summary had this accuracy."""
    return sum(s["time_to"].get(threshold) is not None for s in summary.get("members", [summary]))


def _time(summary: dict[str, Any], threshold: str) -> str:
    members = summary.get("members", [summary])
    reached = _reached(summary, threshold)
    if 0 < reached < len(members):
        return f"{seconds(None, known_s(summary))} ({reached} of {len(members)} sooner)"
    if not reached:
        return seconds(None, known_s(summary))
    return _cell(summary, lambda s: s["time_to"][threshold], lambda value: f"{value:.1f} s")


def _whole(summaries: list[dict[str, Any]]) -> list[Row]:
    rows = [
        ("final accuracy", lambda s: s["final_accuracy"], lambda x: f"{x:.4f}"),
        ("samples per second", lambda s: s["samples_per_s"], lambda x: f"{x:.0f}"),
        ("rounds", lambda s: s["rounds"], lambda x: f"{x:.0f}"),
        ("seconds", lambda s: s["wall_s"], lambda x: f"{x:.1f}"),
        ("MB moved", _moved_mb, lambda x: f"{x:.1f}"),
    ]
    made = [Row(label, [_cell(s, value, text) for s in summaries]) for label, value, text in rows]
    return [row for row in made if any(row.cells)]


def _moved_mb(summary: dict[str, Any]) -> float | None:
    up, down = summary["bytes_up"], summary["bytes_down"]
    return None if up is None or down is None else float(up + down) / 1e6


def _cell(
    summary: dict[str, Any],
    value: Callable[[dict[str, Any]], float | None],
    text: Callable[[float], str],
) -> str:
    """A figure of a run; of several runs the mean, with the least and the greatest."""
    known = [x for x in map(value, summary.get("members", [summary])) if x is not None]
    if not known:
        return ""
    mean, low, high = text(fmean(known)), text(min(known)), text(max(known))
    return mean if low == high else f"{mean} ({low} to {high})"


def _computing(summaries: list[dict[str, Any]]) -> list[Row]:
    names = {row["name"]: row["device"] for s in summaries for row in s["workers"]}
    if len(names) > MANY:
        shares = [list(computing_ratios(s).values()) for s in summaries]
        return [
            Row(f"computing: {word} of the workers", [f"{of(s):.0%}" if s else "" for s in shares])
            for word, of in (("mean", fmean), ("least", min), ("most", max))
        ]
    ratios = [computing_ratios(s) for s in summaries]
    rows = []
    for name, device in names.items():
        label = f"computing: {name}, {device}" if device else f"computing: {name}"
        rows.append(Row(label, [f"{r[name]:.0%}" if name in r else "" for r in ratios]))
    return rows


def computing_ratios(summary: dict[str, Any]) -> dict[str, float]:
    """Worker -> its share of time computing, in all of its stays; of several runs the mean."""
    found: dict[str, list[float]] = {}
    for member in summary.get("members", [summary]):
        stays: dict[str, list[dict[str, Any]]] = {}
        for row in member["workers"]:
            stays.setdefault(row["name"], []).append(row)
        for name, rows in stays.items():
            found.setdefault(name, []).append(_computing_ratio(rows))
    return {name: fmean(ratios) for name, ratios in found.items()}


def _computing_ratio(stays: list[dict[str, Any]]) -> float:
    if len(stays) == 1:
        return float(stays[0]["compute_ratio"])
    return compute_ratio({key: sum(stay[key] for stay in stays) for key in TOTALS})
