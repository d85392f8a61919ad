"""Runs side by side, from their `summary.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from esync.errors import DataError


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
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not a summary: {error}") from error
    if not isinstance(summary, dict) or "time_to" not in summary:
        raise DataError(f"{path} is not a run's summary")
    return {"name": path.resolve().parent.name, **summary}


def title(summary: dict[str, Any]) -> str:
    """What a run is called in a table."""
    text = str(summary["mode"])
    if summary["mode"] == "esync" and summary.get("policy") == "paper":
        text += " (as published)"
    if summary.get("run", {}).get("dcasgd"):
        text += " (dcasgd)"
    return f"{summary['name']}\n{text}"


def seconds(value: float | None, wall_s: float) -> str:
    """A time to an accuracy; one that was not reached is longer than the run."""
    return f"{value:.1f} s" if value is not None else f"> {wall_s:.0f} s"


def comparison(summaries: list[dict[str, Any]]) -> Table:
    """Time to each accuracy, speed, traffic, and every worker's share of time computing; the last run is the
    one that the others' speed-ups are measured against."""
    title_text = "side by side" if len(summaries) > 1 else "summary"
    table = Table(title=title_text, title_justify="left", header_style="bold")
    table.add_column("")
    for summary in summaries:
        table.add_column(title(summary), justify="right")
    base = summaries[-1]
    for threshold in base["time_to"]:
        cells = [seconds(s["time_to"].get(threshold), s["wall_s"]) for s in summaries]
        if any(s["time_to"].get(threshold) is not None for s in summaries):
            table.add_row(f"time to accuracy {float(threshold):.2f}", *cells)
    for threshold in base["time_to"]:
        cells = [speed_up(s, base, threshold) for s in summaries[:-1]]
        if any(cells):
            table.add_row(f"speed-up to {float(threshold):.2f}", *cells, "1x")
    table.add_section()
    if any(s["final_accuracy"] is not None for s in summaries):
        table.add_row("final accuracy", *(_accuracy(s["final_accuracy"]) for s in summaries))
    table.add_row("samples per second", *(f"{s['samples_per_s']:.0f}" for s in summaries))
    table.add_row("rounds", *(str(s["rounds"]) for s in summaries))
    table.add_row("seconds", *(f"{s['wall_s']:.1f}" for s in summaries))
    table.add_row(
        "MB moved", *(f"{(s['bytes_up'] + s['bytes_down']) / 1e6:.1f}" for s in summaries)
    )
    table.add_section()
    names = {row["name"]: row["device"] for s in summaries for row in s["workers"]}
    for name, device in names.items():
        cells = [_ratio(s, name) for s in summaries]
        table.add_row(f"computing: {name}, {device}", *cells)
    return table


def speed_up(summary: dict[str, Any], base: dict[str, Any], threshold: str) -> str:
    """How many times sooner than `base`; a lower bound where `base` never got there."""
    mine, other = summary["time_to"].get(threshold), base["time_to"].get(threshold)
    if mine is None:
        return ""
    if other is None:
        return f"> {base['wall_s'] / mine:.1f}x"
    return f"{other / mine:.1f}x" if mine > 0 else ""


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _ratio(summary: dict[str, Any], name: str) -> str:
    rows = [row for row in summary["workers"] if row["name"] == name]
    return f"{rows[-1]['compute_ratio']:.0%}" if rows else ""
