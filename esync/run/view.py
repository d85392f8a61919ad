"""What a running run looks like: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esync.config import task

PHASES = {
    "loading": "loading",
    "joined": "joined",
    "waiting": "waiting to start",
    "train": "training",
    "query": "asking",
    "sync": "synchronising",
    "eval": "evaluating",
    "idle": "idle",
    "leaving": "leaving",
}
"""A worker's phase -> the word for it."""
PLAIN_EVERY_S = 5.0
"""Seconds between two plain lines, unless somebody is waited for."""


def duration(seconds: float) -> str:
    """`75.2` -> `1:15`."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"


def plain(text: str, style: str = "") -> Text:
    """What others call themselves, as it is: no markup, nothing that a terminal obeys."""
    return Text("".join(x if x.isprintable() else "\N{REPLACEMENT CHARACTER}" for x in text), style)


def progress(status: dict[str, Any]) -> tuple[float, float | None]:
    """(share done, seconds left or None if nobody can know) of a run."""
    elapsed = status["elapsed_s"]
    shares = []
    if status["duration_s"]:
        shares.append(elapsed / status["duration_s"])
    if status["rounds"]:
        shares.append(status["round"] / status["rounds"])
    if not shares:
        return 0.0, None
    share = min(1.0, max(shares))
    return share, elapsed / share - elapsed if share > 0 else None


def headline(status: dict[str, Any]) -> str:
    """The run in one line."""
    parts = [
        f"{status['mode']} · {task(status['model'], status['dataset'])}",
        f"round {status['round']}" + (f"/{status['rounds']}" if status["rounds"] else ""),
        f"{duration(status['elapsed_s'])}"
        + (f"/{duration(status['duration_s'])}" if status["duration_s"] else ""),
    ]
    _, left = progress(status)
    if left is not None and not status["stopped"]:
        parts.append(f"{duration(left)} left")
    if status["accuracy"] is not None:
        accuracy = f"accuracy {status['accuracy']:.4f}"
        if status["target_accuracy"]:
            accuracy += f" (target {status['target_accuracy']:g})"
        parts.append(accuracy)
    return "  ".join(parts)


def live_table(status: dict[str, Any], waiting_for: str) -> Group:
    """The whole picture: headline, progress, one row per worker."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("worker", no_wrap=True)
    table.add_column("device", no_wrap=True)
    for name in ("round", "steps", "now", "s/step", "computing", "loss"):
        table.add_column(name, justify="left" if name == "now" else "right", no_wrap=True)
    for row in status["workers"]:
        trains = row["role"] == "worker"
        table.add_row(
            plain(row["worker"]),
            plain(row["device"]),
            str(max(row["round"], 0)) if trains else "",
            str(row["step"]) if trains else "",
            plain(PHASES.get(row["phase"], row["phase"])),
            f"{row['step_s']:.3f}" if row["step_s"] else "",
            f"{row['compute_ratio']:.0%}" if row["steps"] else "",
            f"{row['loss']:.3f}" if row["loss"] is not None else "",
        )
    share, left = progress(status)
    parts: list[Any] = [Text(headline(status), style="bold")]
    if left is not None:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=1.0, completed=share, width=60), f"{share:.0%}")
        parts.append(bar)
    if status["stopped"]:
        parts.append(plain(f"ending: {status['stopped']}"))
    elif waiting_for:
        parts.append(plain(f"waiting for {waiting_for}", style="yellow"))
    return Group(*parts, table)


def plain_line(status: dict[str, Any], waiting_for: str) -> str:
    """The same for a log file."""
    if waiting_for:
        return f"waiting for {waiting_for}"
    return f"{headline(status)}  {status['steps']:.0f} steps"


@contextmanager
def shown(console: Console, *, live: bool) -> Iterator[Callable[[dict[str, Any], str], None]]:
    """A function that shows a status: in a table that stays where it is, or in plain lines."""
    if live:
        with Live(console=console, refresh_per_second=8, transient=True) as screen:
            yield lambda status, waiting_for: screen.update(live_table(status, waiting_for))
    else:
        yield _Lines(console).show


class _Lines:
    """Plain lines, not more often than one can read."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line, self._at = "", 0.0

    def show(self, status: dict[str, Any], waiting_for: str) -> None:
        line = plain_line(status, waiting_for)
        due = time.monotonic() - self._at > PLAIN_EVERY_S
        if line != self._line and (due or waiting_for):
            self._line, self._at = line, time.monotonic()
            self._console.print(plain(line), highlight=False, soft_wrap=True)
